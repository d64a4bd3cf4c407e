"""Two nodes at length, for ci/nodes.sh (ci/test.sh runs test_nodes.py): every way in which a node or one of its ranks ends, a
shared disk, four ranks, other data, a finished run."""

import json
import os
import signal
import time

import pytest

from pipeline_train import run_folder
from tests.launchers import Nodes, same_run
from tests.runs import lines_of, make, saved, train

LONG = ("--set", "train.epochs=200")


@pytest.fixture(autouse=True)
def none_left():
    """No launcher outlives its test."""
    yield
    Nodes.kill_all()


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A finished run on one node in root/out, and one of two replicas in root/four: long enough that what a test does once the
    first checkpoint is there comes before the end, also where all that runs shares two slow cores."""
    root = tmp_path_factory.mktemp("nodes")
    make(root, parallel={"pipe": 2}, batch={"global": 6}, optim={"lr": 1e-3, "warmup": 2},
         train={"epochs": 5, "save_every": 3, "keep": 3})  # fmt: skip
    for arguments in ([], ["--set", "parallel.data=2", "--set", "run.out=%s" % (root / "four")]):
        done = train(root, *arguments)
        assert done.returncode == 0, done.stderr[-2000:]
    return root


def test_four_ranks_on_two_nodes_are_four_ranks_on_one(root):
    nodes = Nodes(root, ["four_a", "four_b"], "--set", "parallel.data=2")
    nodes.until(lambda: len(nodes.ranks(0)) == 2)
    assert nodes.codes() == [0, 0], nodes.all_said()
    same_run(root / "four", nodes.folders)
    assert "has ranks 0 to 1; " in nodes.said(1) and "has ranks 2 to 3" in nodes.said(1)


def test_a_shared_folder_is_found_and_node_0_prepares_it(root):
    nodes = Nodes(root, ["shared", "shared"])
    assert nodes.codes() == [0, 0], nodes.all_said()
    assert "one folder for all nodes" in nodes.said(0) and "one folder for all nodes" in nodes.said(1)
    assert "records" in nodes.said(0) and "records" not in nodes.said(1)
    same_run(root / "out", nodes.folders[:1])
    assert not [path for path in nodes.folders[0].iterdir() if path.name.startswith(".same-folder-")]
    evaluated_again(root, ["shared", "shared"])
    nodes = Nodes(root, ["shared", "shared"], "--resume", "auto", "--json")
    assert nodes.codes() == [0, 0] and json.loads(nodes.last(1))["finished"] is True, nodes.all_said()
    assert "finished already" in nodes.said(0) and "finished already" in nodes.said(1)


def evaluated_again(root, folders):
    """A finished run that was killed before the end of its last evaluation makes up for it."""
    path = root / folders[0] / "metrics.jsonl"
    wanted = lines_of(path.parent, "eval")
    lines = path.read_text().splitlines(True)
    path.write_text("".join(line for line in lines if json.loads(line)["step"] < max(wanted) or '"eval"' not in line))
    assert max(wanted) not in lines_of(path.parent, "eval")
    nodes = Nodes(root, folders, "--resume", "--json")
    assert nodes.codes() == [0, 0], nodes.all_said()
    for node in (0, 1):
        assert "the evaluation after step %d, which metrics.jsonl lacks" % max(wanted) in nodes.said(node)
        assert json.loads(nodes.last(node))["finished"] is True
    assert lines_of(path.parent, "eval")[max(wanted)]["loss"] == wanted[max(wanted)]["loss"]


def test_a_node_dies_and_both_started_again_end_as_one_node_would(root):
    nodes = Nodes(root, ["dead_a", "dead_b"]).until_saved(3)
    began = time.monotonic()
    assert nodes.send(1, signal.SIGKILL).codes(60) == [1, -9], nodes.all_said()
    assert time.monotonic() - began < 30
    assert nodes.last(0).startswith("pipedock train: node 1 (") and "is gone: its connection was closed" in nodes.last(0)
    nodes = Nodes(root, ["dead_a", "dead_b"], "--resume", "auto")
    assert nodes.codes() == [0, 0], nodes.all_said()
    same_run(root / "out", nodes.folders)
    evaluated_again(root, ["dead_a", "dead_b"])


def test_a_signal_to_one_node_saves_and_stops_all_and_resume_goes_on(root):
    nodes = Nodes(root, ["sig_a", "sig_b"]).until_saved(3)
    codes = nodes.send(1, signal.SIGTERM).codes(60)
    assert codes == [1, 1], nodes.all_said()
    step = run_folder.step_of(saved(nodes.folders[0])[-1])
    for node in (0, 1):
        assert nodes.last(node).startswith("pipedock train: stopped by SIGTERM on node 1 (")
        assert nodes.last(node).endswith(") after saving step %d" % step)
    assert "not up to date" not in nodes.said(0)
    nodes = Nodes(root, ["sig_a", "sig_b"], "--resume")
    assert nodes.codes() == [0, 0], nodes.all_said()
    same_run(root / "out", nodes.folders)


def test_a_wish_to_save_reaches_all_ranks_from_any_node(root):
    nodes = Nodes(root, ["usr_a", "usr_b"], *LONG, "--set", "train.save_every=100000")
    nodes.until(lambda: steps(nodes) >= 1)
    for wishes, node in enumerate((1, 0, 1), 1):
        nodes.send(node, signal.SIGUSR1)
        nodes.until(lambda wanted=wishes: len(saves(nodes)) == wanted)
    assert nodes.send(0, signal.SIGINT).codes(60) == [130, 1], nodes.all_said()
    assert nodes.last(0) == "pipedock train: interrupted"
    assert nodes.last(1).startswith("pipedock train: node 0 (") and nodes.last(1).endswith("): interrupted")


def steps(nodes):
    path = nodes.folders[0] / "metrics.jsonl"
    return max(lines_of(nodes.folders[0], "step"), default=0) if path.exists() else 0


def saves(nodes):
    return lines_of(nodes.folders[0], "save")


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_is_killed_and_every_node_tells_of_it(root, victim):
    nodes = Nodes(root, ["rank%d_a" % victim, "rank%d_b" % victim], *LONG).until_saved(3)
    os.kill(nodes.ranks(victim)[victim], signal.SIGKILL)
    assert nodes.codes(60) == [1, 1], nodes.all_said()
    for node in (0, 1):
        assert nodes.last(node).startswith("pipedock train: rank %d on node %d (" % (victim, victim)), nodes.all_said()
        assert "): was killed by SIGKILL" in nodes.last(node) and "rank_%d.log" % victim in nodes.last(node)


def test_node_0_is_killed(root):
    nodes = Nodes(root, ["zero_a", "zero_b"], *LONG).until_saved(3)
    assert nodes.send(0, signal.SIGKILL).codes(60) == [-9, 1], nodes.all_said()
    assert nodes.last(1).startswith("pipedock train: node 0 (") and "is gone" in nodes.last(1)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_launcher_that_is_frozen_is_given_up(root, victim):
    """As a pulled cable: the connections stay."""
    nodes = Nodes(root, ["ice%d_a" % victim, "ice%d_b" % victim], *LONG, quick=True).until_saved(3)
    began = time.monotonic()
    for pid in [nodes.processes[victim].pid] + list(nodes.ranks(victim).values()):
        os.kill(pid, signal.SIGSTOP)
    assert nodes.processes[1 - victim].wait(60) == 1, nodes.all_said()
    assert 4 < time.monotonic() - began < 40
    line = nodes.last(1 - victim)
    assert line.startswith("pipedock train: node %d (" % victim) and ") has not answered for 5 s:" in line, nodes.all_said()
    for pid in list(nodes.ranks(victim).values()) + [nodes.processes[victim].pid]:
        os.kill(pid, signal.SIGCONT)
    assert nodes.codes(60)[victim] == 1, nodes.all_said()


def test_a_frozen_rank_is_found_on_another_node(root):
    nodes = Nodes(root, ["rf_a", "rf_b"], *LONG, "--set", "run.hang_s=10").until_saved(3)
    os.kill(nodes.ranks(1)[1], signal.SIGSTOP)
    assert nodes.codes(60) == [1, 1], nodes.all_said()
    for node in (0, 1):
        assert "rank 1 on node 1 (" in nodes.last(node) and "has stopped answering" in nodes.last(node), nodes.all_said()


def test_other_data_on_one_node_is_refused_by_all(root):
    lines = (root / "train.jsonl").read_text().splitlines(True)
    (root / "other.jsonl").write_text("".join(lines[:-1]))
    nodes = Nodes(root, ["od_a", "od_b"], own={1: ["--set", "data.train=%s" % (root / "other.jsonl")]})
    assert nodes.codes(120) == [2, 2], nodes.all_said()
    for node in (0, 1):
        assert "data differs between the nodes: " in nodes.said(node) and "on node 1 (" in nodes.said(node)


def test_another_configuration_is_refused_before_anything_is_encoded(root):
    nodes = Nodes(root, ["oc_a", "oc_b"], own={1: ["--set", "optim.lr=2e-3"], 0: ["--set", "train.epochs=7"]})
    assert nodes.codes(120) == [2, 2], nodes.all_said()
    for node in (0, 1):
        lines = [line for line in nodes.said(node).splitlines() if "config differs between the nodes: " in line]
        assert ["optim.lr" in lines[0], "train.epochs" in lines[1], len(lines)] == [True, True, 2], nodes.all_said()
    assert not any(out.exists() for out in nodes.folders)


def test_what_one_node_lacks_ends_all_of_them(root):
    nodes = Nodes(root, ["no_a", "no_b"], own={1: ["--set", "model.path=%s" % (root / "nowhere")]})
    assert nodes.codes(120) == [2, 2], nodes.all_said()
    assert nodes.last(0).startswith("pipedock train: node 1 (") and "nowhere" in nodes.last(0)
    assert nodes.last(1).startswith("pipedock train: ") and "nowhere" in nodes.last(1)


def test_the_export_at_the_end_comes_from_all_nodes(root):
    from pipeline_train.proof import NAME

    sections = ["--set", "export.dir=%s" % (root / "hf")]
    nodes = Nodes(root, ["ex_a", "ex_b"], *sections, "--json")
    assert nodes.codes() == [0, 0], nodes.all_said()
    assert json.loads(nodes.last(0))["export"] == str(root / "hf") and "export" not in json.loads(nodes.last(1))
    assert (root / "hf" / NAME).exists()
