"""Starts one process per rank and answers for them: they stay in this process group and all end together, whatever happens.

SIGTERM: save and stop. SIGUSR1: save and go on. Ctrl-C, or any second signal: end now; what was saved is kept. On several nodes
each launcher starts its node's ranks; a signal to any of them counts for all.
"""

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional

from . import host, network
from .control import NodeGone
from .errors import RunFailed, Stopped
from .link import SILENT_S
from .place import Place
from .prepare import Prepared
from .processes import ECHO, Processes
from .pulse import Board
from .team import Elsewhere, Team
from .watch import Watch
from .worker import PARENT

SETTLE_S = 2.0  # after the first failure: its neighbours fail too, and the first cause must be found among them
LOOK_S = 1.0  # between two looks at the ranks' signs of life
QUIET_S = 3.0  # a node that has shown nothing for so long may be the cause of what others complain about
VERDICT_S = SILENT_S + 15.0  # for node 0 to find the cause of what has failed here

Show = Callable[[Dict[str, Any]], None]  # takes rank 0's progress messages


def launch(
    prepared: Prepared, show: Show, team: Optional[Team] = None, addresses: Optional[Dict[str, str]] = None,
    finish: Optional[str] = None,
) -> Dict[str, Any]:  # fmt: skip
    """Train; -> the summary of loop.Loop, on every node. ``addresses``: where and how the ranks of several nodes meet, in their
    environment. ``finish``: "module:function" that all ranks call with their Pipeline when they have trained. Raises RunFailed with
    the failing rank's one line, NodeGone, KeyboardInterrupt after Ctrl-C."""
    command = [sys.executable, "-m", "pipeline_train.worker", "--out", str(prepared.out.resolve())]
    command += ["--run", prepared.file.name, "--total-steps", str(prepared.total)]
    if prepared.resume is not None:
        command += ["--resume", str(prepared.resume.resolve())]
    if finish is not None:
        command += ["--finish", finish]
    world = prepared.config.world
    team = team or Team(Place.alone(world))
    env = environment(world, prepared.gpus, len(team.place.ranks))
    env.update(addresses or {}, **team.place.environment())
    return supervise(Ranks(command, world, env, prepared.out / "logs", show, prepared.config.run.hang_s, team))


