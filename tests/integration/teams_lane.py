"""Launchers of two nodes and their ranks: everything ends on both, with the same cause. Launchers are processes here, ranks small
scripts; for ci/nodes.sh, where nodes_lane.py kills real ones."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.free_port import free_port

ROOT = Path(__file__).resolve().parents[2]
HEAD = """
import json, os, signal, sys, time
sys.path.insert(0, %r)
rank, logs, all_logs = int(os.environ["RANK"]), %r, %r
open(logs + "/pid_%%d" %% rank, "w").write(str(os.getpid()))
def done(**more): os.write(int(os.environ["PIPEDOCK_PROGRESS"]), json.dumps({"done": dict(more, steps=3)}).encode() + b"\\n")
def error(line): open(logs + "/rank_%%d.error" %% rank, "w").write(line + "\\n"); os._exit(1)
def ready(what): open(logs + "/%%s_%%d" %% (what, rank), "w").close()
def others():
    while sum(os.path.exists(path + "/pid_%%d" %% r) for path in all_logs for r in range(3)) < 3: time.sleep(0.01)
"""
LAUNCHER = """
import sys
sys.path.insert(0, %r)
from pathlib import Path
from pipeline_train import launch, link
from pipeline_train.control import Channel
from pipeline_train.place import Node, Place
from pipeline_train.team import Team
link.SILENT_S, launch.VERDICT_S = float(sys.argv[6]), float(sys.argv[5])
node, port, logs, body = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4]
channel = Channel.open(node, 2, "127.0.0.1", port, "ab"[node], 30.0, print)
place = Place(node, (Node("a", (0,)), Node("b", (1, 2))), False)
command = [sys.executable, "-c", body]
ranks = launch.Ranks(command, 3, launch.environment(3, 0, len(place.ranks)), logs, lambda message: None, 40.0, Team(place, channel))
try:
    print("summary", launch.supervise(ranks))
    channel.close()
except BaseException as error:
    channel.close(error)
    print("%%s: %%s" %% (type(error).__name__, error))
    sys.exit(1)
