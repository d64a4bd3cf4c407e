"""``pipedock train`` as a user runs it: real processes, packed data, checkpoints, resume, death.

One model (tied llama, grouped queries), one data set, two epochs with an evaluation; few launches, many looks at each.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from pipeline_train import manifest, metrics
from tests.models import computed, make_hf, tiny_config
from tests.tokenizers import tiny_tokenizer

ROOT = Path(__file__).resolve().parents[2]
CODE = "import sys; sys.path.insert(0, %r); import pipedock; sys.exit(pipedock.main())" % str(ROOT)


def command(*arguments):
    return [sys.executable, "-c", CODE, "train", "--set", "run.self_test=false"] + list(arguments)


def train(root, *arguments):
    env = dict(os.environ, OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu")
    return subprocess.run(
        command("--config", str(root / "run.yaml"), *arguments), capture_output=True, text=True, env=env, timeout=240
    )


def steps_of(out):
    """step -> its last line."""
    return {line["step"]: line for line in metrics.read(out / "metrics.jsonl") if line["kind"] == "step"}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A finished run in root/out: two epochs, saves after every 4 steps and at the end."""
    root = tmp_path_factory.mktemp("run")
    tiny_tokenizer(root / "model", "bpe")
    made = computed(tiny_config("llama", vocab_size=600, tie_word_embeddings=True, num_key_value_heads=2))
    make_hf(root / "model", made)
    for name, count in (("train", 34), ("eval", 9)):
        records = [
            {"type": "instruct", "instruct": "Name %d colours." % n, "output": "Red, green, blue. " * (1 + n % 3)}
            for n in range(count)
        ]
        (root / (name + ".jsonl")).write_text("".join(json.dumps(record) + "\n" for record in records))
    run = {
        "run": {"out": str(root / "out"), "name": "colours"}, "model": {"path": str(root / "model")},
        "data": {"train": str(root / "train.jsonl"), "eval": str(root / "eval.jsonl"), "seq_len": 64},
        "parallel": {"pipe": 2, "recompute": "blocks"}, "batch": {"global": 6}, "optim": {"lr": 1e-3, "warmup": 2},
        "train": {"epochs": 2, "save_every": 4, "eval_every": 3, "keep": 2},
    }  # fmt: skip
    (root / "run.yaml").write_text(json.dumps(run))
    done = train(root, "--json")
    assert done.returncode == 0, done.stderr[-2000:]
    (root / "answer.json").write_text(done.stdout)
    (root / "stderr.txt").write_text(done.stderr)
    return root


def test_the_answer_and_the_folder_are_what_the_interface_says(root):
    answer = json.loads((root / "answer.json").read_text())
    total = answer["steps"]
    assert set(answer) == {"out", "steps", "loss_first", "loss_last", "seconds", "tokens", "peak_gib", "checkpoint"}
    assert answer["loss_last"] < answer["loss_first"] and len(answer["peak_gib"]) == 2 and min(answer["peak_gib"]) > 0.05
    lines = metrics.read(root / "out" / "metrics.jsonl")
    assert [line["step"] for line in lines if line["kind"] == "step"] == list(range(1, total + 1))
    keys = {"step", "loss", "grad_norm", "lr", "tokens", "learnt_tokens", "tokens_per_s", "mfu", "step_s", "mem_gib"}
    assert all(keys <= set(line) for line in lines if line["kind"] == "step")
    assert {line["epoch"] for line in lines if line["kind"] == "step"} == {0, 1}
    assert sum(line["tokens"] for line in lines if line["kind"] == "step") == answer["tokens"]
    assert [line["step"] for line in lines if line["kind"] == "save"] == list(range(4, total, 4)) + [total]
    assert [line["step"] for line in lines if line["kind"] == "eval"] == list(range(3, total, 3)) + [total]
    assert "step %d/%d  loss" % (total, total) in (root / "stderr.txt").read_text()
    assert "peak memory per stage:" in (root / "stderr.txt").read_text()
    assert json.loads((root / "out" / "resolved" / "deepspeed.json").read_text())["zero_optimization"]["stage"] == 1


def test_checkpoints_are_whole_self_contained_and_pruned(root):
    answer = json.loads((root / "answer.json").read_text())
    folders = sorted((root / "out" / "checkpoints").glob("step_*"))
    assert len(folders) == 2 and str(folders[-1]) == answer["checkpoint"]  # keep: 2
    assert (root / "out" / "checkpoints" / "latest").read_text() == folders[-1].name + "\n"
    document = manifest.read(folders[-1])
    assert (document["kind"], document["step"], document["layers"], document["tied"]) == ("checkpoint", answer["steps"], 5, True)
    for name, entry in document["files"].items():
        assert manifest.file_entry(folders[-1] / name) == entry
    names = set(document["files"])
    assert {"config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"} <= names
    assert {manifest.layer_file(n) for n in range(5)} | {manifest.optim_file(n) for n in range(5)} <= names
    assert {p.name for p in folders[-1].iterdir()} == names | {"manifest.json"}


def test_checkpoints_read_back_strictly(root):
    from safetensors.torch import load_file

    from pipeline_train.weights import open_source

    source = open_source(str(root / "out"))
    source.check()
    head, embed = source.layer(4), source.layer(0)
    assert torch.equal(head["lm_head.weight"], embed["embed_tokens.weight"]) and head["lm_head.weight"].dtype == torch.float32
    state = load_file(str(source.folder / manifest.optim_file(2)))
    assert set(state) == {"%s::%s" % (name, moment) for name in source.layer(2) for moment in ("exp_avg", "exp_avg_sq")}


