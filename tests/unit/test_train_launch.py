"""The supervisor: everything ends together, nothing is left behind, and the first cause is the one that is told.

The ranks here are small scripts; tests/integration/test_train_run.py kills a real one.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline_train import launch
from pipeline_train.errors import RunFailed, UserError

ROOT = Path(__file__).resolve().parents[2]
HEAD = """
import json, os, signal, sys, time
rank, logs = int(os.environ["RANK"]), %r
open(logs + "/pid_%%d" %% rank, "w").write("%%d %%d" %% (os.getpid(), os.getpgrp()))
def done(): os.write(int(os.environ["PIPEDOCK_PROGRESS"]), json.dumps({"done": {"steps": 3}}).encode() + b"\\n")
def error(line): open(logs + "/rank_%%d.error" %% rank, "w").write(line + "\\n"); os._exit(1)
def others():
    while len([n for n in os.listdir(logs) if n.startswith("pid_")]) < int(os.environ["WORLD_SIZE"]): time.sleep(0.01)
"""


def ranks(logs, body, world=2, show=lambda message: None):
    command = [sys.executable, "-c", HEAD % str(logs) + body]
    return launch.Ranks(command, world, launch.environment(world, 0), logs, show)


def run(logs, body, **options):
    """supervise() -> (what it returned or raised, seconds). No process of it may be alive afterwards."""
    made, start = ranks(logs, body, **options), time.monotonic()
    try:
        result = launch.supervise(made)
    except RunFailed as error:
        result = str(error)
    assert made.local.running() == []
    return result, time.monotonic() - start


def pids(logs, world=2):
    """rank -> (process id, process group), once all have written them."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        files = [logs / ("pid_%d" % rank) for rank in range(world)]
        if all(f.exists() and len(f.read_text().split()) == 2 for f in files):
            return [tuple(int(n) for n in f.read_text().split()) for f in files]
        time.sleep(0.02)
    raise AssertionError("the ranks did not start")


def alive(pid):
    try:
        status = Path("/proc/%d/status" % pid).read_text()
    except FileNotFoundError:
        return False
    return "State:\tZ" not in status


def test_the_summary_and_the_progress_come_back(tmp_path):
    shown = []
    body = "if rank == 0:\n    os.write(int(os.environ['PIPEDOCK_PROGRESS']), b'{\"step\": 1}\\n{\"step\": 2}\\n'); done()"
    assert run(tmp_path, body, show=shown.append)[0] == {"steps": 3}
    assert shown == [{"step": 1}, {"step": 2}]


