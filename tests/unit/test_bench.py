"""pipedock bench: which rows are measured, which figures come of them, what a wrong question is answered with."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import pipedock
from bench import shapes, train
from bench.rows import Rows, drawn
from bench.task import Case
from pipeline_train import families
from pipeline_train.errors import RunFailed, UserError
from pipeline_train.models.loss import IGNORE
from verbs import bench as verb

DOCUMENTS = [(5, 2), (9, 9), (3, 1), (30, 4), (7, 7)]


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
def test_rows_hold_the_documents_and_count_them(packed):
    rows = Rows(DOCUMENTS, 16, packed, 100)
    batches, counts = rows.step(0, 6, 2)
    assert [batch.ids.shape for batch in batches] == [(2, 16)] * 3
    segments = torch.cat([batch.segments for batch in batches])
    positions = torch.cat([batch.positions for batch in batches])
    targets = torch.cat([batch.targets for batch in batches])
    ids = torch.cat([batch.ids for batch in batches])
    assert counts.positions == 6 * 16 and counts.tokens == int((segments > 0).sum())
    assert counts.learnt == int((targets != IGNORE).sum())
    assert counts.pairs == int((positions + 1)[segments > 0].sum())
    assert bool((segments.max(1).values == 1).all()) is not packed  # several documents a row, or one
    learnt = targets != IGNORE
    assert not bool(learnt[segments == 0].any())
    assert torch.equal(targets[:, :-1][learnt[:, :-1]], ids[:, 1:][learnt[:, :-1]])
    assert torch.equal(batches[0].labels[:, 1:], batches[0].targets[:, :-1]) and bool((batches[0].labels[:, 0] == IGNORE).all())


def test_every_document_comes_once_in_an_epoch_and_long_ones_are_cut():
    rows = Rows(DOCUMENTS, 16, True, 100)
    _, counts = rows.step(0, rows.rows.rows, 1)
    assert counts.tokens == 5 + 9 + 3 + 16 + 7 and counts.learnt == 2 + 9 + 1 + 4 + 7


def test_without_documents_rows_are_full():
    batches, counts = Rows([], 16, True, 100).step(3, 4, 4)
    assert counts.tokens == counts.positions == 64 and counts.pairs == 4 * 16 * 17 // 2
    assert bool((batches[0].segments == 1).all())


def test_drawn_documents_have_that_mean():
    lengths = [tokens for tokens, _ in drawn(212, 1024)]
    assert 205 < sum(lengths) / len(lengths) < 219 and min(lengths) >= 20
    assert drawn(0, 1024) == [] and max(tokens for tokens, _ in drawn(212, 100)) == 100


@pytest.mark.parametrize("name", sorted(shapes.SHAPES))
def test_every_named_shape_is_a_model(name):
    dims = families.dims_of(shapes.model_of(name, 3))
    assert dims.blocks == 3 and dims.family == name.split("-")[0]


def test_seven_billion_are_seven_billion():
    for name, least, most in (("llama-7b", 6.7e9, 6.8e9), ("bloom-7b", 7.0e9, 7.1e9), ("llama-65b", 65.2e9, 65.3e9)):
        dims = families.dims_of(shapes.model_of(name))
        family = families.FAMILIES[dims.family]
        total = sum(family.layer_params(dims, layer) for layer in range(dims.layers))
        total -= dims.vocab * dims.hidden if dims.tied else 0
        assert least < total < most, (name, total)


@pytest.mark.parametrize("name, blocks, message", [
    ("llama-7", None, "--model llama-7: did you mean llama-7b?"),
    ("nothing-like-it", None, "--model nothing-like-it: expected a config.json, a folder with one, or llama-7b, "),
    ("llama-7b", 0, "--blocks 0: must be at least 1"),
])  # fmt: skip
def test_shapes_that_cannot_be(name, blocks, message):
    with pytest.raises(UserError) as error:
        shapes.model_of(name, blocks)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize("content, message", [("[1]", "is no config.json"), ("{", "cannot be read as JSON: ")])
def test_a_file_that_is_no_config(tmp_path, content, message):
    path = tmp_path / "config.json"
    path.write_text(content)
    with pytest.raises(UserError) as error:
        shapes.model_of(str(path))
    assert str(error.value).startswith("--model %s: %s" % (path, message))


def test_a_config_json_is_measured_with_other_blocks(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(shapes.SHAPES["bloom-tiny"]))
    assert shapes.model_of(str(path), 2)["n_layer"] == shapes.model_of(str(tmp_path), 2)["n_layer"] == 2


CASE = Case("ours", shapes.SHAPES["llama-tiny"], 64, 2, 8)


def test_peers_get_the_same_rows_in_other_micro_batches():
    assert [train.with_micro(CASE, micro).micro_batches for micro in (1, 2, 4, 8)] == [16, 8, 4, 2]
    assert all(train.with_micro(CASE, micro).rows == CASE.rows for micro in (1, 2, 4, 8))
    assert train.with_micro(CASE, 3) is None and train.with_micro(CASE, 32) is None
    whole = replace(CASE, engine="fsdp2", pipe=4)  # every rank is a replica
    assert train.with_micro(whole, 4).micro == 4 and train.with_micro(whole, 8) is None


def test_the_best_micro_batch_is_kept_and_the_first_that_fails_ends_the_search(monkeypatch):
    speeds, tried = {1: 10.0, 2: 30.0, 4: 20.0}, []

    def measured(case, cuda):
        tried.append(case.micro)
        if case.micro not in speeds:
            return {"engine": case.engine, "micro": case.micro, "error": "out of memory"}
        return {"engine": case.engine, "micro": case.micro, "tokens_per_s": speeds[case.micro], "learnt_tokens_per_s": 0.0,
                "step_s": 1.0, "mfu": 0.5, "gib": [1.0]}  # fmt: skip

    monkeypatch.setattr(train, "measured", measured)
    said = []
    rows = train.bench(CASE, True, True, said.append)
    assert tried == [2] + [1, 2, 4, 8] * 3
    assert [(row["engine"], row["micro"]) for row in rows] == [("ours", 2), ("ancestor", 2), ("hf", 2), ("hf-compiled", 2)]
    assert [row["ratio"] for row in rows] == [1.0] * 4
    assert "ancestor     micro 8: out of memory" in said and "ours         micro 2: 30 tokens/s" in said[0]
    speeds.clear()
    with pytest.raises(train.RunFailed) as error:
        train.bench(CASE, True, True, said.append)
    assert str(error.value) == "bench: our pipeline: out of memory"


def test_a_row_that_failed_has_no_ratio_and_still_a_line_in_the_table():
    good = {"engine": "ours", "micro": 2, "tokens_per_s": 30.0, "learnt_tokens_per_s": 20.0, "positions_per_s": 31.0, "mfu": None,
            "gib": [1.0, 2.0], "step_s": 0.5, "ratio": 1.0}  # fmt: skip
    text = verb.text({"what": "train", "rows": [good, {"engine": "hf", "micro": 1, "error": "out of memory"}]})
    lines = text.splitlines()
    assert lines[0].split() == "engine micro tokens/s learnt tokens/s with padding MFU GiB step s ours is".split()
    assert lines[1].split() == ["ours", "2", "30", "20", "31", "-", "2.00", "0.500", "1.00", "x"]
    assert lines[2].split() == ["hf", "1", "out", "of", "memory"]


@pytest.mark.parametrize("options, message", [
    (["--micro", "0"], "--micro 0: must be at least 1"),
    (["--documents", "-1"], "--documents -1: must be 0 or more"),
    (["--model", "llama-tiny", "--pipe", "7"], "--pipe: 7 stages, but the model has only 6 layers"),
    (["--model", "llama-tiny", "--seq-len", "5000"], "--seq-len 5000: the model has 4096 positions"),
    (["--model", "llama-tiny", "--dtype", "fp16"], "bench train: --dtype fp16 needs a GPU, and none is here"),
    (["--model", "llama-tiny", "--fp8"], "--fp8: is for bf16 runs, and this one is in fp32; set --dtype bf16, or leave --fp8 out"),
])  # fmt: skip
def test_what_cannot_be_measured(options, message):
    command = [sys.executable, "-m", "pipedock", "bench", "train", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith("pipedock bench: " + message), done.stderr


def test_a_folder_that_cannot_be_worked_in():
    from bench import convert

    with pytest.raises(UserError) as error:
        convert.bench(shapes.SHAPES["llama-tiny"], "/nowhere/at/all", False, print)
    assert str(error.value) == "--dir /nowhere/at/all: No such file or directory"


@pytest.mark.parametrize("options, message", [
    (["--streams", "1,x"], "--streams 1,x: expected numbers of streams, such as 1,16"),
    (["--streams", "0"], "--streams 0: expected numbers of streams, such as 1,16"),
    (["--new-tokens", "0"], "--new-tokens, --seconds: must be more than 0"),
    (["--model", "llama-7"], "--model llama-7: did you mean llama-7b?"),
    (["--dtype", "fp8"], "--dtype fp8: expected one of fp16, bf16, fp32, float16, bfloat16, float32"),
])  # fmt: skip
def test_a_server_that_cannot_be_measured(options, message, capfd):
    from pipedock import main

    assert main(["bench", "serve", *options]) == 2
    assert capfd.readouterr().err.splitlines()[-1] == "pipedock bench: " + message


def test_a_folder_that_is_no_model(tmp_path, capfd):
    from pipedock import main

    assert main(["bench", "serve", "--model", str(tmp_path)]) == 2
    assert "--model %s: no config.json; expected a model folder" % tmp_path in capfd.readouterr().err


def test_a_servers_model_is_the_one_of_the_users_folder(tmp_path, monkeypatch):
    from bench import serve as bench_serve

    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    given = []

    def server(folder, *flags):
        given.append(folder)
        raise RunFailed("enough")

    monkeypatch.setattr(bench_serve, "Server", server)
    with pytest.raises(RunFailed, match="enough"):
        bench_serve.bench(Path("m"), [1], 8, 0.1, False, print)
    assert given == [tmp_path / "m"]


def test_the_table_of_servers():
    rows = [{"what": "embedded", "streams": 16, "tokens_per_s": 50.0, "first_token_s": 0.125, "ratio": 5.0},
            {"what": "generate", "streams": 1, "tokens_per_s": 10.0, "first_token_s": None}]  # fmt: skip
    lines = verb.text({"what": "serve", "rows": rows}).splitlines()
    assert lines[1].split() == ["embedded", "16", "50.0", "0.125", "5.00", "x"] and lines[2].split() == [
        "generate",
        "1",
        "10.0",
        "-",
        "-",
    ]


def test_a_stream_that_breaks_off_is_said_once(monkeypatch, capfd):
    from bench import serve as bench_serve

    calls = []

    def broken(*args):
        calls.append(args)
        if len(calls) > 1:  # the first warms up
            raise RunFailed("bench serve: data: {}")

    monkeypatch.setattr(bench_serve, "_stream", broken)
    with pytest.raises(RunFailed, match="^bench serve: a stream broke off: bench serve: data: {}$"):
        bench_serve._streams(None, 3, 8, 0.05)
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize("option", [["--model", "llama-tiny"], ["--blocks", "2"]])
def test_a_run_is_measured_with_its_own_model(option, capfd):
    assert pipedock.main(["bench", "train", "--config", "run.yaml"] + option) == 2
    assert "%s: not with --config, which measures the model of that run" % option[0] in capfd.readouterr().err