def supervise(ranks: "Ranks") -> Dict[str, Any]:
    """Start them, wait for them, and leave none behind."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    before = [(number, signal.signal(number, ranks.on_signal)) for number in numbers]
    try:
        ranks.local.start()
        return ranks.wait()
    finally:
        ranks.local.end()
        for number, handler in before:
            signal.signal(number, handler)
        ranks.board.close()  # only now: the handlers use it


class Ranks:
    """One run: ``command`` in ``world`` copies, of which this launcher has those that ``team`` says (None: all are here).

    ``hang_s``: see Watch."""

    def __init__(
        self, command: List[str], world: int, env: Dict[str, str], logs: Path, show: Show, hang_s: float = 40.0,
        team: Optional[Team] = None,
    ) -> None:  # fmt: skip
        self.world, self.logs, self.show = world, logs, show
        self.team = team or Team(Place.alone(world))
        self.board, self.watch = Board.make(world), Watch(hang_s, time.monotonic, self.team.named)
        self.local = Processes(command, self.team.place.ranks, env, logs, self.board)
        self.looked = 0.0
        self.signal: Optional[int] = None
        self.saves = 0  # wished for here
        self.now = False  # the signal does not wait for a save
        self.summary: Optional[Dict[str, Any]] = None

    def on_signal(self, number: int, frame: Any) -> None:
        if self.team.troubled():  # this run ends already; the channel wakes a busy launcher by a signal
            return
        if number == signal.SIGUSR1:
            self.saves += 1
            if self.team.leads:
                self.board.wish_save()
        elif number == signal.SIGTERM and self.signal is None and self.local.trained():
            self.board.wish_stop()
            self.signal = number
        else:  # Ctrl-C, a second signal, or nothing to save yet
            self.signal, self.now = number, True

    def wait(self) -> Dict[str, Any]:
        while self.summary is None or self.local.running() or self._elsewhere().running or not self.team.leads:
            for message in self.local.read(0.2 if self.local.listening else 0.05):
                if "done" in message:
                    self.summary = message["done"]
                else:
                    self.show(message)
            self._raise_now()
            if self.team.leads:
                self._check_all()
            elif self._check_here():
                break
        assert self.summary is not None
        if self.team.leads:
            self.summary["signal"] = self._elsewhere().signal or self._signal_name()
            self.team.tell(self.summary)
        by = self.summary.pop("signal")
        if self.summary.get("stopped"):
            self.team.settle()
            raise Stopped("stopped by %s after saving step %d" % (by, self.summary["steps"]))
        return self.summary

    def _raise_now(self) -> None:
        if self.now and self.signal == signal.SIGINT:
            raise KeyboardInterrupt
        if self.now:
            raise Stopped("stopped by %s" % self._signal_name())

    def _signal_name(self) -> str:
        return signal.Signals(self.signal).name if self.signal is not None else "a signal"

    def _check_all(self) -> None:
        """Node 0: raises what ends the run."""
        self.team.check()
        silent_end = self.summary is None and not self.local.running() and not self.local.listening
        if self.local.failed() or self._elsewhere().failures or silent_end:
            raise self._cause()
        self._look()

    def _check_here(self) -> bool:
        """Every other node: show node 0 how it is here -> whether the run has come to its end. Raises what ends it otherwise."""
        self.summary = self.team.verdict()
        if self.summary is not None:
            return True
        failures = self.local.failures()
        if failures:
            self.local.dump_stacks()
            self._wait_for_verdict()
        try:
            self.team.check()
        except NodeGone:
            raise
        except RunFailed:
            self.local.dump_stacks()
            raise
        self._post()
        return False

    def _wait_for_verdict(self) -> None:
        """Node 0 hears of the others' failures too. Raises its verdict, or after a while what has failed here."""
        until = time.monotonic() + VERDICT_S
        while time.monotonic() < until:
            self._post()
            self.team.check()
            self._raise_now()
            time.sleep(0.1)
        raise self.team.failed(self.team.line(min(self.local.failures()), ""))

    def _post(self) -> None:
        name = self._signal_name() if self.signal is not None else None
        local = self.local
        self.team.post(self.board, Elsewhere(local.failures(), len(local.running()), len(local.left()), name, self.saves))

    def _elsewhere(self) -> Elsewhere:
        return self.team.look(self.board) if self.team.leads else Elsewhere()

    def _look(self) -> None:
        """Raises RunFailed when a rank has stopped answering or none gets on."""
        if time.monotonic() - self.looked < LOOK_S:
            return
        self.looked = time.monotonic()
        trouble = self.watch.look([self.board.sign(rank) for rank in range(self.world)])
        if trouble is not None:
            self.local.dump_stacks()
            where = "%s%s" % (self.logs / "rank_*.log", " on every node" if self.team.others else "")
            raise self.team.failed("%s. Logs: %s%s" % (trouble, where, self.local.dump_stacks()))

    def _cause(self) -> RunFailed:
        """The first cause among the failed ranks: a rank that was killed, then an error of its own, then an echo of another's. A
        node that has gone silent meanwhile explains the echoes better: raises NodeGone when it is given up."""
        stacks = self.local.dump_stacks()
        began = time.monotonic()
        while True:
            elsewhere = self._elsewhere()
            failures = elsewhere.failures + self.local.failures()
            left = elsewhere.left + len(self.local.left())
            waited = time.monotonic() - began
            only_echoes = bool(failures) and min(failures).kind == ECHO
            if not (left and waited < SETTLE_S or only_echoes and self.team.silent(QUIET_S) and waited < VERDICT_S):
                break
            if only_echoes:
                self.team.check()
            self._raise_now()
            time.sleep(0.05)
        if not failures:
            return self.team.failed("rank 0 ended without a summary. Log: %s" % self.local.log_file(0))
        return self.team.failed(self.team.line(min(failures), stacks))


def environment(world: int, gpus: int, here: Optional[int] = None) -> Dict[str, str]:
    """What all ranks of this machine have in common; what the user has set stays. ``here``: how many of them there are."""
    here = here or world
    env = dict(os.environ)
    root = str(Path(__file__).resolve().parents[1])
    env["PYTHONPATH"] = os.pathsep.join([root] + ([env["PYTHONPATH"]] if env.get("PYTHONPATH") else []))
    env.update(WORLD_SIZE=str(world), LOCAL_SIZE=str(here), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(network.free_port()))
    env.update({PARENT: str(os.getpid()), "PYTHONUNBUFFERED": "1"})
    env.setdefault("OMP_NUM_THREADS", str(max(1, _cores() // here)))
    # Compiled kernels are found again by the next run; torch's own place is the temporary folder.
    cache = host.cache_folder()
    if cache is not None:
        env.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache / "compiled"))
    if not gpus:
        env["DS_ACCELERATOR"] = "cpu"
        # glibc gives every large tensor back to the kernel and faults it in again: a quarter of a step's time. Keeping them
        # costs about a fifth more memory.
        env.setdefault("MALLOC_MMAP_THRESHOLD_", str(1 << 30))
        env.setdefault("MALLOC_TRIM_THRESHOLD_", str(1 << 33))
    return env


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
