"""When numbers or ranks go wrong: planted in real pipelines and in real runs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline_train import compat
from tests.free_port import free_port
from tests.models import make_hf, tiny_config

RANK = Path(__file__).with_name("planted_rank.py")
BF16 = compat.release(compat.versions()["deepspeed"] or "0") >= (0, 9, 3)


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """case -> what rank 0 and rank 1 saw at each step."""
    folder = tmp_path_factory.mktemp("planted")
    make_hf(folder / "model", tiny_config("llama", tie_word_embeddings=True))
    run = {"run": {"out": "unused"}, "model": {"path": str(folder / "model")}, "data": {"train": "unused", "seq_len": 24},
           "parallel": {"pipe": 2}, "batch": {"micro": 1, "global": 4}, "optim": {"clip": 0.5}}  # fmt: skip
    (folder / "run.json").write_text(json.dumps(run))
    if BF16:
        (folder / "bf16").touch()
    env = dict(os.environ, WORLD_SIZE="2", LOCAL_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()),
               OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu")  # fmt: skip
    ranks = []
    for rank in range(2):
        with open(str(folder / ("log.%d" % rank)), "w") as log:
            command = [sys.executable, str(RANK), str(folder)]
            ranks.append(subprocess.Popen(command, env=dict(env, RANK=str(rank), LOCAL_RANK=str(rank)), stdout=log, stderr=log))
    try:
        codes = [rank.wait(timeout=200) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert codes == [0, 0], (folder / ("log.%d" % (0 if codes[0] else 1))).read_text()[-3000:]
    return lambda case: [json.loads((folder / ("%s.%d.json" % (case, rank))).read_text()) for rank in range(2)]


@pytest.mark.parametrize("case", ["nan-fp32", pytest.param("inf-bf16", marks=pytest.mark.skipif(not BF16, reason="no bf16 here"))])
def test_a_gradient_that_is_not_a_number_stops_every_rank_before_the_step(planted, case):
    """Planted on one stage; the other one has finite gradients of its own."""
    for (_, norm, skipped, moved, _), second in planted(case):
        assert norm > 0 and moved and not skipped
        assert second == ["the gradient is not a number", None, None, False, None]


def test_a_loss_that_is_not_a_number_stops_every_rank_though_all_gradients_are_finite(planted):
    assert planted("loss") == [[["the loss is not a number", None, None, False, None]]] * 2


def test_the_loss_scale_is_in_the_gradients_and_out_again(planted):
    for plain, scaled in zip(planted("plain"), planted("fp16-calm")):
        for a, b in zip(plain, scaled):
            assert b[:2] == pytest.approx(a[:2], rel=1e-5) and b[2:4] == [False, True] and b[4] == 1024.0


def test_an_overflow_skips_the_step_on_every_rank_and_halves_the_scale(planted):
    """Overflows at steps 1, 2 and 3, hysteresis 2, window 2, smallest scale 256."""
    for seen in planted("fp16-storm"):
        assert [entry[2] for entry in seen] == [False, True, True, True] + [False] * 5  # skipped
        assert [entry[3] for entry in seen] == [True, False, False, False] + [True] * 5  # the weights moved
        assert [entry[4] for entry in seen] == [1024.0, 1024.0, 512.0, 256.0, 256.0, 256.0, 512.0, 512.0, 1024.0]
        assert all(entry[1] is None for entry in seen[1:4]) and all(entry[1] > 0 for entry in seen[4:])
