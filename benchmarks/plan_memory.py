"""The planner's memory against torch.cuda.max_memory_allocated: one stage on one GPU, through the real engine.Pipeline.

    python benchmarks/plan_memory.py --output rows.json       # 12 configurations, each in a process of its own, about 4 minutes
    python benchmarks/plan_memory.py --predict-only           # only what the plan says; needs no GPU
    python benchmarks/plan_memory.py --only llama-none,fp16

Weights are random, made on the device; two steps of three micro-batches. A row: {name, card, config, predicted (GiB by part),
measured (GiB, the peak), ratio (predicted / measured), computing and stepping ([predicted, measured] of the two moments that the
plan takes the larger of), reserved (by torch's allocator, GiB), outside (used on the card beyond that: context, libraries)}.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from bench import shapes  # noqa: E402
from bench.task import Case  # noqa: E402

MICRO_BATCHES, STEPS = 3, 2
LLAMA, BLOOM = shapes.model_of("llama-7b", 8), shapes.model_of("bloom-7b", 6)
GROUPED = dict(LLAMA, hidden_size=2048, intermediate_size=5632, num_key_value_heads=4)
BLOOM_1B7 = dict(BLOOM, hidden_size=2048, n_head=16, n_layer=8)
MIDDLE = dict(LLAMA, vocab_size=256)  # as good as a middle stage: no head that would show


def one_of(model, seq, micro, recompute="none", optim="adamw", dtype="bf16"):
    return {"model": model, "seq": seq, "micro": micro, "recompute": recompute, "optim": optim, "dtype": dtype}


CASES = {
    "llama-none": one_of(LLAMA, 1024, 4),
    "llama-recompute": one_of(LLAMA, 2048, 4, "blocks"),
    "llama-recompute-1": one_of(LLAMA, 2048, 1, "blocks"),
    "llama-lion": one_of(LLAMA, 2048, 1, optim="lion"),
    "llama-grouped": one_of(GROUPED, 2048, 4),
    "middle-none": one_of(MIDDLE, 2048, 4),
    "middle-recompute": one_of(MIDDLE, 2048, 4, "blocks"),
    "bloom-none": one_of(BLOOM, 1024, 4),
    "bloom-recompute-1": one_of(BLOOM, 2048, 1, "blocks"),
    "bloom-lion": one_of(dict(BLOOM, n_layer=4), 1024, 4, "blocks", "lion"),
    "bloom-1b7": one_of(BLOOM_1B7, 2048, 4),
    "fp16": one_of(dict(LLAMA, num_hidden_layers=6), 1024, 4, dtype="fp16"),
}


def predicted(one):
    """-> (GiB by part, [computing, stepping])."""
    from pipeline_train import families
    from pipeline_train.plan import memory

    dims = families.dims_of(one["model"])
    setup = memory.Setup(one["seq"], one["micro"], MICRO_BATCHES, 1, 1, one["dtype"], one["optim"], one["recompute"])
    sizes = memory.Sizes(dims)
    found = memory.stage_bytes(sizes, setup, 0, 0, dims.layers)
    gib = {name: value / memory.GIB for name, value in zip(found._fields, found)}
    return dict(gib, total=found.total / memory.GIB), [x / memory.GIB for x in memory.moments(sizes, setup, 0, 0, dims.layers)]


def measure(one):
    """Run the case in this process -> the measured fields of its row."""
    import torch

    from bench.ours import Ours
    from bench.rows import Rows
    from pipeline_train import engine

    began, peaks = time.monotonic(), {"computing": 0, "stepping": 0}
    engine.connect(True, 0)
    case = Case("ours", one["model"], one["seq"], one["micro"], MICRO_BATCHES, dtype=one["dtype"], recompute=one["recompute"],
                optim=one["optim"])  # fmt: skip
    running = Ours(case, torch.device("cuda"))
    rows = Rows([], case.seq, True, running.dims.vocab)  # one document a row, every token learnt
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()

    def note(moment):
        torch.cuda.synchronize()
        peaks[moment] = max(peaks[moment], torch.cuda.max_memory_allocated())
        torch.cuda.reset_peak_memory_stats()

    def noted(instruct):
        def instruction(*args, **kwargs):
            note("computing")
            return instruct(*args, **kwargs)

        return instruction

    pipe = running.pipe.engine
    pipe._INSTRUCTION_MAP = {k: noted(v) if k.__name__ == "ReduceTiedGrads" else v for k, v in pipe._INSTRUCTION_MAP.items()}
    for step in range(STEPS):
        loss = running.step(*rows.step(step, case.rows, case.micro))
        note("stepping")
    free, total = torch.cuda.mem_get_info()
    reserved = torch.cuda.memory_reserved()
    gib = 2**30
    return {
        "card": torch.cuda.get_device_name(), "loss": loss, "seconds": round(time.monotonic() - began, 1),
        "peaks": [peaks["computing"] / gib, peaks["stepping"] / gib], "reserved": torch.cuda.max_memory_reserved() / gib,
        "outside": (total - free - reserved) / gib, "card_gib": total / gib,
    }  # fmt: skip


def row(name, measured):
    one = CASES[name]
    parts, moments = predicted(one)
    out = {"name": name, "config": one, "predicted": parts}
    if measured is None:
        return dict(out, computing=[moments[0]], stepping=[moments[1]])
    peaks = measured.pop("peaks")
    top = max(peaks)
    return dict(out, measured=top, ratio=parts["total"] / top, computing=[moments[0], peaks[0]], stepping=[moments[1], peaks[1]],
                **measured)  # fmt: skip


def child(name):
    """Run one case in a process of its own -> its measured fields, or {"error"}."""
    environment = dict(os.environ, RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="29571")
    command = [sys.executable, __file__, "--case", name]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        return {"error": (done.stderr.strip().splitlines() or ["no message"])[-1]}
    return json.loads(lines[-1])


def shown(found):
    numbers = "  ".join("%s %6.2f" % item for item in found["predicted"].items())
    if "measured" not in found:
        return "%-18s %s%s" % (found["name"], numbers, "  " + found["error"] if "error" in found else "")
    return "%-18s %s  measured %6.2f  ratio %.3f  computing %.2f/%.2f  stepping %.2f/%.2f  outside %.2f  %.0f s" % (
        found["name"], numbers, found["measured"], found["ratio"], *found["computing"], *found["stepping"], found["outside"],
        found["seconds"],
    )  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", metavar="FILE", help="write the rows as JSON")
    parser.add_argument("--only", metavar="NAMES", help="some of: %s" % ", ".join(CASES))
    parser.add_argument("--predict-only", action="store_true")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        print(json.dumps(measure(CASES[args.case])), flush=True)
        os._exit(0)  # NCCL's threads need no leave
    rows = []
    for name in args.only.split(",") if args.only else CASES:
        measured = None if args.predict_only else child(name)
        failed = measured is not None and "error" in measured
        rows.append(dict(row(name, None), **measured) if failed else row(name, measured))
        print(shown(rows[-1]), flush=True)
        if args.output:
            Path(args.output).write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return int(any("error" in found for found in rows))


if __name__ == "__main__":
    sys.exit(main())