def resumed(root, name, *arguments):
    """Copy the run as if it had died after its first kept checkpoint, resume it, -> its folder."""
    out = root / name
    shutil.copytree(str(root / "out"), str(out))
    first, last = sorted((out / "checkpoints").glob("step_*"))
    shutil.rmtree(str(last))
    (out / "checkpoints" / "latest").write_text(first.name + "\n")
    lines = (out / "metrics.jsonl").read_text().splitlines(True)
    kept = [line for line in lines if json.loads(line)["step"] <= int(first.name[5:])]
    (out / "metrics.jsonl").write_text("".join(kept) + '{"step": 9, "lo')  # a torn tail
    done = train(root, "--set", "run.out=%s" % out, "--resume", *arguments)
    assert done.returncode == 0, done.stderr[-2000:]
    return out


def test_resume_is_bit_equal_and_evaluation_disturbs_nothing(root):
    """The first run evaluated after every third step, this one only at the end."""
    out = resumed(root, "again", "--set", "train.eval_every=1000")
    same_end(root / "out", out)


def same_end(wanted_out, out):
    """The same losses at every step, the same weights and moments at the end, bit by bit."""
    wanted, found = steps_of(wanted_out), steps_of(out)
    assert sorted(found) == sorted(wanted)
    for step in wanted:
        assert all(found[step][key] == wanted[step][key] for key in ("loss", "grad_norm", "lr", "tokens", "epoch")), step
    last = sorted((wanted_out / "checkpoints").glob("step_*"))[-1].name
    for layer in range(5):
        for name in (manifest.layer_file(layer), manifest.optim_file(layer)):
            pair = [(folder / "checkpoints" / last / name).read_bytes() for folder in (wanted_out, out)]
            assert pair[0] == pair[1], name


def test_resume_at_other_stages_replicas_and_without_eval_has_the_same_losses(root):
    out = resumed(root, "other", "--set", "parallel.pipe=1", "--set", "parallel.data=2", "--set", "data.eval=null")
    wanted, found = steps_of(root / "out"), steps_of(out)
    assert sorted(found) == sorted(wanted)
    assert [found[s]["loss"] for s in sorted(found)] == pytest.approx([wanted[s]["loss"] for s in sorted(wanted)], rel=1e-5)
    assert [found[s]["grad_norm"] for s in sorted(found)] == pytest.approx(
        [wanted[s]["grad_norm"] for s in sorted(wanted)], rel=1e-4
    )


def test_a_finished_run_resumes_to_exit_0(root):
    done = train(root, "--resume", "auto", "--json")
    assert done.returncode == 0 and "finished already" in done.stderr
    assert json.loads(done.stdout)["finished"] is True


def test_the_stack_check_and_the_printed_config(root):
    done = train(root, "--stack-check", "--json")
    assert done.returncode == 0 and json.loads(done.stdout)["ok"] is True
    assert train(root, "--stack-check").stdout.rstrip().endswith("ok")
    printed = train(root, "--print-config", "--set", "optim.lr=2e-5").stdout
    assert "lr: 2.0e-05" in printed and "save_every: 4" in printed


def children(pid):
    return [int(n) for n in Path("/proc/%d/task/%d/children" % (pid, pid)).read_text().split()]


def test_a_killed_rank_ends_the_run_and_the_run_goes_on_as_if_nothing_had_happened(root):
    """kill -9 after the first save: exit 1 within seconds, no process left, the cause told. Resumed, it ends in the same bytes as
    the run that nobody killed."""
    out = root / "killed"
    arguments = ["--config", str(root / "run.yaml"), "--set", "run.out=%s" % out]
    env = dict(os.environ, OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu")
    parent = subprocess.Popen(command(*arguments), stderr=subprocess.PIPE, text=True, env=env)
    first, deadline = out / "checkpoints" / "step_000004", time.monotonic() + 120
    while not first.exists() and time.monotonic() < deadline:
        time.sleep(0.001)
    ranks = children(parent.pid)
    assert len(ranks) == 2
    os.kill(ranks[1], signal.SIGKILL)
    killed = time.monotonic()
    error = parent.communicate(timeout=60)[1]
    assert parent.returncode == 1 and time.monotonic() - killed < 20
    assert error.strip().splitlines()[-1].startswith("pipedock train: rank 1: was killed by SIGKILL")
    assert not any(Path("/proc/%d" % pid).exists() for pid in ranks)
    assert manifest.find_checkpoint(out) == first
    done = train(root, "--set", "run.out=%s" % out, "--resume")
    assert done.returncode == 0, done.stderr[-2000:]
    same_end(root / "out", out)


def test_a_loss_that_is_not_a_number_stops_the_run_and_names_the_step(root):
    from safetensors.torch import load_file, save_file

    shutil.copytree(str(root / "model"), str(root / "broken"))
    tensors = load_file(str(root / "broken" / "model.safetensors"))
    tensors["model.norm.weight"][3] = float("inf")
    save_file(tensors, str(root / "broken" / "model.safetensors"), metadata={"format": "pt"})
    done = train(root, "--set", "run.out=%s" % (root / "nan"), "--set", "model.path=%s" % (root / "broken"))
    assert done.returncode == 1 and "Traceback" not in done.stderr
    line = done.stderr.strip().splitlines()[-1]
    assert line.startswith("pipedock train: rank ") and ": step 1: the loss is nan, stopped before saving. Its samples: " in line
    assert "train.jsonl:" in line and "Log: " in line
    assert not (root / "nan" / "checkpoints").exists()
