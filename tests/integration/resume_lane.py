"""Exact resume at length, for ci/resume.sh (ci/test.sh runs the shorter tests/integration/test_train_run.py).

A run is killed again and again, each rank in turn, all at once, the launcher, each time at a random step, and goes on until it is
done: losses and final weights equal those of the run that nobody killed, bit by bit.
"""

import json
import os
import random
import shutil

import pytest

from pipeline_train import run_folder
from tests.runs import at_step, killed, lines_of, make, same_end, saved, train, when_saved

SEED = int(os.environ.get("PIPEDOCK_RESUME_SEED", "11"))
CASES = {
    # stages x replicas, behind the next steps; the tied weight's two copies are on different stages
    "llama-2x2": ("llama", {"pipe": 2, "data": 2, "recompute": "blocks"}, {"type": "adamw"}, True),
    # axes the other way round, training waits for its saves, an optimizer with one moment
    "bloom-2x1-lion": ("bloom", {"pipe": 2, "axes": ["data", "pipe"]}, {"type": "lion"}, False),
}


@pytest.fixture(scope="module", params=sorted(CASES))
def root(request, tmp_path_factory):
    """A finished run in root/out that nobody killed: four epochs."""
    family, parallel, optim, behind = CASES[request.param]
    root = tmp_path_factory.mktemp("resume")
    make(
        root, family, records=46, parallel=parallel, batch={"global": 8}, optim=dict(optim, lr=1e-3, warmup=2, clip=0.5),
        train={"epochs": 4, "save_every": 2, "keep": 2, "async_save": behind},
    )  # fmt: skip
    done = train(root)
    assert done.returncode == 0, done.stderr[-2000:]
    return root


def total_of(root):
    return max(lines_of(root / "out", "step"))


def test_killed_again_and_again_the_run_ends_in_the_same_bytes(root):
    """The first kill comes when an epoch's last step has been saved."""
    draw, out, total = random.Random(SEED), root / "killed", total_of(root)
    epochs = [lines_of(root / "out", "step")[step]["epoch"] for step in range(1, total + 1)]
    boundary = epochs.index(1)
    assert boundary % 2 == 0 and set(epochs) == {0, 1, 2, 3}, "the boundary is a save's step"
    parallel = json.loads((root / "run.yaml").read_text())["parallel"]
    victims = [{rank} for rank in range(parallel["pipe"] * parallel.get("data", 1))] + ["all", "launcher"]
    draw.shuffle(victims)
    killed(root, out, when_saved(boundary), victims[0])
    for who in victims[1:]:
        first = min(total - 3, run_folder.step_of(saved(out)[-1]) + 1)
        step = draw.randint(first, min(total - 3, first + 4))
        killed(root, out, at_step(step), who)
        print("seed %d: killed %s at step %d, newest checkpoint %s" % (SEED, who, step, saved(out)[-1].name))
    done = train(root, "--set", "run.out=%s" % out, "--resume")
    assert done.returncode == 0, done.stderr[-2000:]
    same_end(root / "out", out)


@pytest.mark.parametrize("pipe, data", [(1, 1), (3, 1), (1, 4), (4, 2)])
def test_another_layout_goes_on_with_the_same_losses(root, pipe, data):
    """Weights, moments and the place in the data carry over by name: from the second but last checkpoint."""
    out, total = root / ("%dx%d" % (pipe, data)), total_of(root)
    shutil.copytree(str(root / "out"), str(out))
    shutil.rmtree(str(saved(out)[-1]))
    lines = [line for line in (out / "metrics.jsonl").read_text().splitlines(True) if json.loads(line)["step"] <= total - 2]
    (out / "metrics.jsonl").write_text("".join(lines))
    sets = {"run.out": out, "parallel.pipe": pipe, "parallel.data": data}
    done = train(root, "--resume", *[word for key, value in sets.items() for word in ("--set", "%s=%s" % (key, value))])
    assert done.returncode == 0, done.stderr[-2000:]
    wanted, found = lines_of(root / "out", "step"), lines_of(out, "step")
    assert sorted(found) == sorted(wanted)
    last = [total - 1, total]
    assert [found[s]["loss"] for s in last] == pytest.approx([wanted[s]["loss"] for s in last], rel=1e-5)
    assert [found[s]["grad_norm"] for s in last] == pytest.approx([wanted[s]["grad_norm"] for s in last], rel=1e-4)
