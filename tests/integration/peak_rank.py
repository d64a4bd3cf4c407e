"""One stage of a real pipeline on the CPU: the most bytes torch had allocated, beside the plan; run by test_plan_activations.py.

``peak_rank.py ROWS.json`` writes [{"name", "planned", "measured"}, ...]. Each case is forked before anything is allocated.
"""

import json
import multiprocessing
import os
import sys
import tempfile
from pathlib import Path

import torch

from pipeline_train import config, engine, families
from pipeline_train.loop import micro_batches
from pipeline_train.plan import memory
from pipeline_train.selftest import make_rows
from tests.models import tiny_config

SEQ, MICRO_BATCHES = 128, 2
SIZES = {"hidden_size": 128, "max_position_embeddings": 256}
CASES = {  # family, its sizes, dtype, recompute, optimizer, rows of a micro-batch; with one row the step is the peak
    "llama": ("llama", {"intermediate_size": 352, "vocab_size": 3000, "num_hidden_layers": 4}, "bf16", "none", "adamw", 4),
    "llama step": ("llama", {"intermediate_size": 352, "num_hidden_layers": 4}, "bf16", "blocks", "adamw", 1),
    "llama fp32 step": ("llama", {"intermediate_size": 352, "num_hidden_layers": 4}, "fp32", "blocks", "adamw", 1),
    "llama selective": ("llama", {"intermediate_size": 352, "num_hidden_layers": 6}, "bf16", "selective", "adamw", 4),
    "bloom selective": ("bloom", {"vocab_size": 1000, "n_layer": 6}, "bf16", "selective", "adamw", 4),
    "bloom recompute": ("bloom", {"vocab_size": 3000}, "bf16", "blocks", "adamw", 4),
    "bloom fp32 lion": ("bloom", {"n_layer": 5}, "fp32", "none", "lion", 4),
}


def allocated(work):
    """The highest of the running totals that torch's profiler notes at every allocation."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    with tempfile.TemporaryDirectory() as folder:
        trace = os.path.join(folder, "trace.json")
        profiler.export_chrome_trace(trace)
        with open(trace) as file:
            events = json.load(file)["traceEvents"]
    return max(event["args"]["Total Allocated"] for event in events if event.get("name") == "[memory]")


def measure(name):
    family, sizes, dtype, recompute, optim, micro = CASES[name]
    raw = tiny_config(family, **dict(SIZES if family == "llama" else {"hidden_size": 128}, **sizes))
    dims = families.dims_of(raw)
    run = config.parse({
        "run": {"out": "unused"}, "model": {"path": "unused", "init": "random", "dtype": dtype},
        "data": {"train": "unused", "seq_len": SEQ}, "parallel": {"pipe": 1, "recompute": recompute},
        "batch": {"micro": micro, "global": micro * MICRO_BATCHES}, "optim": {"type": optim},
    })  # fmt: skip

    def train():
        pipe = engine.Pipeline(run, dims, [0, dims.layers], cuda=False)
        for module in pipe.stage.layers.values():
            for parameter in module.parameters():
                pipe.write_whole(parameter, torch.full(parameter.shape, 0.01))
        pipe.set_steps(0)
        for step in range(2):
            rows = make_rows(step, run.rows_per_step, SEQ, dims.vocab)
            pipe.train(micro_batches(rows, micro, 0, 1), rows.learnt_tokens, 1e-5)

    setup = memory.setup_of(run, "current")
    planned = memory.stage_bytes(memory.Sizes(dims), setup, 0, 0, dims.layers).total - memory.WORKSPACE  # cuBLAS's
    return {"name": name, "planned": planned, "measured": allocated(train)}


def child(name, results):
    engine.connect(False, 0)
    results.put(measure(name))


def main():
    forked = multiprocessing.get_context("fork")
    rows = []
    for name in CASES:
        results = forked.SimpleQueue()
        process = forked.Process(target=child, args=(name, results))
        process.start()
        rows.append(results.get())
        process.join()
    Path(sys.argv[1]).write_text(json.dumps(rows))
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
