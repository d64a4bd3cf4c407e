"""The export that the ranks write is the one made from the checkpoint of the same step, file by file and byte by byte.

With PIPEDOCK_MATRIX set (by hand, four minutes) all of stages {1,2,4} x replicas {1,2}; else what four ranks can do.
"""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from export import from_ranks
from export.to_hf import to_hf
from pipeline_train import compat
from pipeline_train.weights import same_bits
from tests.free_port import free_port
from tests.models import make_hf, tiny_config
from tests.tokenizers import tiny_tokenizer

RANK = Path(__file__).with_name("export_rank.py")
WHOLE = bool(os.environ.get("PIPEDOCK_MATRIX"))
PLACES = list(itertools.product((1, 2, 4), (1, 2))) if WHOLE else [(4, 1), (2, 2), (1, 4)]  # stages, replicas
WORLDS = pytest.mark.parametrize("world", sorted({pipe * data for pipe, data in PLACES}))
MODELS = {
    "llama": tiny_config("llama", num_hidden_layers=4, vocab_size=520),
    "llama-tied": tiny_config("llama", num_hidden_layers=4, vocab_size=520, tie_word_embeddings=True),
    "bloom": tiny_config("bloom", n_layer=4, vocab_size=520, tie_word_embeddings=False),
    "bloom-tied": tiny_config("bloom", n_layer=4, vocab_size=520),
}
DTYPES = ("fp32", "bf16") if compat.has_bf16(compat.versions()["deepspeed"]) else ("fp32",)
EXPORTS = [("hf", "5GB"), ("hf", "70KB"), ("hf", "1B"), ("tgi-0.8", "5GB"), ("tgi-0.8", "70KB")]
MORE = {"bloom-tied": [("tgi-3", "70KB")]}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    for name, raw in MODELS.items():
        tiny_tokenizer(root / name, "bpe")
        make_hf(root / name, raw)
    return root


def cases(world, folders):
    """Every model on every place in every dtype; where not all is asked for, one tied or untied model of each family on a place."""
    found = []
    for (k, (pipe, data)), (m, model), (d, dtype) in itertools.product(
        enumerate(PLACES), enumerate(sorted(MODELS)), enumerate(DTYPES)
    ):
        if pipe * data == world:
            if WHOLE or ((m + k) % 2 and (m // 2 + k) % len(DTYPES) == d):
                run = {
                    "run": {"out": "unused"}, "model": {"path": str(folders / model), "dtype": dtype},
                    "data": {"train": "unused", "seq_len": 24}, "parallel": {"pipe": pipe, "data": data},
                    "batch": {"micro": 1, "global": 4}, "optim": {"lr": 1e-3},
                }  # fmt: skip
                name = "%s-%dx%d-%s" % (model, pipe, data, dtype)
                found.append({"name": name, "run": run, "exports": EXPORTS + MORE.get(model, [])})
    return found


def launch(world, folder):
    env = dict(os.environ, WORLD_SIZE=str(world), LOCAL_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()),
               OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu")  # fmt: skip
    ranks = []
    for rank in range(world):
        log = open(str(folder / ("log.%d" % rank)), "w")
        command = [sys.executable, str(RANK), str(folder)]
        ranks.append(subprocess.Popen(command, env=dict(env, RANK=str(rank), LOCAL_RANK=str(rank)), stdout=log, stderr=log))
    try:
        codes = [rank.wait(timeout=400) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert codes == [0] * world, (folder / ("log.%d" % next(r for r, c in enumerate(codes) if c))).read_text()[-3000:]


def content(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def there_and_back(exported, model, dtype):
    """What transformers wrote, through the pipeline's master weights and out again, bit by bit in the run's dtype."""
    wanted, found = load_file(str(model / "model.safetensors")), {}
    wanted = {name: tensor for name, tensor in wanted.items() if not name.endswith("inv_freq")}  # old transformers' buffers
    for path in exported.glob("*.safetensors"):
        found.update(load_file(str(path)))
    assert set(wanted) <= set(found) <= set(wanted) | {"lm_head.weight"} and found
    for name, tensor in wanted.items():
        assert same_bits(found[name], tensor.to({"fp32": torch.float32, "bf16": torch.bfloat16}[dtype])), (str(exported), name)


@WORLDS
def test_the_same_files_byte_by_byte(world, folders, tmp_path):
    todo = cases(world, folders)
    (tmp_path / "cases.json").write_text(json.dumps(todo))
    launch(world, tmp_path)
    negative = 0
    for case in todo:
        run = tmp_path / case["name"]
        there_and_back(run / "untrained" / ".model.partial", Path(case["run"]["model"]["path"]), case["run"]["model"]["dtype"])
        for (target, size), figures in zip(case["exports"], json.loads((run / "written.json").read_text())):
            name = "%s-%s" % (target, size)
            mine, theirs = run / name / "model", run / ("offline-" + name) / "model"
            assert not mine.exists() and figures["ranks"] == world
            from_ranks.complete(str(run), str(mine), target, size)
            made = to_hf(str(run), str(theirs), target=target, shard_size=size)
            ours, wanted = content(mine), content(theirs)
            assert sorted(ours) == sorted(wanted), (case["name"], name)
            assert [file for file in wanted if ours[file] != wanted[file]] == [], (case["name"], name)
            assert figures["bytes"] == made["bytes"] and not list((run / name).glob(".*"))
            assert len([file for file in wanted if file.endswith(".safetensors")]) == made["shards"]
            assert (made["shards"] > 1) == (size != "5GB")
            assert any(file.endswith(".bin") for file in wanted) == (target == "tgi-0.8" and "llama" in case["name"])
            negative += sum(data.count(b"\0\0\0\x80" if "fp32" in case["name"] else b"\0\x80") for data in wanted.values())
    assert negative, "no weight is -0.0"
