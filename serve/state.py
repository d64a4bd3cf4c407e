"""What ``serve`` remembers about a server it started: one small file per port, in the user's runtime or cache folder."""

import json
import os
import signal
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Dict, List, Optional

from pipeline_train.errors import RunFailed, UserError

from .reach import curl_lines, tail

GRACE_S = 90  # for requests under way when a server is asked to stop, TGI's own default
DRAIN_S = GRACE_S + 5.0


@dataclass(frozen=True)
class Running:
    """A server process. ``born``: the kernel's start time of the process, so that a reused pid is not taken for it. ``identity``:
    Settings.identity of what was asked for; ``keyed``: clients need a key."""

    pid: int
    born: str
    port: int
    url: str
    model: str
    engine: str
    log: str
    identity: str = ""
    keyed: bool = False

    @property
    def where(self) -> str:
        return "pid %d" % self.pid

    @property
    def how(self) -> str:
        return ""

    def document(self) -> Dict[str, Any]:
        return {
            "model": self.model, "engine": self.engine, "port": self.port, "url": self.url, "pid": self.pid, "log": self.log,
            "try": curl_lines(self.url, self.keyed),
        }  # fmt: skip

    def said(self) -> str:
        return tail(self.log, None)

    def stop(self) -> int:
        """SIGTERM; running requests are finished first. -> 0, RunFailed when it does not end."""
        if not stop(self, DRAIN_S):
            raise RunFailed("port %d: pid %d still runs after %d s; see %s" % (self.port, self.pid, DRAIN_S, self.log))
        forget(self.port)
        return 0

    @property
    def alive(self) -> bool:
        return birth(self.pid) == self.born


def folder() -> Path:
    """Created, and readable by its owner only. Raises UserError where it cannot be."""
    base = os.environ.get("XDG_RUNTIME_DIR") or os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    path = Path(base) / "pipedock" / "serve"
    try:
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise UserError("%s: cannot be made: %s. What serve has started is noted there; name a folder of yours with "
                        "XDG_RUNTIME_DIR" % (path, error.strerror)) from None  # fmt: skip
    return path


def log_file(port: int) -> Path:
    return folder() / ("%d.log" % port)


def write(running: Running) -> None:
    path = folder() / ("%d.json" % running.port)
    aside = path.with_suffix(".new")
    aside.write_text(json.dumps(asdict(running)), encoding="utf-8")
    aside.replace(path)


def read(port: int) -> Optional[Running]:
    """The living server of this port that we started, else None (what a dead one left behind is removed)."""
    path = folder() / ("%d.json" % port)
    try:
        found = Running(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
    if not found.alive:
        forget(port)
        return None
    return found


def ports() -> List[int]:
    """Where servers that we started run."""
    named = sorted(int(path.stem) for path in folder().glob("*.json") if path.stem.isdigit())
    return [port for port in named if read(port) is not None]


def forget(port: int) -> None:
    (folder() / ("%d.json" % port)).unlink(missing_ok=True)


def birth(pid: int) -> str:
    """When a process was started, as the kernel counts; empty when there is none (a dead child that nobody waited for is none)."""
    try:
        fields = Path("/proc/%d/stat" % pid).read_text(encoding="utf-8", errors="replace").rsplit(")", 1)[1].split()
        return "" if fields[0] == "Z" else fields[19]
    except (OSError, IndexError):
        return _birth_without_proc(pid)


def _birth_without_proc(pid: int) -> str:
    if Path("/proc/self/stat").exists():
        return ""
    try:
        os.kill(pid, 0)
        return "unknown"
    except OSError:
        return ""


def stop(running: Running, seconds: float) -> bool:
    """SIGTERM, then up to ``seconds`` for it to drain and end -> whether it ended."""
    end = time.monotonic() + seconds
    os.kill(running.pid, signal.SIGTERM)
    while running.alive and time.monotonic() < end:
        time.sleep(0.1)
    return not running.alive
