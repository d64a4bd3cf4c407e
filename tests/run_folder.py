"""A run folder as a finished training leaves it, without training: for the tests of the report."""

import json

from pipeline_train import config
from tests.models import tiny_config


def step_line(step, **fields):
    """A line of kind "step" of two stages."""
    line = {
        "kind": "step", "step": step, "loss": 3.0 - 0.001 * step, "grad_norm": 1.0 + step % 3, "lr": 1e-3, "tokens": 400,
        "learnt_tokens": 300, "samples": 6, "tokens_per_s": 2000.0, "learnt_tokens_per_s": 1500.0, "step_s": 0.2, "mfu": None,
        "stage_s": [0.15, 0.05], "mem_gib": [0.5, 0.25], "bubble": 0.5, "epoch": 0,
    }  # fmt: skip
    return dict(line, **fields)


def lines_of(total):
    """A start, ``total`` steps, an evaluation and a save after every tenth."""
    lines = [{"kind": "start", "step": 0, "total_steps": total}]
    for step in range(1, total + 1):
        lines.append(step_line(step))
        if step % 10 == 0:
            lines.append({"kind": "eval", "step": step, "loss": 3.5 - 0.001 * step, "tokens": 100})
            lines.append({"kind": "save", "step": step, "path": "checkpoints/step_%06d" % step, "seconds": 1.5, "stall_s": 0.25,
                          "asynchronous": True})  # fmt: skip
    return lines


def make_run(out, lines, name="colours", data_file="train.jsonl", **sections):
    """Write ``out``; ``sections`` replace sections of run.yaml."""
    resolved = out / "resolved"
    (resolved / "model").mkdir(parents=True)
    (out / "data").mkdir()
    raw = {
        "run": {"out": str(out), "name": name}, "model": {"path": "models/tiny", "dtype": "fp32"},
        "data": {"train": "train.jsonl", "seq_len": 64}, "parallel": {"pipe": 2, "parts": [3, 2]}, "batch": {"global": 6},
    }  # fmt: skip
    raw.update(sections)
    (resolved / "run.yaml").write_text(config.resolved_yaml(config.parse(raw)), encoding="utf-8")
    (resolved / "model" / "config.json").write_text(json.dumps(tiny_config("llama")))
    (resolved / "versions.json").write_text(json.dumps({"python": "3.11.7", "torch": "2.13.0"}))
    statistics = {"file": data_file, "records": 34, "bad": 1, "bad_lines": ["%s:3: no text" % data_file], "tokens": 2154,
                  "lengths": {"mean": 63.4}, "hash": "a98", "codec": {"tokenizer": "X"}, "warnings": []}  # fmt: skip
    (out / "data" / "train.json").write_text(json.dumps(statistics))
    (out / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return out
