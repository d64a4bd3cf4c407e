"""pipedock bench with its real engines, on CPU processes: our pipeline, the ancestor's way and transformers on the same rows."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest

from bench import shapes
from bench.rows import drawn
from bench.task import Case
from bench.train import measured
from tests import compiler
from tests.models import make_hf, tiny_config
from tests.tokenizers import tiny_tokenizer

CASE = Case("ours", shapes.model_of("llama-tiny", 2), 32, 2, 2, dtype="fp32", steps=1, documents=drawn(24, 32))


def run(*options):
    command = [sys.executable, "-m", "pipedock", "bench", *options, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_our_pipeline_on_two_stages_with_its_stages_figures():
    row = measured(replace(CASE, pipe=2), False)
    assert "error" not in row, row
    assert row["packed"] and row["world"] == 2 and [rank["stage"] for rank in row["ranks"]] == [0, 1]
    assert all(0 < rank["busy_s"] <= rank["span_s"] for rank in row["ranks"])
    assert 7.0 < row["loss"] < 8.5  # ln 2048, and random weights
    assert 0 < row["learnt_tokens_per_s"] <= row["tokens_per_s"] <= row["positions_per_s"]


@pytest.mark.parametrize("engine, family, world", [
    ("ancestor", "llama", 1), ("ancestor", "bloom", 2), ("hf", "bloom", 1), ("hf-eager", "llama", 1), ("zero3", "llama", 2),
    ("fsdp2", "llama", 2), ("fsdp2", "bloom", 2),
    pytest.param("fsdp2-compiled", "llama", 2, marks=pytest.mark.skipif(not compiler.CAN, reason=compiler.WHY_NOT)),
])  # fmt: skip
def test_peers_train_the_same_geometry(engine, family, world):
    case = replace(CASE, engine=engine, model=shapes.model_of(family + "-tiny", 2))
    case = replace(case, pipe=world) if engine == "ancestor" else replace(case, data=world)
    row = measured(case, False)
    assert "error" not in row, row
    assert not row["packed"] and row["positions_per_s"] > row["tokens_per_s"]  # one padded document a row
    assert 7.0 < row["loss"] < 9.5


def test_an_engine_that_dies_is_a_row_with_its_last_words():
    row = measured(replace(CASE, engine="ancestor", model=dict(CASE.model, num_attention_heads=3)), False)
    assert row["engine"] == "ancestor" and row["error"]


def test_a_run_of_the_users_own(tmp_path):
    model = tmp_path / "model"
    tiny_tokenizer(model)
    make_hf(model, tiny_config("llama", vocab_size=512, max_position_embeddings=128))
    records = [{"type": "instruct", "instruct": "Say %d." % n, "output": "one two three"} for n in range(24)]
    (tmp_path / "train.json").write_text(json.dumps(records))
    document = {
        "run": {"out": str(tmp_path / "out")}, "model": {"path": str(model), "dtype": "fp32"},
        "data": {"train": str(tmp_path / "train.json"), "seq_len": 128}, "parallel": {"pipe": 2}, "batch": {"global": 4},
    }  # fmt: skip
    (tmp_path / "run.yaml").write_text(json.dumps(document))
    row = run("train", "--config", str(tmp_path / "run.yaml"), "--steps", "1")["rows"][0]
    assert row["pipe"] == 2 and row["seq"] == 128 and row["hidden"] == tiny_config("llama")["hidden_size"]
    assert 0 < row["learnt_tokens_per_s"] < row["tokens_per_s"]  # answers only
    assert not (tmp_path / "out").exists()


def test_conversion_beside_cp(tmp_path):
    rows = run("convert", "--dir", str(tmp_path))["rows"]
    assert [row["what"] for row in rows] == ["cp", "from-hf", "to-hf", "cp"]
    assert max(row["of_cp"] for row in rows if row["what"] == "cp") == 1.0 and all(row["seconds"] > 0 for row in rows)
    assert list(tmp_path.iterdir()) == []


def test_the_embedded_server_beside_generate():
    rows = run("serve", "--streams", "1,3", "--new-tokens", "8", "--seconds", "1", "--peers")["rows"]
    assert [(row["what"], row["streams"]) for row in rows] == [("embedded", 1), ("embedded", 3), ("generate", 1), ("generate", 3)]
    assert all(row["tokens_per_s"] > 0 for row in rows) and rows[2]["ratio"] == 1.0
    assert all(0 < row["first_token_s"] < 30 for row in rows[:2])