"""


class Run:
    """Both launchers with the same ``body`` for all three ranks."""

    def __init__(self, folder, body, verdict_s="20", hang="", silent_s="20"):
        self.logs = [folder / "a", folder / "b"]
        port = free_port()
        self.launchers = []
        for node, logs in enumerate(self.logs):
            logs.mkdir()
            head = HEAD % (str(ROOT), str(logs), [str(path) for path in self.logs])
            code = LAUNCHER % str(ROOT)
            code = code.replace('print("summary"', hang + 'print("summary"') if node == 0 else code
            line = [sys.executable, "-c", code, str(node), str(port), str(logs), head + body, verdict_s, silent_s]
            self.launchers.append(subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))

    def started(self):
        self.until(lambda: len(self.pids()) == 3)
        return self

    def ready(self, what, ranks=3):
        """Once so many ranks have said so."""
        self.until(lambda: sum(len(list(logs.glob(what + "_*"))) for logs in self.logs) == ranks)
        return self

    def until(self, there):
        deadline = time.monotonic() + 30
        while not there():
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def pids(self):
        """rank -> process."""
        paths = [path for logs in self.logs for path in logs.glob("pid_*") if path.read_text()]
        return {int(path.name[4:]): int(path.read_text()) for path in paths}

    def end(self):
        """-> the last line of each. No rank may be left."""
        try:
            said = [one.communicate(timeout=60)[0].strip().splitlines()[-1:] for one in self.launchers if not one.stdout.closed]
        finally:
            for launcher in self.launchers:
                launcher.kill()
        deadline = time.monotonic() + 10
        while any(Path("/proc/%d" % pid).exists() for pid in self.pids().values()):
            assert time.monotonic() < deadline, "a rank is left"
            time.sleep(0.02)
        return [lines[0] if lines else "" for lines in said]


def test_rank_0s_summary_ends_both_when_all_ranks_have_ended(tmp_path):
    run = Run(tmp_path, "if rank == 0: done()\nif rank == 2: time.sleep(2)")
    assert run.end() == ["summary {'steps': 3}"] * 2


def test_a_stop_that_was_wished_for_is_told_with_its_signal(tmp_path):
    body = "from pipeline_train.pulse import Pulse\npulse = Pulse.inherited(); pulse.start_beating(); pulse.step_done(3)\n"
    body += "ready('stepped')\nstop = logs + '/../stop'\n"
    body += "while not os.path.exists(stop):\n    time.sleep(0.02)\n    if pulse.wishes()[0]: open(stop, 'w').close()\n"
    body += "if rank == 0: done(stopped=True)"
    run = Run(tmp_path, body).ready("stepped")
    run.launchers[1].send_signal(signal.SIGTERM)
    assert run.end() == ["Stopped: stopped by SIGTERM on node 1 (b) after saving step 3"] * 2


def test_a_wish_to_save_of_another_node_comes_to_node_0(tmp_path):
    body = "from pipeline_train.pulse import Pulse\npulse = Pulse.inherited(); pulse.start_beating(); pulse.step_done(3)\n"
    body += "stop = logs + '/../stop'\n"
    body += "ready('stepped')\n"
    body += "if rank == 0:\n    while pulse.wishes() != (0, 1): time.sleep(0.02)\n    ready('wished')\n"
    body += "    while pulse.wishes() != (0, 2): time.sleep(0.02)\n    open(stop, 'w').close()\n    done()\n"
    run = Run(tmp_path, body + "while not os.path.exists(stop): time.sleep(0.02)").ready("stepped")
    run.launchers[1].send_signal(signal.SIGUSR1)
    run.ready("wished", ranks=1)
    run.launchers[1].send_signal(signal.SIGUSR1)
    assert run.end() == ["summary {'steps': 3}"] * 2


def test_a_rank_that_fails_on_another_node_is_the_cause_not_the_echo_here(tmp_path):
    body = "others()\nif rank == 2: error('disk full.')\n"
    body += "if rank == 0: time.sleep(0.2); error('Connection closed by peer')\ntime.sleep(60)"
    lines = Run(tmp_path, body).end()
    assert lines == ["Verdict: rank 2 on node 1 (b): disk full. Log: b:%s" % (tmp_path / "b" / "rank_2.log"),
                     "RunFailed: rank 2 on node 1 (b): disk full. Log: b:%s" % (tmp_path / "b" / "rank_2.log")]  # fmt: skip


def test_a_rank_that_is_killed_on_another_node(tmp_path):
    run = Run(tmp_path, "others()\ntime.sleep(60)").started()
    os.kill(run.pids()[1], signal.SIGKILL)
    lines = run.end()
    assert lines[0].startswith("Verdict: rank 1 on node 1 (b): was killed by SIGKILL (out of memory?")
    assert lines[1] == "RunFailed: " + lines[0][len("Verdict: ") :]


@pytest.mark.parametrize("victim", [0, 1])
def test_a_launcher_that_is_killed_is_named_by_the_other(tmp_path, victim):
    body = "from pipeline_train.worker import die_with_parent\ndie_with_parent()\nready('bound')\nothers()\ntime.sleep(60)"
    run = Run(tmp_path, body).ready("bound")
    began = time.monotonic()
    run.launchers[victim].kill()
    line = run.end()[1 - victim]
    assert line.startswith("NodeGone: node %d (%s) is gone: its connection was closed" % (victim, "ab"[victim]))
    assert time.monotonic() - began < 20


def test_echoes_wait_for_a_silent_node_to_be_given_up(tmp_path):
    """Node 1 is frozen, launcher and ranks; a rank here notices its broken connection first."""
    body = "others()\nif rank == 0:\n    while not os.path.exists(logs + '/frozen'): time.sleep(0.02)\n"
    body += "    time.sleep(2); error('Connection reset by peer')\ntime.sleep(60)"
    run = Run(tmp_path, body, silent_s="6").started()
    time.sleep(1.0)
    frozen = [run.launchers[1].pid, run.pids()[1], run.pids()[2]]
    for pid in frozen:
        os.kill(pid, signal.SIGSTOP)
    (tmp_path / "a" / "frozen").touch()
    line = run.launchers[0].communicate(timeout=40)[0].strip().splitlines()[-1]
    for pid in reversed(frozen):  # a launcher that wakes kills its ranks
        os.kill(pid, signal.SIGCONT)
    assert run.launchers[1].wait(40) == 1
    assert line.startswith("NodeGone: node 1 (b) has not answered for 6 s:")


def test_a_launcher_without_a_verdict_ends_by_itself(tmp_path):
    """Node 0's launcher shows that it lives, but its main thread hangs."""
    run = Run(tmp_path, "if rank == 2: error('disk full')\ntime.sleep(60)", "2", "import time; time.sleep(60); ")
    line = run.launchers[1].communicate(timeout=40)[0].strip().splitlines()[-1]
    run.launchers[0].kill()
    run.end()
    assert line == "Verdict: rank 2 on node 1 (b): disk full. Log: b:%s" % (tmp_path / "b" / "rank_2.log")
