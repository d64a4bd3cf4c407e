"""Containers that ``pipedock serve`` started: found by their labels, watched, stopped. Others are never touched."""

import re
from pathlib import Path
from typing import Any, Dict, Iterator, Optional

from .. import state
from ..reach import curl_lines
from .argv import version_of
from .daemon import answering

STOP_S = 120  # before the engine kills: TGI waits up to 90 s for running requests
PORT, MODEL, ENGINE, VERSION, URL, IDENTITY, KEYED, NAME = (
    "pipedock." + name for name in ("port", "model", "engine", "version", "url", "settings", "keyed", "served-name")
)
KEY = re.compile(r'(api_key: Some\(\s*")[^"]*')  # TGI prints its settings, the key among them
COLOURS = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
ASKED = 128 + 15  # ended by the SIGTERM that it was sent
ENDED = ("exited", "dead", "removing")


def name_of(port: int) -> str:
    return "pipedock-serve-%d" % port


class Found:
    """A container of ours. ``handle``: docker's own object."""

    def __init__(self, client: Any, handle: Any) -> None:
        self.client, self.handle = client, handle
        labels = handle.labels
        self.port, self.model, self.engine, self.url = int(labels[PORT]), labels[MODEL], labels[ENGINE], labels[URL]
        self.version, self.identity, self.keyed = labels[VERSION], labels[IDENTITY], labels[KEYED] == "true"
        self.served_name = labels[NAME]

    @property
    def where(self) -> str:
        return "container %s" % self.handle.name

    @property
    def alive(self) -> bool:
        return self.handle.status not in ENDED

    @property
    def exit_code(self) -> Optional[int]:
        """None while it has not ended."""
        return None if self.alive else int(self.handle.attrs["State"]["ExitCode"])

    @property
    def how(self) -> str:
        return " with code %s" % self.exit_code

    @property
    def killed_for_memory(self) -> bool:
        return bool(self.handle.attrs["State"].get("OOMKilled"))

    @property
    def log(self) -> str:
        """Where ``keep_log`` puts what it has said."""
        return str(state.log_file(self.port))

    def routes(self) -> str:
        if self.engine == "vllm":
            return "openai"
        return "tgi-0.8" if version_of(self.version) < (1, 4) else "tgi"

    def document(self) -> Dict[str, Any]:
        image = self.handle.attrs["Config"]["Image"]
        return {
            "model": self.model, "engine": self.engine, "version": self.version, "port": self.port, "url": self.url,
            "container": self.handle.name, "image": image, "log": "docker logs %s" % self.handle.name,
            "try": curl_lines(self.url, self.keyed, self.routes(), self.served_name),
        }  # fmt: skip

    def lines(self) -> Iterator[str]:
        """All it has said and goes on to say, line by line, until it ends."""
        timeout, self.client.api.timeout = self.client.api.timeout, None  # it may be silent for hours
        try:
            with answering():
                yield from self._lines()
        finally:
            self.client.api.timeout = timeout

    def _lines(self) -> Iterator[str]:
        rest, before = b"", ""
        for part in self.handle.logs(stream=True, follow=True):
            *whole, rest = (rest + part).split(b"\n")
            for line in whole:
                shown = _text(before.encode() + line.rstrip(b"\r"))[len(before) :]
                before = "api_key: Some(\n" if shown.rstrip().endswith("api_key: Some(") else ""
                yield shown + "\n"
        if rest:
            yield _text(rest) + "\n"

    @answering()
    def said(self, lines: Any = "all") -> str:
        return _text(self.handle.logs(tail=lines))

    def keep_log(self) -> str:
        """Write what it has said where it outlives the container -> the file's path."""
        Path(self.log).write_text(self.said(), encoding="utf-8")
        return self.log

    @answering()
    def wait(self) -> int:
        """Until it has ended -> exit code."""
        self.client.api.timeout, timeout = None, self.client.api.timeout
        try:
            code = int(self.handle.wait()["StatusCode"])
            self.handle.reload()
            return code
        finally:
            self.client.api.timeout = timeout

    @answering()
    def stop(self) -> int:
        """SIGTERM; running requests are finished first. Its log is kept, itself removed. -> exit code"""
        self.handle.stop(timeout=STOP_S)
        self.handle.reload()
        code = self.exit_code
        self.remove()
        return 0 if code in (None, ASKED) else code

    @answering()
    def remove(self) -> None:
        """One that has ended, or was never started."""
        self.keep_log()
        self.handle.remove()


@answering()
def find(client: Any, port: int) -> Optional[Found]:
    """The container of ours for this port, living or ended."""
    handles = client.containers.list(all=True, filters={"label": ["%s=%d" % (PORT, port), IDENTITY]}, ignore_removed=True)
    found = [Found(client, handle) for handle in handles]
    return next((one for one in found if one.alive), found[0] if found else None)


def _text(data: bytes) -> str:
    text = COLOURS.sub("", data.decode("utf-8", errors="replace")).replace("\r\n", "\n").replace("\r", "\n")
    return KEY.sub(r"\1***", text)
