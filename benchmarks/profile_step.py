"""Where the time of a training step goes: torch.profiler over one step of our pipeline, kernels by name, and the host's share.

    python benchmarks/profile_step.py --model llama-7b --blocks 8 --seq-len 1024 --micro 4 --compile --output profile.json

One stage on one GPU (or the CPU). Rows: {name, calls, ms, share} of the kernels (of the operators on a CPU), largest first; beside
them the wall time of the step, how much of it the device computed, and how long the host took to hand everything over.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from bench import shapes  # noqa: E402
from bench.rows import Rows, drawn  # noqa: E402
from bench.task import Case  # noqa: E402

MOST = 100


def profiled(case, device):
    """-> (rows, {wall_s, device_s, host_s})."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    from bench.ours import Ours
    from pipeline_train import families

    cuda = device.type == "cuda"
    running = Ours(case, device)
    rows = Rows(case.documents, case.seq, True, families.dims_of(case.model).vocab)
    for number in range(2):  # compiled, and every buffer is there
        batches, counts = rows.step(number, case.rows, case.micro)
        running.step(batches, counts)
    batches, counts = rows.step(2, case.rows, case.micro)
    kinds = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if cuda else [])
    with profile(activities=kinds) as found:
        began = time.perf_counter()
        running.step(batches, counts)
        host_s = time.perf_counter() - began
        if cuda:
            torch.cuda.synchronize()
        wall_s = time.perf_counter() - began
    events = [(event, event.self_device_time_total if cuda else event.self_cpu_time_total) for event in found.key_averages()]
    events = sorted(((event, us) for event, us in events if us > 0), key=lambda pair: -pair[1])
    device_s = sum(us for _, us in events) / 1e6
    table = [{"name": event.key[:120], "calls": event.count, "ms": round(us / 1e3, 3), "share": round(us / 1e6 / device_s, 4)}
             for event, us in events[:MOST]]  # fmt: skip
    return table, {"wall_s": round(wall_s, 4), "device_s": round(device_s, 4), "host_s": round(host_s, 4), "tokens": counts.tokens}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="llama-tiny")
    parser.add_argument("--blocks", type=int)
    for name, usual in (("seq-len", 1024), ("micro", 4), ("micro-batches", 16), ("documents", 212)):
        parser.add_argument("--" + name, type=int, default=usual)
    parser.add_argument("--recompute", default="none")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="29591")
    import torch

    cuda = torch.cuda.is_available()
    if not cuda:
        os.environ["DS_ACCELERATOR"] = "cpu"
    from pipeline_train import engine

    engine.connect(cuda, 0)
    case = Case(
        "ours", shapes.model_of(args.model, args.blocks), args.seq_len, args.micro, args.micro_batches,
        dtype="bf16" if cuda else "fp32", recompute=args.recompute, compile=args.compile,
        documents=drawn(args.documents, args.seq_len),
    )  # fmt: skip
    rows, step = profiled(case, torch.device("cuda" if cuda else "cpu"))
    print(json.dumps(step))
    for row in rows:
        print("%6.2f %%  %9.3f ms  %5d x  %s" % (100 * row["share"], row["ms"], row["calls"], row["name"]))
    if args.output:
        args.output.write_text(json.dumps({"step": step, "rows": rows}, indent=1) + "\n", encoding="utf-8")
    sys.stdout.flush()
    os._exit(0)  # NCCL's threads need no leave


if __name__ == "__main__":
    main()
