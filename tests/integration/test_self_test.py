"""``pipedock train --self-test``: passes here, notices what it is there for, and is asked once per environment."""

import json
import os
import signal
import sys
import threading

import pytest
import yaml

from pipedock import main
from pipeline_train import compat, config, families, prepare, selftest_run
from pipeline_train.errors import RunFailed
from tests.models import computed, make_hf, tiny_config
from tests.tokenizers import tiny_tokenizer

FIGURES = {"loss", "grad_norm", "gradients", "losses"}
START = "import sys; sys.path.insert(0, %r); sys.argv[0] = ''\n%s\nfrom pipeline_train import selftest; selftest.main()"
FAULTS = {
    # What DeepSpeed 0.16 does: the loss that is told is right, its gradient is multiplied by the 4 micro-batches.
    "scaled": "from pipeline_train.stages import Stage\n"
    "right = Stage.loss\n"
    "def wrong(self, logits, targets):\n"
    "    loss = right(self, logits, targets)\n"
    "    return loss + 3 * (loss - loss.detach())\n"
    "Stage.loss = wrong\n",
    # What ZeRO stage 0 does in fp32: every stage clips by its own norm.
    "stage-local": "from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer\n"
    "DeepSpeedZeroOptimizer._model_parallel_all_reduce = lambda *args, **kwargs: None\n",
    "crash": "from pipeline_train import selftest\n"
    "def make_model(*args): raise ValueError('no room\\nfor it')\n"
    "selftest.make_model = make_model\n",
}