def test_ranks_get_their_place_and_threads_that_fit(tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    env = launch.environment(2, 0)
    assert env["OMP_NUM_THREADS"] == str(max(1, len(os.sched_getaffinity(0)) // 2))
    assert (env["WORLD_SIZE"], env["DS_ACCELERATOR"], env["MASTER_ADDR"]) == ("2", "cpu", "127.0.0.1")
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert launch.environment(2, 0)["OMP_NUM_THREADS"] == "7"
    assert "DS_ACCELERATOR" not in launch.environment(2, 8) or "DS_ACCELERATOR" in os.environ


def test_compiled_kernels_are_kept_for_the_next_run(tmp_path, monkeypatch):
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert launch.environment(1, 1)["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "pipedock" / "compiled")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "mine")
    assert launch.environment(1, 1)["TORCHINDUCTOR_CACHE_DIR"] == "mine"


def test_one_rank_fails_and_all_end_with_its_line(tmp_path):
    message, seconds = run(tmp_path, "others()\nif rank == 1: error('step 7: the loss is nan.')\ntime.sleep(60)")
    assert message == "rank 1: step 7: the loss is nan. Log: %s" % (tmp_path / "rank_1.log")
    assert seconds < 30  # not the 60 s of the other rank


def test_a_killed_rank_is_the_cause_not_the_echo_of_its_neighbour(tmp_path):
    body = "others()\nif rank == 1: os.kill(os.getpid(), signal.SIGKILL)\ntime.sleep(0.3)"
    body += "; error('Connection closed by peer [127.0.0.1]')"
    assert run(tmp_path, body)[0].startswith("rank 1: was killed by SIGKILL (out of memory?")


def test_an_error_of_its_own_is_the_cause_not_the_echo(tmp_path):
    body = "error('Gloo: [gloo/transport] Connection reset by peer') if rank == 0 else error('disk full')"
    assert run(tmp_path, body)[0].startswith("rank 1: disk full. Log: ")


def test_a_rank_without_an_error_file_is_named_with_its_exit_code(tmp_path):
    (tmp_path / "rank_0.error").write_text("of an earlier run")
    assert run(tmp_path, "sys.exit(5)", world=1)[0] == "rank 0: ended with exit code 5. Log: %s" % (tmp_path / "rank_0.log")


def test_ending_without_a_summary_is_a_failure(tmp_path):
    assert run(tmp_path, "")[0] == "rank 0 ended without a summary. Log: %s" % (tmp_path / "rank_0.log")


def test_a_rank_that_ignores_sigterm_is_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(launch, "SETTLE_S", 0.2)
    body = "signal.signal(signal.SIGTERM, signal.SIG_IGN)\nothers()\nif rank == 1: error('x')\ntime.sleep(60)"
    assert run(tmp_path, body)[1] < 20


def supervisor(logs, body):
    code = "import sys; sys.path[:0] = [%r, %r]\nfrom pathlib import Path\nfrom tests.unit import test_train_launch as t\n" % (
        str(ROOT),
        str(ROOT / "tests" / "unit"),
    )
    code += "from pipeline_train import launch\nlaunch.supervise(t.ranks(Path(%r), %r))" % (str(logs), body)
    return subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("number, last_line", [
    (signal.SIGTERM, "pipeline_train.errors.Stopped: stopped by SIGTERM"), (signal.SIGINT, "KeyboardInterrupt"),
])  # fmt: skip
def test_a_signal_to_the_launcher_ends_the_ranks(tmp_path, number, last_line):
    parent = supervisor(tmp_path, "signal.signal(signal.SIGINT, signal.SIG_IGN)\ntime.sleep(60)")
    found = pids(tmp_path)
    assert {group for _, group in found} == {os.getpgrp()}  # killing the group leaves nothing
    parent.send_signal(number)
    error = parent.communicate(timeout=20)[1]
    assert parent.returncode != 0 and error.strip().splitlines()[-1] == last_line
    assert not [pid for pid, _ in found if alive(pid)]


def test_the_ranks_end_when_the_launcher_is_killed(tmp_path):
    body = "sys.path.insert(0, %r)\nfrom pipeline_train.worker import die_with_parent\ndie_with_parent()\n" % str(ROOT)
    body += "open(logs + '/ready_%d' % rank, 'w').close()\ntime.sleep(60)"
    parent = supervisor(tmp_path, body)
    found = pids(tmp_path)
    while not all((tmp_path / ("ready_%d" % rank)).exists() for rank in range(2)):
        time.sleep(0.02)
    parent.kill()
    parent.communicate()
    deadline = time.monotonic() + 10
    while any(alive(pid) for pid, _ in found) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not [pid for pid, _ in found if alive(pid)]


def test_an_error_that_could_not_be_written_is_told_all_the_same(tmp_path):
    """A full disk: the line comes through the shared page."""
    body = "sys.path.insert(0, %r)\nfrom pipeline_train.pulse import Pulse\n" % str(ROOT)
    body += "Pulse.inherited().fail('no space left'); open(logs + '/rank_0.error', 'w').close(); time.sleep(60)"
    message, seconds = run(tmp_path, body, world=1)
    assert message == "rank 0: no space left. Log: %s" % (tmp_path / "rank_0.log") and seconds < 30


def test_a_logs_folder_that_cannot_be_used_is_one_line(tmp_path):
    (tmp_path / "rank_1.log").mkdir()
    with pytest.raises(UserError) as error:
        run(tmp_path, "time.sleep(60)")
    assert str(error.value) == "run.out: %s: cannot be written: Is a directory" % (tmp_path / "rank_1.log")
