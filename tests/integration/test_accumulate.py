"""accumulate.into_sums: the sums of DeepSpeed's own way, but for its rounding of every gradient to bf16; and none that stays."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pipeline_train import compat
from tests import compiler
from tests.free_port import free_port
from tests.models import tiny_config

RANK = Path(__file__).with_name("sums_rank.py")
pytestmark = pytest.mark.skipif(not compat.has_bf16(compat.versions()["deepspeed"]), reason="DeepSpeed 0.9.2 has no bf16 pipeline")


def both_ways(folder, pipe, data, compiled, fp8=False):
    """-> what each rank left: [with, without]."""
    run = {
        "run": {"out": "-", "compile": compiled, "fp8": fp8}, "model": {"path": "-", "init": "random", "dtype": "bf16"},
        "data": {"train": "-", "seq_len": 24}, "parallel": {"pipe": pipe, "data": data}, "batch": {"micro": 1, "global": 3 * data},
        "optim": {"clip": 1000},  # clipping would give every sum more digits
    }  # fmt: skip
    (folder / "case.json").write_text(json.dumps({"raw": tiny_config("llama", tie_word_embeddings=True), "run": run}))
    env = dict(os.environ, WORLD_SIZE=str(pipe * data), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()), OMP_NUM_THREADS="1",
               DS_ACCELERATOR="cpu")  # fmt: skip
    command = [sys.executable, str(RANK), str(folder / "case.json"), str(folder / "out")]
    ranks = [
        subprocess.Popen(command, env=dict(env, RANK=str(rank), LOCAL_RANK=str(rank)), stderr=subprocess.PIPE, text=True)
        for rank in range(pipe * data)
    ]
    try:
        errors = [rank.communicate(timeout=300)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0] * len(ranks), "\n".join(errors)[-3000:]
    return [torch.load(str(folder / ("out.%d" % rank))) for rank in range(pipe * data)]


@pytest.mark.parametrize("pipe, data, compiled", [
    (1, 1, False), (2, 1, False), (1, 2, False),
    pytest.param(1, 1, True, marks=pytest.mark.skipif(not compiler.CAN, reason=compiler.WHY_NOT)),
])  # fmt: skip
def test_the_same_sums_and_no_gradient_is_kept(tmp_path, pipe, data, compiled):
    for ours, plain in both_ways(tmp_path, pipe, data, compiled):
        assert ours["steps"][0][0] == plain["steps"][0][0] and len(ours["steps"]) == 3
        assert [step[0] for step in ours["steps"]] == [pytest.approx(step[0], rel=2e-4) for step in plain["steps"]]
        assert [step[1] for step in ours["steps"]] == [pytest.approx(step[1], rel=2e-3) for step in plain["steps"]]
        mine, theirs = (result["values"][1] for result in (ours, plain))  # exp_avg: linear in the gradients
        assert mine.keys() == theirs.keys() and len(mine) > 5
        for name in mine:
            assert (mine[name] - theirs[name]).norm() < 0.01 * theirs[name].norm() and theirs[name].norm() > 0, name
        assert not ours["kept"] and plain["kept"]
        assert ours["precise"] == (data == 1)  # replicas are averaged in bf16; without them the fp32 sums stay what they are


@pytest.mark.skipif(not compat.has_wide_products(), reason="torch before 2.8 has no run.fp8")
@pytest.mark.parametrize("pipe, data, compiled", [
    (1, 1, False), (2, 2, False),
    pytest.param(1, 1, True, marks=pytest.mark.skipif(not compiler.CAN, reason=compiler.WHY_NOT)),
])  # fmt: skip
def test_with_fp8_products_a_run_goes_as_in_bf16(tmp_path, pipe, data, compiled):
    for ours, plain in both_ways(tmp_path, pipe, data, compiled, fp8=True):
        for mine, theirs in zip(ours["steps"], plain["steps"]):
            assert 0 < abs(mine[0] - theirs[0]) < 0.01 * theirs[0] and mine[1] == pytest.approx(theirs[1], rel=0.05)
        mine, theirs = (result["values"][1] for result in (ours, plain))
        for name in mine:
            assert 0.001 < (mine[name] - theirs[name]).norm() / theirs[name].norm() < 0.2, name
