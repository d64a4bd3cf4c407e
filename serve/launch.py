"""Start a server, wait until it is healthy, and say why when it is not. This version has one engine: embedded.

running = launch("exports/my-model", port=8082)     # returns when /health answers; a child process
running.stop()
"""

import os
import shlex
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Callable, List, Optional, Sequence

import requests

from pipeline_train.errors import RunFailed, UserError

from . import state
from .proved import check_proof
from .state import Running

ENGINES = ("embedded",)
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model", "vocab.txt")
WEIGHTS = ("*.safetensors", "*.bin")
DRAIN_S = 95.0  # a little more than the server gives requests under way


class Server:
    """A running child: ``state`` says where, ``wait`` until it ends, ``stop`` makes it end."""

    def __init__(self, process: "subprocess.Popen[bytes]", running: Running) -> None:
        self.process, self.state = process, running

    def wait(self, timeout: Optional[float] = None) -> int:
        return self.process.wait(timeout)

    def stop(self) -> int:
        """SIGTERM; running requests are finished first. -> exit code"""
        self.process.terminate()
        code = self.process.wait(DRAIN_S)
        state.forget(self.state.port)
        return code


def launch(
    model: str,
    engine: str = "embedded",
    port: int = 8082,
    host: str = "127.0.0.1",
    api_key: Optional[str] = None,
    flags: Sequence[str] = (),
    progress: Callable[[str], None] = lambda line: None,
    timeout: float = 1800.0,
    own_session: bool = False,
    need_proof: bool = True,
) -> Server:
    """Check the folder, start, wait for health. ``flags``: more flags of ``python -m serve.embedded``; ``progress`` is told what
    goes on, about once a second; ``own_session``: the server survives the caller's terminal; ``need_proof`` False: an export
    whose proof is missing, failed or stale is served with a warning. UserError or RunFailed."""
    check(model, engine, port, host)
    check_proof(model, progress, need_proof)
    log = state.log_file(port)
    command = [sys.executable, "-m", "serve.embedded", "--model-id", model, "--port", str(port), "--hostname", host, *flags]
    command.append("--proof-checked")
    environment = {**os.environ, "PYTHONPATH": _python_path(), "PYTHONUNBUFFERED": "1"}
    environment.pop("API_KEY", None)
    if api_key:
        environment["API_KEY"] = api_key  # not on the command line, which everybody can read
    with open(log, "wb") as out:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=environment, start_new_session=own_session
        )
    running = Running(process.pid, state.birth(process.pid), port, url_of(host, port), str(Path(model).resolve()), engine, str(log))
    state.write(running)
    try:
        _wait_until_healthy(process, running, progress, timeout)
    except BaseException:
        if process.poll() is None:
            process.terminate()
            process.wait(DRAIN_S)
        state.forget(port)
        raise
    return Server(process, running)


def check(model: str, engine: str, port: int, host: str) -> None:
    """Everything that can be known to go wrong before a process starts; UserError."""
    if engine not in ENGINES:
        raise UserError("--engine %s: this version has the embedded engine only" % engine)
    check_model(model)
    known = state.read(port)
    if known is not None:
        raise UserError(
            "port %d: already served (%s, pid %d); stop it with pipedock serve --stop --port %d"
            % (port, known.model, known.pid, port)
        )
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except (OSError, OverflowError) as error:
            raise UserError(
                "cannot listen on %s port %d: %s; choose another --port or --host"
                % (host, port, getattr(error, "strerror", None) or error)
            )


def check_model(model: str) -> None:
    """A folder that transformers can load."""
    path = Path(model)
    if not path.is_dir():
        raise UserError("--model %s: no such folder" % model)
    if (path / "manifest.json").is_file() and not any(path.glob("model*.safetensors")):
        raise UserError(
            "--model %s: pipeline weights; export them first: pipedock to-hf --input %s --output DIR" % (model, shlex.quote(model))
        )
    if not (path / "config.json").is_file():
        raise UserError("--model %s: no config.json; expected a Hugging Face model folder (pipedock to-hf writes one)" % model)
    if not any((path / name).is_file() for name in TOKENIZERS):
        raise UserError("--model %s: no tokenizer (none of %s)" % (model, ", ".join(TOKENIZERS)))
    if not any(next(path.glob(pattern), None) for pattern in WEIGHTS):
        raise UserError("--model %s: no weights (*.safetensors or *.bin)" % model)


def url_of(host: str, port: int) -> str:
    """Where this machine reaches a server that listens on ``host``."""
    reached = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, "[%s]" % host if ":" in host else host)
    return "http://%s:%d" % (reached, port)


def curl_lines(url: str, api_key: bool = False) -> List[str]:
    """Commands to try the server with."""
    key = " -H 'Authorization: Bearer KEY'" if api_key else ""
    head = "curl %s/%s -X POST -H 'Content-Type: application/json'%s -d '%s'"
    body = '{"inputs":"Hello","parameters":{"max_new_tokens":20}}'
    chat = '{"messages":[{"role":"user","content":"Hello"}],"max_tokens":20,"temperature":0}'
    return [
        head % (url, "generate", key, body),
        head.replace("curl", "curl -N") % (url, "generate_stream", key, body),
        head % (url, "v1/chat/completions", key, chat),
    ]


def healthy(url: str) -> bool:
    with requests.Session() as session:
        session.trust_env = False  # no proxy between this machine and itself
        try:
            return session.get(url + "/health", timeout=5).status_code == 200
        except requests.RequestException:
            return False


def tail(log: str, lines: int = 20) -> str:
    try:
        return "\n".join(Path(log).read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])
    except OSError:
        return "(no log)"


def _wait_until_healthy(
    process: "subprocess.Popen[bytes]", running: Running, progress: Callable[[str], None], timeout: float
) -> None:
    started, said = time.monotonic(), 0
    while True:
        code = process.poll()
        if code is not None:
            last = tail(running.log, 1)
            if last.startswith("serve: "):  # its own words
                raise (UserError if code == 2 else RunFailed)(last[len("serve: ") :])
            raise RunFailed(
                "the server ended with code %d before it was ready; the end of %s:\n%s" % (code, running.log, tail(running.log))
            )
        if healthy(running.url):
            return
        passed = time.monotonic() - started
        if passed > timeout:
            raise RunFailed("not healthy after %d s; the end of %s:\n%s" % (timeout, running.log, tail(running.log)))
        if int(passed) > said:
            said = int(passed)
            progress("loading %s ... %d s" % (running.model, said))
        time.sleep(0.1)


def _python_path() -> str:
    """This repository first, so that the child finds ``serve`` from any working folder."""
    here = str(Path(__file__).resolve().parent.parent)
    return os.pathsep.join([here] + [part for part in os.environ.get("PYTHONPATH", "").split(os.pathsep) if part])
