"""The ranks of a run that this machine has, as processes: start, listen, judge, end. None is left behind."""

import errno
import json
import os
import selectors
import signal
import subprocess
import time
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Sequence

from .errors import RunFailed, UserError
from .pulse import FAILED, SHARED, Board
from .worker import PROGRESS

DUMP_S = 1.0  # for the stacks of the ranks that are left
# What a rank says when another one has gone: never the cause.
ECHOES = ("Connection closed", "Connection reset", "Broken pipe", "gloo", "NCCL", "ProcessGroup", "TCPStore", "recvValue")
KILLED, OWN, ECHO = 0, 1, 2  # a first cause is more likely the smaller its number


class Failure(NamedTuple):
    """``kind``: KILLED, OWN or ECHO. ``line``: what was wrong. ``log``: the rank's."""

    kind: int
    rank: int
    line: str
    log: str


class Processes:
    """``command`` in one copy for each of ``numbers``, ranks of this machine; they differ in RANK and LOCAL_RANK."""

    def __init__(self, command: List[str], numbers: Sequence[int], env: Dict[str, str], logs: Path, board: Board) -> None:
        self.command, self.numbers, self.env, self.logs, self.board = command, tuple(numbers), env, logs, board
        self.by_rank: Dict[int, subprocess.Popen] = {}
        self.progress = -1  # reading end of rank 0's pipe, which is open on every node and closed when nobody writes
        self.listening = True
        self.unread = b""

    def start(self) -> None:
        """Raises RunFailed or UserError when a rank cannot be started."""
        self.progress, writing = os.pipe()
        os.set_blocking(self.progress, False)
        try:
            for local, rank in enumerate(self.numbers):
                if self._error_file(rank).exists():
                    self._error_file(rank).unlink()
                env = dict(self.env, RANK=str(rank), LOCAL_RANK=str(local))
                env.update({PROGRESS: str(writing), SHARED: str(self.board.fd)})
                keep = (self.board.fd, writing) if rank == 0 else (self.board.fd,)
                with open(str(self.log_file(rank)), "ab") as log:
                    self.by_rank[rank] = subprocess.Popen(
                        self.command, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log, pass_fds=keep
                    )
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.ENOMEM):
                raise RunFailed(
                    "rank %d cannot be started: %s (a limit on processes or memory?)" % (rank, error.strerror)
                ) from None
            raise UserError("run.out: %s: cannot be written: %s" % (error.filename or self.logs, error.strerror)) from None
        finally:
            os.close(writing)

    def read(self, wait_s: float) -> List[Dict[str, Any]]:
        """Rank 0's messages that have come within ``wait_s`` seconds; ``listening`` ends when it has closed its end."""
        if not self.listening:
            time.sleep(wait_s)
            return []
        with selectors.DefaultSelector() as selector:
            selector.register(self.progress, selectors.EVENT_READ)
            if not selector.select(timeout=wait_s):
                return []
        data = os.read(self.progress, 1 << 16)
        self.listening = bool(data)
        lines = (self.unread + data).split(b"\n")
        self.unread = lines.pop()
        return [json.loads(line) for line in lines]

    def end(self) -> None:
        """SIGKILL: a rank has nothing to tidy up, a save that is cut short is made again. Returns when no process is left."""
        for rank in self.running():
            self.by_rank[rank].kill()
        for process in self.by_rank.values():
            process.wait()
        if self.progress >= 0:
            os.close(self.progress)
            self.progress, self.listening = -1, False

    def log_file(self, rank: int) -> Path:
        return self.logs / ("rank_%d.log" % rank)

    def running(self) -> List[int]:
        return [rank for rank, process in self.by_rank.items() if process.poll() is None]

    def failed(self) -> List[int]:
        """Ranks that have ended badly, or have left their error and wait to be ended."""
        return [r for r, p in self.by_rank.items() if p.poll() or (p.poll() is None and self.board.sign(r).doing == FAILED)]

    def left(self) -> List[int]:
        """Those that run and have not failed."""
        failed = self.failed()
        return [rank for rank in self.running() if rank not in failed]

    def trained(self) -> bool:
        """Has every rank done a step since it was started?"""
        return bool(self.by_rank) and all(self.board.sign(rank).steps for rank in self.numbers)

    def failures(self) -> List[Failure]:
        return [self._judge(rank) for rank in self.failed()]

    def dump_stacks(self) -> str:
        """Let every rank that is left write its stacks; -> where they are. One that somebody has stopped cannot, and is not woken:
        the run would go on for that moment."""
        left = [rank for rank in self.left() if self.board.sign(rank).beats]
        for rank in left:  # a rank listens before its first beat
            self.by_rank[rank].send_signal(signal.SIGUSR2)
        time.sleep(DUMP_S if left else 0.0)
        sizes = {path.name: path.stat().st_size for path in self.logs.glob("rank_*.stacks")}
        left = [rank for rank in left if sizes.get("rank_%d.stacks" % rank)]
        name = "rank_%d.stacks" % left[0] if len(left) == 1 else "rank_*.stacks"
        return ", stacks of %s: %s" % (_ranks(left), self.logs / name) if left else ""

    def _error_file(self, rank: int) -> Path:
        return self.logs / ("rank_%d.error" % rank)

    def _judge(self, rank: int) -> Failure:
        code, log = self.by_rank[rank].returncode, str(self.log_file(rank))
        if code is not None and code < 0:
            name = signal.Signals(-code).name
            hint = " (out of memory? the kernel's log says)" if -code == signal.SIGKILL else ""
            return Failure(KILLED, rank, "was killed by %s%s" % (name, hint), log)
        error = self._error_file(rank)
        line = error.read_text(encoding="utf-8", errors="replace").strip() if error.is_file() else ""
        line = line or self.board.sign(rank).error or "ended with exit code %s" % code
        return Failure(ECHO if any(echo in line for echo in ECHOES) else OWN, rank, line, log)


def _ranks(numbers: List[int]) -> str:
    return "rank %d" % numbers[0] if len(numbers) == 1 else "ranks " + ", ".join(map(str, numbers))
