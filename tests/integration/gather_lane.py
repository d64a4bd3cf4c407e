"""Two launchers without a shared disk train and are stopped; one machine goes on from what they have left, once ``pipedock gather``
has been there. For ci/nodes.sh."""

import json
import shutil
import signal
import subprocess
import sys

import pytest

from pipeline_train import manifest, metrics
from tests.launchers import Nodes, free_pair
from tests.runs import CODE, ENV, START_S, lines_of, make, saved, train


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A finished run of one stage in root/one; one of two stages on two nodes in root/a and root/b, stopped by a signal."""
    root = tmp_path_factory.mktemp("gather")
    make(root, parallel={"pipe": 2}, batch={"global": 6}, optim={"lr": 1e-3, "warmup": 2},
         train={"epochs": 5, "save_every": 3, "keep": 3})  # fmt: skip
    done = train(root, "--set", "parallel.pipe=1", "--set", "run.out=%s" % (root / "one"))
    assert done.returncode == 0, done.stderr[-2000:]
    nodes = Nodes(root, ["a", "b"]).until_saved(3)
    assert nodes.send(0, signal.SIGTERM).codes() == [1, 1], nodes.all_said()
    return root


def pipedock(verb, *arguments):
    command = [sys.executable, "-c", CODE, verb] + list(arguments)
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENV)


def said(process):
    out, err = process.communicate(timeout=START_S)
    return process.returncode, out, err


def alone(root, out):
    """``train`` goes on on one machine with one stage."""
    return train(root, "--set", "parallel.pipe=1", "--set", "run.out=%s" % (root / out), "--resume", "auto")


def test_one_machine_goes_on_where_two_nodes_were_stopped_once_all_files_are_there(root):
    here, there = saved(root / "a")[-1], saved(root / "b")[-1]
    assert here.name == there.name and (here / manifest.NAME).read_bytes() == (there / manifest.NAME).read_bytes()
    words = ["%s: layer_00" % here, " lie on node 1 (", "bring them with pipedock gather --input %s" % here]
    export = str(root / "export")
    refused, done = said(pipedock("to-hf", "--input", str(root / "a"), "--output", export)), alone(root, "a")
    for code, told in ((refused[0], refused[2]), (done.returncode, done.stderr)):
        assert code == 2 and all(word in told.splitlines()[-1] for word in words), told
    shutil.copytree(str(root / "a"), str(root / "weights_a"))
    shutil.copytree(str(root / "b"), str(root / "weights_b"))
    gathered = gather(root, "weights", "--without-optimizer")
    assert 0 < gathered[0]["files"] < len(list(there.glob("*.safetensors"))) and gathered[1]["files"] == 0
    assert said(pipedock("to-hf", "--input", str(root / "weights_a"), "--output", export))[0] == 0
    assert said(pipedock("verify", "--checkpoint", str(root / "weights_a"), "--export", export))[0] == 0
    assert alone(root, "weights_a").returncode == 2  # the optimizer's state is not there
    assert gather(root, "")[0]["files"] == len(list(there.glob("*.safetensors")))
    done = alone(root, "a")
    assert done.returncode == 0, done.stderr[-2000:]
    wanted, found = lines_of(root / "one", "step"), lines_of(root / "a", "step")
    assert sorted(found) == sorted(wanted)
    assert max(abs(found[step]["loss"] - wanted[step]["loss"]) / wanted[step]["loss"] for step in wanted) <= 1e-5
    assert len([line for line in metrics.read(root / "a" / "metrics.jsonl") if line["kind"] == "start"]) == 2
    newest = saved(root / "a")[-1]
    assert "where" not in manifest.read(newest) and newest.name == saved(root / "one")[-1].name


def gather(root, name, *arguments):
    """On both nodes -> their documents."""
    port = free_pair()
    folders = [root / (name + "_" + node if name else node) for node in "ab"]
    nodes = [
        pipedock("gather", "--json", "--input", str(folder), "--nodes", "2", "--node-rank", str(node), "--master-addr", "127.0.0.1",
                 "--master-port", str(port), *arguments)
        for node, folder in enumerate(folders)
    ]  # fmt: skip
    ended = [said(process) for process in nodes]
    assert [code for code, _, _ in ended] == [0, 0], ended
    return [json.loads(out) for _, out, _ in ended]
