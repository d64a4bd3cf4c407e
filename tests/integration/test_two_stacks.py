"""A run begun on one software stack and continued on the other. ci/pinned.sh names the other stack's Python; both train on CPUs.

Bloom, two stages, AdamW with warm-up and clipping: 10 steps, saved after 5.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline_train import metrics
from tests.models import make_hf, tiny_config
from tests.tokenizers import tiny_tokenizer

OTHER = os.environ.get("PIPEDOCK_OTHER_PYTHON")
pytestmark = pytest.mark.skipif(OTHER is None, reason="one stack only: ci/pinned.sh runs this, after ci/install.sh")
ROOT = Path(__file__).resolve().parents[2]
CODE = "import sys; sys.path.insert(0, %r); import pipedock; sys.exit(pipedock.main())" % str(ROOT)
PYTHONS = {"here": sys.executable, "other": OTHER}
LAST = "step_000010"


def pipedock(stack, *arguments):
    env = dict(os.environ, OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu")
    command = [PYTHONS[stack], "-c", CODE] + [str(argument) for argument in arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=240)
    assert done.returncode == 0, "%s: %s" % (stack, done.stderr[-3000:])
    return done.stdout


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """root/here and root/other: the whole run on either stack. The model is this stack's: both read its tokenizer."""
    root = tmp_path_factory.mktemp("stacks")
    tiny_tokenizer(root / "model", "bpe")
    make_hf(root / "model", tiny_config("bloom", vocab_size=600))
    records = [{"type": "instruct", "instruct": "Name %d colours." % n, "output": "Red, green. " * (1 + n % 3)} for n in range(40)]
    (root / "train.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (root / "run.yaml").write_text(json.dumps({
        "run": {"out": "unused", "self_test": False}, "model": {"path": str(root / "model"), "dtype": "fp32"},
        "data": {"train": str(root / "train.jsonl"), "seq_len": 64}, "parallel": {"pipe": 2}, "batch": {"global": 4},
        "optim": {"lr": 1e-3, "warmup": 2}, "train": {"epochs": 10, "max_steps": 10, "save_every": 5, "keep": 2},
    }))  # fmt: skip
    for stack in PYTHONS:
        pipedock(stack, "train", "--config", root / "run.yaml", "--set", "run.out=%s" % (root / stack))
    return root


def series(out, key):
    lines = [line for line in metrics.read(out / "metrics.jsonl") if line["kind"] == "step"]
    last = {line["step"]: line[key] for line in lines}
    assert sorted(last) == list(range(1, 11))
    return [last[step] for step in sorted(last)]


def tensors(folder):
    from safetensors.torch import load_file

    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        found.update({"%s %s" % (path.name, key): value for key, value in load_file(str(path)).items()})
    assert found
    return found


def near(ones, others, tolerance):
    assert set(ones) == set(others)
    return [key for key in ones if (ones[key] - others[key]).abs().max() > tolerance * others[key].abs().max().clamp(min=1e-3)]


def test_both_stacks_train_alike(root):
    assert series(root / "here", "loss") == pytest.approx(series(root / "other", "loss"), rel=1e-5)
    assert series(root / "here", "grad_norm") == pytest.approx(series(root / "other", "grad_norm"), rel=1e-4)
    assert series(root / "here", "tokens") == series(root / "other", "tokens")
    versions = [json.loads((root / stack / "resolved" / "versions.json").read_text()) for stack in PYTHONS]
    assert versions[0]["deepspeed"] != versions[1]["deepspeed"] and versions[0]["torch"] != versions[1]["torch"]


@pytest.mark.parametrize("first, second", [("here", "other"), ("other", "here")])
def test_a_run_goes_on_on_the_other_stack(root, first, second):
    """Weights, moments, step counter, schedule and place in the data: the losses are those of the run that stayed."""
    out = root / (first + "-then-" + second)
    shutil.copytree(str(root / first), str(out))
    shutil.rmtree(str(out / "checkpoints" / LAST))
    (out / "checkpoints" / "latest").write_text("step_000005\n")
    pipedock(second, "train", "--config", root / "run.yaml", "--set", "run.out=%s" % out, "--resume")
    steps = [line["step"] for line in metrics.read(out / "metrics.jsonl") if line["kind"] == "step"]
    assert steps == list(range(1, 11)) + list(range(6, 11))  # steps 6 to 10 a second time
    for key, tolerance in (("loss", 1e-5), ("lr", 1e-12), ("grad_norm", 1e-4), ("tokens", 0)):
        assert series(out, key) == pytest.approx(series(root / first, key), rel=tolerance), key
    ends = [tensors(folder / "checkpoints" / LAST) for folder in (out, root / first)]
    assert near(*ends, tolerance=2e-3) == []


@pytest.mark.parametrize("first, second", [("here", "other"), ("other", "here")])
def test_both_stacks_export_the_same_tensors(root, first, second):
    """The newer stack's transformers also proves the older one's export. The reverse is not promised: tokenizers 0.13 cannot read
    the tokenizer.json that newer releases write."""
    exports = [root / ("export of %s by %s" % (first, stack)) for stack in (first, second)]
    for stack, export in zip((first, second), exports):
        pipedock(stack, "to-hf", "--input", root / first, "--output", export)
    one, other = (tensors(export) for export in exports)
    assert set(one) == set(other) and all(bool((one[key] == other[key]).all()) for key in one)
    if first == "here":
        pipedock(second, "verify", "--checkpoint", root / first, "--export", exports[0])
        assert json.loads((exports[0] / "proof.json").read_text())["holds"] is True