@pytest.fixture(autouse=True)
def here(monkeypatch, tmp_path):
    """On the CPU, with a cache of its own."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def run_yaml(tmp_path):
    tiny_tokenizer(tmp_path / "model")
    make_hf(tmp_path / "model", computed(tiny_config("llama", vocab_size=512, tie_word_embeddings=True, num_key_value_heads=2)))
    (tmp_path / "train.jsonl").write_text(json.dumps({"type": "pretrain", "text": "a small text " * 30}) + "\n")
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({
        "run": {"out": str(tmp_path / "out")}, "model": {"path": str(tmp_path / "model")},
        "data": {"train": str(tmp_path / "train.jsonl"), "seq_len": 32}, "parallel": {"pipe": 2}, "batch": {"global": 2},
        "train": {"max_steps": 2},
    }))  # fmt: skip
    return tmp_path / "run.yaml"


def plant(monkeypatch, tmp_path, fault):
    script = tmp_path / "faulty.py"
    script.write_text(START % (sys.path[0], FAULTS[fault]))
    monkeypatch.setattr(selftest_run, "RANK", [str(script)])


def test_without_a_config_both_families_pass_and_are_recorded(capfd, tmp_path):
    assert main(["train", "--self-test", "--json"]) == 0
    answer = json.loads(capfd.readouterr().out)
    assert answer["ok"] is True and set(answer["worst"]) == FIGURES and answer["seconds"] > 0
    assert [(c["family"], c["pipe"], c["dtype"], c["ok"]) for c in answer["cases"]] == [
        ("bloom", 2, "fp32", True), ("llama", 2, "fp32", True),
    ]  # fmt: skip
    assert answer["worst"]["gradients"] <= 1e-5 and answer["worst"]["losses"] <= 1e-4
    assert 0 < answer["worst"]["gradients"], "two ways of adding up that never differ were not compared"
    assert json.loads((tmp_path / "cache" / "pipedock" / "self-test" / (answer["key"] + ".json")).read_text()) == answer


def test_gradients_scaled_by_the_micro_batches_stop_train_before_its_first_step(capfd, monkeypatch, tmp_path, run_yaml):
    plant(monkeypatch, tmp_path, "scaled")
    assert main(["train", "--config", str(run_yaml), "--json"]) == 1
    out, err = capfd.readouterr()
    line = err.strip().splitlines()[-1]
    assert line.startswith("pipedock train: self-test: llama, 2 stages x 1 replicas, fp32: the gradient norm is 3.0e+00 away from")
    assert "(limit 1e-05)" in line and "run.self_test: false" in line and "Traceback" not in err
    document = json.loads(out)
    assert document["ok"] is False and document["worst"]["grad_norm"] == pytest.approx(3, rel=1e-4) and document["error"] in line
    assert document["worst"]["loss"] <= 1e-5, "the loss looks right, as in DeepSpeed 0.16"
    assert not (tmp_path / "out" / "metrics.jsonl").exists() and not (tmp_path / "cache" / "pipedock").exists()
    assert (tmp_path / "out" / "logs" / "self_test" / "rank_0.log").exists()


def test_a_stage_local_clip_norm_fails(capfd, monkeypatch, tmp_path, run_yaml):
    plant(monkeypatch, tmp_path, "stage-local")
    assert main(["train", "--self-test", "--config", str(run_yaml)]) == 1
    line = capfd.readouterr().err.strip().splitlines()[-1]
    assert "a gradient is " in line and "furthest: layer " in line and "the loss is" not in line


def test_a_rank_that_fails_is_told(capfd, monkeypatch, tmp_path, run_yaml):
    plant(monkeypatch, tmp_path, "crash")
    assert main(["train", "--self-test", "--config", str(run_yaml)]) == 1
    assert "pipedock train: self-test: rank 0: no room for it. Log: " in capfd.readouterr().err


def prepared(tmp_path, **run):
    (tmp_path / "resolved").mkdir(exist_ok=True)
    sections = {"model": {"path": "m", "dtype": "fp32"}, "data": {"train": "t"}, "parallel": {"pipe": 2}}
    made = config.parse(dict(sections, run=dict(run, out=str(tmp_path))))
    dims = families.dims_of(tiny_config("llama", tie_word_embeddings=True))
    return prepare.Prepared(made, tmp_path, dims, 0, 10, None, 0)


def test_an_environment_is_tested_once(monkeypatch, tmp_path):
    said, tested = [], []

    def fake(cases, gpus, folder, check):
        tested.append(folder)
        worst = dict.fromkeys(FIGURES, 1e-7)
        return {"ok": True, "cases": [], "worst": worst, "seconds": 1}

    monkeypatch.setattr(selftest_run, "test", fake)
    for _ in range(2):
        selftest_run.once(prepared(tmp_path), said.append)
    assert tested == [tmp_path / "logs" / "self_test"] and said[1].startswith("self-test: passed in 1 s") and len(said) == 2
    assert json.loads((tmp_path / "resolved" / "self_test.json").read_text())["ok"] is True

    versions = dict(compat.versions(), torch="9.9")
    with monkeypatch.context() as changed:
        changed.setattr(compat, "versions", lambda: versions)
        selftest_run.once(prepared(tmp_path), said.append)
    assert len(tested) == 2, "another torch is another environment"
    for file in (tmp_path / "cache" / "pipedock" / "self-test").iterdir():
        file.write_text("{torn")
    selftest_run.once(prepared(tmp_path), said.append)
    assert len(tested) == 3, "a record that cannot be read is none"

    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    selftest_run.once(prepared(tmp_path), said.append)
    assert "passed, but that cannot be recorded" in said[-1] and "Not a directory" in said[-1]

    del said[:]
    selftest_run.once(prepared(tmp_path, self_test=False), said.append)
    assert said == ["self-test: skipped (run.self_test: false)"] and len(tested) == 4


def test_the_key_follows_the_source_the_device_and_the_case(monkeypatch, tmp_path):
    run = prepared(tmp_path).config
    cases = selftest_run.cases_of(run, None, 0)
    keys = {selftest_run.key_of(cases, 0), selftest_run.key_of(cases[:1], 0)}
    keys.add(selftest_run.key_of(cases, 2))
    monkeypatch.setattr(selftest_run, "DRIVER", tmp_path / "nvidia")
    (tmp_path / "nvidia" / "gpus" / "0000:01:00.0").mkdir(parents=True)
    for path, line in (("version", "NVRM version: 535.1"), ("gpus/0000:01:00.0/information", "Model: \t Tesla T4")):
        (tmp_path / "nvidia" / path).write_text(line + "\nIRQ: 3\n")
        keys.add(selftest_run.key_of(cases, 2))
    (tmp_path / "nvidia" / "version").write_text("NVRM version: 535.1\nIRQ: 4\n")
    keys.add(selftest_run.key_of(cases, 2))
    monkeypatch.setattr(selftest_run, "__file__", str(tmp_path / "selftest_run.py"))
    (tmp_path / "a.py").write_text("x = 1\n")
    keys.add(selftest_run.key_of(cases, 2))
    (tmp_path / "a.py").write_text("x = 2\n")
    keys.add(selftest_run.key_of(cases, 2))
    assert len(keys) == 7


def layouts(tmp_path, gpus, **parallel):
    run = prepared(tmp_path).config
    for name, value in parallel.items():
        setattr(run.parallel, name, value)
    case = selftest_run.cases_of(run, prepared(tmp_path).dims, gpus)[0]
    made = case["run"]["parallel"]
    return made["pipe"], made["data"], case


def test_a_case_is_the_runs_kind_as_far_as_the_machine_goes(tmp_path):
    assert layouts(tmp_path, 0, pipe=8)[:2] == (4, 1)
    assert layouts(tmp_path, 0, pipe=2, data=3)[:2] == (2, 2)
    assert layouts(tmp_path, 1, pipe=1, data=1)[:2] == (1, 1)
    assert layouts(tmp_path, 16, pipe=16)[:2] == (8, 1), "the tiny model has 8 layers"
    assert layouts(tmp_path, 8, pipe=8, data=2)[:2] == (8, 1)
    case = layouts(tmp_path, 0, recompute="blocks", axes=["data", "pipe"])[2]
    assert case["model"]["tie_word_embeddings"] is True and "num_key_value_heads" not in case["model"]
    assert case["run"]["parallel"]["recompute"] == "blocks" and case["run"]["parallel"]["axes"] == ["data", "pipe"]


def test_limits_and_what_is_no_number():
    cpu, gpu, bf16 = selftest_run.limits("fp32", False), selftest_run.limits("fp32", True), selftest_run.limits("bf16", True)
    assert cpu["gradients"] == 1e-5 and gpu["gradients"] == 1e-4 and gpu["gradients"] < bf16["gradients"] < 0.5
    import torch

    from pipeline_train import selftest

    assert selftest.off(torch.tensor([1.0, float("nan")]), torch.ones(2)) == selftest.FAR
    assert selftest.furthest([(1.0, 1.0), (None, 1.0), (1.1, 1.0)]) == selftest.FAR
    assert selftest.furthest([(1.1, 1.0), (2.0, 2.0)]) == pytest.approx(0.1, rel=1e-5)
    ours = [{"losses": [1.0], "norms": [1.0], "gradients": {"0/a": torch.ones(2)}}]
    theirs = {"losses": [1.0], "norms": [1.0], "gradients": {"a": torch.ones(2), "b": torch.ones(2)}}
    with pytest.raises(AssertionError, match="not compared"):
        selftest.compare(ours, theirs, {"0/a": "a", "1/b": "b"})


def test_the_message_names_every_figure_that_is_off(monkeypatch, tmp_path):
    found = {"loss": 0.5, "grad_norm": 0.0, "gradients": 2.0, "losses": 0.5, "where": "3/mlp.up_proj.weight"}
    monkeypatch.setattr(selftest_run.launch, "supervise", lambda ranks: {"figures": [found]})
    cases = selftest_run.cases_of(prepared(tmp_path).config, prepared(tmp_path).dims, 0)
    with pytest.raises(RunFailed) as failed:
        selftest_run.test(cases, 0, tmp_path / "log")
    text = str(failed.value)
    assert "the loss is 5.0e-01 away from transformers' (limit 1e-05), a gradient is 2.0e+00" in text
    assert "a loss of the first 5 steps is 5.0e-01" in text and "furthest: layer 3, mlp.up_proj.weight" in text
    assert "gradient norm" not in text and failed.value.document["ok"] is False


def test_why_another_node_has_ended_it_is_said(tmp_path, monkeypatch):
    """The launcher stops what it does by a signal to itself when another node is gone; its line is that node's."""
    script = tmp_path / "rank.py"
    script.write_text("import time\ntime.sleep(60)\n")
    monkeypatch.setattr(selftest_run, "RANK", [str(script)])
    cases = [{"run": {"parallel": {"pipe": 1, "data": 1}}}]
    threading.Timer(1.0, lambda: os.kill(os.getpid(), signal.SIGTERM)).start()

    def check():
        raise RunFailed("node 1 (b) is gone")

    with pytest.raises(RunFailed) as error:
        selftest_run.test(cases, 0, tmp_path / "logs", check)
    assert str(error.value) == "node 1 (b) is gone"
