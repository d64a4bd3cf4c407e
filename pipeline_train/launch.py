"""Starts one process per rank and answers for them: they stay in this process group and all end together, whatever happens.

SIGTERM: save and stop. SIGUSR1: save and go on. Ctrl-C, or any second signal: end now; what was saved is kept.
"""

import errno
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Tuple

from .errors import RunFailed, Stopped, UserError
from .prepare import Prepared
from .pulse import FAILED, SHARED, Board
from .watch import Watch
from .worker import PARENT, PROGRESS

SETTLE_S = 2.0  # after the first failure: its neighbours fail too, and the first cause must be found among them
LOOK_S = 1.0  # between two looks at the ranks' signs of life
DUMP_S = 1.0  # for the stacks of the ranks that are left
# What a rank says when another one has gone: never the cause.
ECHOES = ("Connection closed", "Connection reset", "Broken pipe", "gloo", "NCCL", "ProcessGroup", "TCPStore", "recvValue")

Show = Callable[[Dict[str, Any]], None]  # takes rank 0's progress messages


def launch(prepared: Prepared, show: Show) -> Dict[str, Any]:
    """Train; -> the summary of loop.Loop. Raises RunFailed with the failing rank's one line, KeyboardInterrupt after Ctrl-C."""
    command = [sys.executable, "-m", "pipeline_train.worker", "--out", str(prepared.out.resolve())]
    command += ["--total-steps", str(prepared.total)]
    if prepared.resume is not None:
        command += ["--resume", str(prepared.resume.resolve())]
    world = prepared.config.world
    env, hang_s = environment(world, prepared.gpus), prepared.config.run.hang_s
    return supervise(Ranks(command, world, env, prepared.out / "logs", show, hang_s))


