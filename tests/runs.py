"""``pipedock train`` as a user runs it, for the tests that look at whole runs: start, kill, compare."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from pipeline_train import manifest, metrics, run_folder
from tests.models import computed, make_hf, tiny_config
from tests.tokenizers import tiny_tokenizer

ROOT = Path(__file__).resolve().parents[1]
CODE = "import sys; sys.path.insert(0, %r); import pipedock; sys.exit(pipedock.main())" % str(ROOT)
ENV = dict(os.environ, OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu")
START_S = 240  # a slow machine, many ranks


def command(*arguments):
    return [sys.executable, "-c", CODE, "train", "--set", "run.self_test=false"] + list(arguments)


def train(root, *arguments):
    line = command("--config", str(root / "run.yaml"), *arguments)
    return subprocess.run(line, capture_output=True, text=True, env=ENV, timeout=START_S)


def make(root, family="llama", records=34, **sections):
    """A tiny model, its data and root/run.yaml with ``sections``."""
    dims = {"llama": {"num_key_value_heads": 2, "tie_word_embeddings": True}, "bloom": {"tie_word_embeddings": False}}
    tiny_tokenizer(root / "model", "bpe")
    make_hf(root / "model", computed(tiny_config(family, vocab_size=600, **dims[family])))
    for name, count in (("train", records), ("eval", 9)):
        lines = [
            {"type": "instruct", "instruct": "Name %d colours." % n, "output": "Red, green, blue. " * (1 + n % 3)}
            for n in range(count)
        ]
        (root / (name + ".jsonl")).write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = {
        "run": {"out": str(root / "out"), "name": "colours"}, "model": {"path": str(root / "model")},
        "data": {"train": str(root / "train.jsonl"), "eval": str(root / "eval.jsonl"), "seq_len": 64},
    }  # fmt: skip
    for name, section in sections.items():
        run[name] = dict(run.get(name, {}), **section)
    (root / "run.yaml").write_text(json.dumps(run))


def lines_of(out, kind):
    """step -> the last metrics line of it."""
    return {line["step"]: line for line in metrics.read(out / "metrics.jsonl") if line["kind"] == kind}


def saved(out):
    """The checkpoints' folders, oldest first."""
    return sorted((out / "checkpoints").glob("step_*"))


def has_saved(out, number):
    """Whether there is a checkpoint of this step or a later one: the first of a fast run is soon removed again."""
    return any(run_folder.step_of(path) >= number for path in saved(out))


def same_end(wanted_out, out):
    """The same losses at every step, the same weights and moments at the end, bit by bit."""
    wanted, found = lines_of(wanted_out, "step"), lines_of(out, "step")
    assert sorted(found) == sorted(wanted)
    for step in wanted:
        for key in ("loss", "grad_norm", "lr", "tokens", "epoch"):
            assert found[step][key] == wanted[step][key], (step, key)
    last = saved(wanted_out)[-1]
    files = [name for name in manifest.read(last)["files"] if name.endswith(".safetensors")]
    assert len(files) >= 10
    for name in files:
        assert (last / name).read_bytes() == (out / "checkpoints" / last.name / name).read_bytes(), name


def rank_of(pid):
    """RANK in the environment of a process; None for one that is no rank or has gone."""
    try:
        variables = Path("/proc/%d/environ" % pid).read_bytes().split(b"\0")
    except OSError:
        return None
    return next((int(v[len(b"RANK=") :]) for v in variables if v.startswith(b"RANK=")), None)


def ranks_of(launcher):
    """rank -> process."""
    pids = [int(n) for n in Path("/proc/%d/task/%d/children" % (launcher, launcher)).read_text().split()]
    return {rank_of(pid): pid for pid in pids if rank_of(pid) is not None}


def at_step(number):
    """Ready when metrics.jsonl has a line of this step or a later one, written by this launch."""

    def ready(out, before):
        lines = metrics.read(out / "metrics.jsonl")[before:] if (out / "metrics.jsonl").exists() else []
        return any(line["kind"] == "step" and line["step"] >= number for line in lines)

    return ready


def when_saved(number):
    """Ready when there is a checkpoint of this step or a later one."""
    return lambda out, before: has_saved(out, number)


def killed(root, out, ready, victims, *arguments):
    """Start the run, or go on with it; when ``ready``, SIGKILL the ``victims``: ranks, "all" of them, or the "launcher".

    -> what it said. Checks that it ends soon, with code 1 (a killed launcher: -9), and leaves no process."""
    before = len(metrics.read(out / "metrics.jsonl")) if (out / "metrics.jsonl").exists() else 0
    line = command("--config", str(root / "run.yaml"), "--set", "run.out=%s" % out, "--resume", "auto", *arguments)
    with open(str(root / "killed.txt"), "w+") as said:
        parent = subprocess.Popen(line, stderr=said, stdout=said, env=ENV)
        deadline = time.monotonic() + START_S
        while not ready(out, before):
            assert parent.poll() is None and time.monotonic() < deadline, (root / "killed.txt").read_text()[-2000:]
            time.sleep(0.002)
        ranks = ranks_of(parent.pid)
        for pid in [parent.pid] if victims == "launcher" else [ranks[v] for v in ranks if victims == "all" or v in victims]:
            os.kill(pid, signal.SIGKILL)
        code = parent.wait(timeout=60)
        while any(Path("/proc/%d" % pid).exists() for pid in ranks.values()) and time.monotonic() < deadline:
            time.sleep(0.01)
    assert code == (-9 if victims == "launcher" else 1)
    assert not any(Path("/proc/%d" % pid).exists() for pid in ranks.values()), "a rank is left"
    return (root / "killed.txt").read_text()
