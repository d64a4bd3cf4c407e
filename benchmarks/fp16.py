"""fp16 with dynamic loss scaling beside bf16 and fp32, through ``pipedock train`` itself on one GPU: one JSON row per run.

    python benchmarks/fp16.py                    # llama of 8 blocks x hidden 512 from scratch on this repository's own text

fp32, bf16, fp16   the same data, seed and schedule
fp16-high          the loss scale begins at 2^32, so that the first steps overflow and it has to come down
fp16-resumed       fp16-high stopped half-way and resumed: the scaler goes on counting where it was

Exit 1 when a run does not learn, when fp16's loss at the end (mean of the last tenth) is more than 2 % from bf16's, when
fp16-high skips nothing, or when the resumed run doubles its scale at another step than the one that nobody stopped. The losses
of two runs on a GPU differ a little from the first steps on (the order of sums in the attention's backward pass), so later
overflows may come at other steps.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Dict, List

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from pipeline_train import compat, metrics  # noqa: E402
from tests.tokenizers import tiny_tokenizer  # noqa: E402

WINDOW = 50  # less than half of the steps
HIGH = ["model.dtype=fp16", "optim.loss_scale.initial=4294967296", "optim.loss_scale.window=%d" % WINDOW]
RUNS = {"fp32": ["model.dtype=fp32"], "bf16": ["model.dtype=bf16"], "fp16": ["model.dtype=fp16"], "fp16-high": HIGH}


def prepare(folder: Path, steps: int) -> None:
    tiny_tokenizer(folder / "model")
    model = {
        "model_type": "llama", "vocab_size": 4096, "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8,
        "num_attention_heads": 8, "num_key_value_heads": 8, "eos_token_id": 2, "max_position_embeddings": 512,
    }  # fmt: skip
    (folder / "model" / "config.json").write_text(json.dumps(model))
    files = sorted(p for name in ("pipeline_train", "export", "serve", "tests") for p in (ROOT / name).rglob("*.py"))
    with open(str(folder / "train.jsonl"), "w") as file:
        for path in files:
            file.write(json.dumps({"type": "pretrain", "text": path.read_text(encoding="utf-8")}) + "\n")
    run = {
        "run": {"out": "-", "self_test": False}, "model": {"path": str(folder / "model"), "init": "random"},
        "data": {"train": str(folder / "train.jsonl"), "seq_len": 512}, "parallel": {"pipe": 1},
        "batch": {"micro": 8, "global": 16}, "optim": {"lr": 1e-3, "warmup": 10, "schedule": "constant"},
        "train": {"epochs": 1000, "max_steps": steps},
    }  # fmt: skip
    (folder / "run.yaml").write_text(json.dumps(run))


def train(folder: Path, name: str, sets: List[str]) -> Dict[str, Any]:
    """One run, or the continuation of one -> its row."""
    out = folder / name
    command = [sys.executable, str(ROOT / "pipedock.py"), "train", "--config", str(folder / "run.yaml"), "--resume", "auto"]
    for item in ["run.out=%s" % out] + sets:
        command += ["--set", item]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit("%s: %s" % (name, done.stderr.strip()[-2000:]))
    steps = [line for line in metrics.read(out / "metrics.jsonl") if line["kind"] == "step"]
    losses = [line["loss"] for line in steps]
    tail = [loss for loss in losses[-max(1, len(losses) // 10) :] if loss is not None]
    return {
        "run": name, "steps": len(steps), "first": losses[0], "last": sum(tail) / len(tail), "losses": losses,
        "skipped": sum(line.get("skipped", 0) for line in steps), "scales": [line.get("loss_scale") for line in steps],
        "memory_gib": max(max(line["mem_gib"]) for line in steps),
        "step_s": sorted(line["step_s"] for line in steps)[len(steps) // 2],
    }  # fmt: skip


def problems(rows: Dict[str, Dict[str, Any]]) -> List[str]:
    found = []
    for name, row in rows.items():
        first = next(loss for loss in row["losses"] if loss is not None)
        if not row["last"] < 0.7 * first:
            found.append("%s learns nothing: %.3f -> %.3f" % (name, first, row["last"]))
    if abs(rows["fp16"]["last"] / rows["bf16"]["last"] - 1) > 0.02:
        found.append("fp16 ends at %.4f, bf16 at %.4f" % (rows["fp16"]["last"], rows["bf16"]["last"]))
    high, resumed = rows["fp16-high"], rows["fp16-resumed"]
    if not high["skipped"]:
        found.append("fp16-high skipped nothing")
    counted = len(high["scales"]) // 2 + WINDOW  # the resume, and a whole window of steps after it
    if resumed["scales"][:counted] != high["scales"][:counted]:
        found.append("the resumed run's scales differ")
    resumed["furthest"] = max(abs(a - b) / b for a, b in zip(resumed["losses"], high["losses"]) if a is not None and b is not None)
    if resumed["furthest"] > 0.05:
        found.append("the resumed run's losses differ by %.1e" % resumed["furthest"])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--output", type=Path, help="a file for the rows with every loss and scale")
    args = parser.parse_args()
    device = compat.gpus()
    if not device.number:
        raise SystemExit("fp16 needs a GPU, and none is here")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    rows: Dict[str, Dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(prefix="pipedock-fp16-") as folder:
        prepare(Path(folder), args.steps)
        for name, sets in RUNS.items():
            rows[name] = train(Path(folder), name, sets)
        train(Path(folder), "fp16-resumed", HIGH + ["train.max_steps=%d" % (args.steps // 2)])
        rows["fp16-resumed"] = train(Path(folder), "fp16-resumed", HIGH)
    found = problems(rows)
    if args.output:
        args.output.write_text("".join(json.dumps(dict(row, device=device.name)) + "\n" for row in rows.values()))
    for row in rows.values():
        scales = [scale for scale in row.pop("scales") if scale]
        row.pop("losses")
        print(
            json.dumps(dict(row, device=device.name, scale_first=scales[:1], scale_min=min(scales or [0]), scale_last=scales[-1:]))
        )
    print("\n".join(found) or "fp16: as it should be", file=sys.stderr)
    raise SystemExit(1 if found else 0)


if __name__ == "__main__":
    main()
