"""What each memory mode costs and saves, through ``pipedock train`` itself: one JSON row per mode, then a verdict on stderr.

    python benchmarks/memory_modes.py                       # one GPU: 8 blocks of hidden 1024, bf16
    python benchmarks/memory_modes.py --hidden 256 --modes plain,recompute     # a CPU: resident memory instead of the device's

plain         AdamW, everything on the device
recompute     parallel.recompute: blocks - the backward pass runs each block again
offload       parallel.offload - master weights and AdamW's moments in host memory, the step on the CPU
lion          one moment instead of two
lion-triton   its step as one Triton kernel

Exit 1 when recompute or offload does not lower the memory, or when a mode's losses leave those of the mode it must equal by
more than the tolerance (plain; for lion-triton lion, which itself must learn).
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Dict, List, Optional

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import small_llama  # noqa: E402
from pipeline_train import compat, metrics, native  # noqa: E402

SETS = {
    "plain": [],
    "recompute": ["parallel.recompute=blocks"],
    "offload": ["parallel.offload=true"],
    "lion": ["optim.type=lion", "optim.lr=1e-4", "optim.use_triton=false"],
    "lion-triton": ["optim.type=lion", "optim.lr=1e-4", "optim.use_triton=true"],
}  # type: Dict[str, List[str]]
EQUALS = {"recompute": "plain", "offload": "plain", "lion-triton": "lion"}
LOWER = ("recompute", "offload")
TOLERANCE = {"fp32": 1e-4, "bf16": 0.01, "fp16": 0.01}


def prepare(folder: Path, args: argparse.Namespace) -> None:
    """A small llama, what it learns, and run.yaml."""
    small_llama.write(folder, args.hidden, args.blocks, args.seq_len, 8 * args.steps * args.rows)
    run = {
        "run": {"out": "-", "self_test": False}, "model": {"path": str(folder / "model"), "init": "random", "dtype": args.dtype},
        "data": {"train": str(folder / "train.jsonl"), "seq_len": args.seq_len}, "parallel": {"pipe": 1},
        "batch": {"micro": args.rows, "global": 2 * args.rows}, "optim": {"lr": 3e-4, "warmup": 2},
        "train": {"max_steps": args.steps},
    }  # fmt: skip
    (folder / "run.yaml").write_text(json.dumps(run))


def measure(folder: Path, mode: str) -> Dict[str, Any]:
    """Train in one mode -> its row."""
    out = folder / mode
    command = [sys.executable, str(ROOT / "pipedock.py"), "train", "--config", str(folder / "run.yaml"), "--json"]
    for item in ["run.out=%s" % out] + SETS[mode]:
        command += ["--set", item]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit("%s: %s" % (mode, done.stderr.strip()[-2000:]))
    steps = [line for line in metrics.read(out / "metrics.jsonl") if line["kind"] == "step"]
    later = sorted(line["step_s"] for line in steps[len(steps) // 2 :])
    log = (out / "logs" / "rank_0.log").read_text(errors="replace")
    return {
        "mode": mode, "memory_gib": max(max(line["mem_gib"]) for line in steps), "step_s": round(later[len(later) // 2], 4),
        "losses": [round(line["loss"], 6) for line in steps], "seconds": json.loads(done.stdout)["seconds"],
        "cpu_optimizer": (mode == "offload" and ("torch" if "cannot be built" in log else "deepspeed")) or None,
    }  # fmt: skip


def problems(rows: Dict[str, Dict[str, Any]], tolerance: float) -> List[str]:
    found = []
    for mode, row in rows.items():
        losses, other = row["losses"], rows.get(EQUALS.get(mode, ""))
        if not losses[-1] < losses[0]:
            found.append("%s: learns nothing: loss %s -> %s" % (mode, losses[0], losses[-1]))
        if other is not None:
            row["furthest"] = max(abs(a - b) / b for a, b in zip(losses, other["losses"]))
            if not row["furthest"] <= tolerance:
                found.append("%s: losses leave %s's by %.1e (tolerance %.0e)" % (mode, other["mode"], row["furthest"], tolerance))
        if mode in LOWER and "plain" in rows and not row["memory_gib"] < rows["plain"]["memory_gib"]:
            found.append("%s: %.3f GiB, not below plain's %.3f" % (mode, row["memory_gib"], rows["plain"]["memory_gib"]))
    return found


def impossible(mode: str, gpus: int) -> Optional[str]:
    """Why a mode cannot be measured on this machine."""
    if mode == "lion-triton":
        return native.without_triton(gpus)
    return "no effect on the CPU" if mode == "offload" and not gpus else None


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--modes", default=",".join(SETS))
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--rows", type=int, default=4, help="rows of a micro-batch")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--dtype", choices=sorted(TOLERANCE))
    args = parser.parse_args()
    device = compat.Gpus(0, "CPU", True) if os.environ.get("DS_ACCELERATOR") == "cpu" else compat.gpus()
    args.dtype = args.dtype or ("fp32" if not device.number else "bf16" if device.bf16 else "fp16")
    rows: Dict[str, Dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(prefix="pipedock-memory-modes-") as folder:
        prepare(Path(folder), args)
        for mode in args.modes.split(","):
            reason = impossible(mode, device.number)
            if reason:
                print("%s: left out: %s" % (mode, reason), file=sys.stderr)
                continue
            rows[mode] = measure(Path(folder), mode)
    found = problems(rows, TOLERANCE[args.dtype])
    facts = {name: getattr(args, name) for name in ("hidden", "blocks", "seq_len", "rows", "dtype")}
    for row in rows.values():
        print(json.dumps(dict(row, device=device.name or "CPU", **facts)))
    print("\n".join(found) or "memory modes: as they should be", file=sys.stderr)
    raise SystemExit(1 if found else 0)


if __name__ == "__main__":
    main()
