"""Two nodes train as one: their launchers on this machine, a folder each. ci/nodes.sh runs nodes_lane.py, which is longer."""

import json

import pytest

from pipeline_train import manifest
from tests.launchers import Nodes, same_run
from tests.runs import make, train


@pytest.fixture(autouse=True)
def none_left():
    """No launcher outlives its test."""
    yield
    Nodes.kill_all()


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A finished run on one node in root/out: two stages, so that each node can have one."""
    root = tmp_path_factory.mktemp("nodes")
    make(root, parallel={"pipe": 2}, batch={"global": 6}, optim={"lr": 1e-3, "warmup": 2},
         train={"save_every": 3, "keep": 3}, data={"eval": None})  # fmt: skip
    done = train(root)
    assert done.returncode == 0, done.stderr[-2000:]
    return root


def test_two_nodes_train_as_one(root):
    nodes = Nodes(root, ["a", "b"], "--json")
    nodes.until(lambda: len(nodes.ranks(0)) == len(nodes.ranks(1)) == 1)
    assert list(nodes.ranks(1)) == [1] and list(nodes.ranks(0)) == [0]
    assert nodes.codes() == [0, 0], nodes.all_said()
    same_run(root / "out", nodes.folders)
    assert not (nodes.folders[1] / "metrics.jsonl").exists() and not (nodes.folders[1] / "report.html").exists()
    mine, others = (sorted(p.name for p in out.glob("checkpoints/step_000006/layer_*")) for out in nodes.folders)
    assert mine and others and not set(mine) & set(others)
    assert json.loads(nodes.last(0))["steps"] == json.loads(nodes.last(1))["steps"] == 6
    assert manifest.read(nodes.folders[1] / "checkpoints" / "step_000006")["step"] == 6
