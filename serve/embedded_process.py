"""The embedded server as a process of this machine: started, waited for, stopped."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Callable, Iterator, List

from pipeline_train.errors import RunFailed, UserError

from . import state
from .embedded.parent import PARENT
from .reach import healthy, tail, url_of
from .settings import Settings
from .state import DRAIN_S, Running


class Server:
    """A running child: ``state`` says where."""

    def __init__(self, process: "subprocess.Popen[bytes]", running: Running) -> None:
        self.process, self.state = process, running

    def lines(self) -> Iterator[str]:
        """All that it has said and goes on to say, until it ends."""
        with open(self.state.log, encoding="utf-8", errors="replace") as log:
            while self.process.poll() is None:
                line = log.readline()
                if line:
                    yield line
                else:
                    time.sleep(0.2)
            yield from log

    def wait(self) -> int:
        """Until it has ended -> exit code."""
        code = self.process.wait()
        state.forget(self.state.port)
        return code

    def stop(self) -> int:
        """SIGTERM; running requests are finished first. -> exit code"""
        self.process.terminate()
        code = self.process.wait(DRAIN_S)
        state.forget(self.state.port)
        return code

    def stop_now(self) -> int:
        """Running requests are cut. -> exit code"""
        self.process.send_signal(signal.SIGINT)  # the second one that it gets, which it takes so
        try:
            code = self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            code = self.process.wait()
        state.forget(self.state.port)
        return code

    def ended(self, code: int) -> Exception:
        """What to tell of an end with ``code`` that nobody asked for."""
        how = "was killed by signal %d (by the system, where memory ran out)" % -code if code < 0 else "ended with code %d" % code
        return RunFailed("the server %s; the end of %s:\n%s" % (how, self.state.log, tail(self.state.log)))


def start(settings: Settings, progress: Callable[[str], None], timeout: float, own_session: bool) -> Server:
    """-> a server that has answered. UserError or RunFailed; then nothing of it is left but its log."""
    port, log = settings.port, state.log_file(settings.port)
    command = [sys.executable, "-m", "serve.embedded", "--model-id", settings.model, "--port", str(port)]
    command += ["--hostname", settings.host, *flags_of(settings), "--proof-checked"]
    environment = {**os.environ, "PYTHONPATH": _python_path(), "PYTHONUNBUFFERED": "1"}
    environment.pop("API_KEY", None)
    environment.pop(PARENT, None)
    if not own_session:
        environment[PARENT] = str(os.getpid())
    if settings.api_key:
        environment["API_KEY"] = settings.api_key  # not on the command line, which everybody can read
    with open(log, "wb") as out:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=environment, start_new_session=own_session
        )
    running = Running(
        process.pid, state.birth(process.pid), port, url_of(settings.host, port), settings.folder, settings.engine, str(log),
        settings.identity(), bool(settings.api_key),
    )  # fmt: skip
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


def flags_of(settings: Settings) -> List[str]:
    """As ``python -m serve.embedded`` spells them."""
    given = {
        "--dtype": settings.dtype,
        "--max-concurrent-requests": settings.max_concurrent_requests,
        "--max-input-tokens": settings.max_input_tokens,
        "--max-total-tokens": settings.max_total_tokens,
        "--cors-allow-origin": settings.cors_allow_origin,
    }
    return [part for flag, value in given.items() if value is not None for part in (flag, str(value))] + list(settings.flags)


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