def supervise(ranks: "Ranks") -> Dict[str, Any]:
    """Start them, wait for them, and leave none behind."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    before = [(number, signal.signal(number, ranks.on_signal)) for number in numbers]
    try:
        ranks.start()
        return ranks.wait()
    finally:
        ranks.end()
        for number, handler in before:
            signal.signal(number, handler)
        ranks.board.close()  # only now: the handlers use it


class Ranks:
    """The processes of one run on this machine: ``command`` in ``world`` copies that differ in RANK and LOCAL_RANK.

    ``hang_s``: see Watch."""

    def __init__(self, command: List[str], world: int, env: Dict[str, str], logs: Path, show: Show, hang_s: float = 40.0) -> None:
        self.command, self.world, self.env, self.logs, self.show = command, world, env, logs, show
        self.board, self.watch = Board.make(world), Watch(hang_s, time.monotonic)
        self.looked = 0.0
        self.processes: List[subprocess.Popen] = []
        self.signal: Optional[int] = None
        self.now = False  # the signal does not wait for a save
        self.progress = -1  # reading end of rank 0's pipe
        self.unread = b""
        self.summary: Optional[Dict[str, Any]] = None

    def on_signal(self, number: int, frame: Any) -> None:
        if number == signal.SIGUSR1:
            self.board.wish_save()
        elif number == signal.SIGTERM and self.signal is None and self._trained():
            self.board.wish_stop()
            self.signal = number
        else:  # Ctrl-C, a second signal, or nothing to save yet
            self.signal, self.now = number, True

    def start(self) -> None:
        self.progress, writing = os.pipe()
        os.set_blocking(self.progress, False)
        try:
            for rank in range(self.world):
                if self._error_file(rank).exists():
                    self._error_file(rank).unlink()
                env = dict(self.env, RANK=str(rank), LOCAL_RANK=str(rank))
                env.update({PROGRESS: str(writing), SHARED: str(self.board.fd)})
                keep = (self.board.fd, writing) if rank == 0 else (self.board.fd,)
                with open(str(self._log_file(rank)), "ab") as log:
                    process = subprocess.Popen(
                        self.command, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log, pass_fds=keep
                    )
                self.processes.append(process)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.ENOMEM):
                raise RunFailed(
                    "rank %d cannot be started: %s (a limit on processes or memory?)" % (rank, error.strerror)
                ) from None
            raise UserError("run.out: %s: cannot be written: %s" % (error.filename or self.logs, error.strerror)) from None
        finally:
            os.close(writing)

    def wait(self) -> Dict[str, Any]:
        with selectors.DefaultSelector() as selector:
            selector.register(self.progress, selectors.EVENT_READ)
            while True:
                if selector.select(timeout=0.2) and not self._read_progress():
                    selector.unregister(self.progress)  # rank 0 closed it
                    break
                if self._failed() or self.now:
                    break
                self._look()
        while self._running() and not self._failed() and not self.now:
            self._look()
            time.sleep(0.05)
        name = signal.Signals(self.signal).name if self.signal is not None else "a signal"
        if self.now and self.signal == signal.SIGINT:
            raise KeyboardInterrupt
        if self.now:
            raise Stopped("stopped by %s" % name)
        if self._failed() or self.summary is None:
            raise RunFailed(self._cause())
        if self.summary.get("stopped"):
            raise Stopped("stopped by %s after saving step %d" % (name, self.summary["steps"]))
        return self.summary

    def end(self) -> None:
        """SIGKILL: a rank has nothing to tidy up, a save that is cut short is made again. Returns when no process is left."""
        for process in self._running():
            process.kill()
        for process in self.processes:
            process.wait()
        if self.progress >= 0:
            os.close(self.progress)
            self.progress = -1

    def _trained(self) -> bool:
        """Has every rank done a step since it was started?"""
        return all(self.board.sign(rank).steps for rank in range(self.world))

    def _look(self) -> None:
        """Raises RunFailed when a rank has stopped answering or none gets on."""
        if time.monotonic() - self.looked < LOOK_S:
            return
        self.looked = time.monotonic()
        trouble = self.watch.look([self.board.sign(rank) for rank in range(self.world)])
        if trouble is not None:
            self._dump_stacks()
            raise RunFailed("%s. Logs: %s%s" % (trouble, self.logs / "rank_*.log", self._dump_stacks()))

    def _dump_stacks(self) -> str:
        """Let every rank that is left write its stacks; -> where they are. One that somebody has stopped cannot, and is not woken:
        the run would go on for that moment."""
        left = [rank for rank in self._left() if self.board.sign(rank).beats]
        for rank in left:  # a rank listens before its first beat
            self.processes[rank].send_signal(signal.SIGUSR2)
        time.sleep(DUMP_S if left else 0.0)
        sizes = {path.name: path.stat().st_size for path in self.logs.glob("rank_*.stacks")}
        left = [rank for rank in left if sizes.get("rank_%d.stacks" % rank)]
        return ", stacks of %s: %s" % (_ranks(left), self.logs / "rank_*.stacks") if left else ""

    def _log_file(self, rank: int) -> Path:
        return self.logs / ("rank_%d.log" % rank)

    def _error_file(self, rank: int) -> Path:
        return self.logs / ("rank_%d.error" % rank)

    def _running(self) -> List[subprocess.Popen]:
        return [p for p in self.processes if p.poll() is None]

    def _left(self) -> List[int]:
        failed = self._failed()
        return [rank for rank, p in enumerate(self.processes) if p.poll() is None and rank not in failed]

    def _failed(self) -> List[int]:
        """Ranks that have ended badly, or have left their error and wait to be ended."""
        return [r for r, p in enumerate(self.processes) if p.poll() or (p.poll() is None and self.board.sign(r).doing == FAILED)]

    def _read_progress(self) -> bool:
        """Pass on whole lines; False when the other end is closed."""
        data = os.read(self.progress, 1 << 16)
        lines = (self.unread + data).split(b"\n")
        self.unread = lines.pop()
        for line in lines:
            message = json.loads(line)
            if "done" in message:
                self.summary = message["done"]
            else:
                self.show(message)
        return bool(data)

    def _cause(self) -> str:
        """The first cause among the failed ranks: a rank that was killed, then an error of its own, then an echo of another's."""
        stacks = self._dump_stacks()
        deadline = time.monotonic() + SETTLE_S
        while self._left() and time.monotonic() < deadline:
            time.sleep(0.05)
        failed = self._failed()
        if not failed:
            return "rank 0 ended without a summary. Log: %s" % self._log_file(0)
        _, rank, line = min(self._judge(rank) for rank in failed)
        return "rank %d: %s. Log: %s%s" % (rank, line.rstrip("."), self._log_file(rank), stacks)

    def _judge(self, rank: int) -> Tuple[int, int, str]:
        code = self.processes[rank].returncode
        if code is not None and code < 0:
            name = signal.Signals(-code).name
            hint = " (out of memory? the kernel's log says)" if -code == signal.SIGKILL else ""
            return 0, rank, "was killed by %s%s" % (name, hint)
        error = self._error_file(rank)
        line = error.read_text(encoding="utf-8", errors="replace").strip() if error.is_file() else ""
        line = line or self.board.sign(rank).error or "ended with exit code %s" % code
        return (2 if any(echo in line for echo in ECHOES) else 1), rank, line


def environment(world: int, gpus: int) -> Dict[str, str]:
    """What all ranks of this machine have in common; what the user has set stays."""
    env = dict(os.environ)
    root = str(Path(__file__).resolve().parents[1])
    env["PYTHONPATH"] = os.pathsep.join([root] + ([env["PYTHONPATH"]] if env.get("PYTHONPATH") else []))
    env.update(WORLD_SIZE=str(world), LOCAL_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(_free_port()))
    env.update({PARENT: str(os.getpid()), "PYTHONUNBUFFERED": "1"})
    env.setdefault("OMP_NUM_THREADS", str(max(1, _cores() // world)))
    if not gpus:
        env["DS_ACCELERATOR"] = "cpu"
        # glibc gives every large tensor back to the kernel and faults it in again: a quarter of a step's time. Keeping them
        # costs about a fifth more memory.
        env.setdefault("MALLOC_MMAP_THRESHOLD_", str(1 << 30))
        env.setdefault("MALLOC_TRIM_THRESHOLD_", str(1 << 33))
    return env


def _ranks(numbers: List[int]) -> str:
    return "rank %d" % numbers[0] if len(numbers) == 1 else "ranks " + ", ".join(map(str, numbers))


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
