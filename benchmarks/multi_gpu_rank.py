"""One rank of multi_gpu.py: trains one model by one engine, case after case, and prints a JSON row for each (rank 0).

    RANK=... LOCAL_RANK=... WORLD_SIZE=... MASTER_ADDR=... MASTER_PORT=... python benchmarks/multi_gpu_rank.py '<task as JSON>'

A task: {engine: pipeline | zero3 | fsdp2, model: config.json's content, batch: rows of a step, steps: timed ones, cases: [{seq,
micro, recompute, rows (of a step, where they differ), data and compile (pipeline), keep (fsdp2)}], known: rows of an earlier
process}. A case with ``best``: a sequence length, takes the rest from the fastest row of that length, as many tokens at once.

Weights are random, made on the device; every row of tokens is one document, every token is learnt. The peers: multi_gpu_peers.py.
"""

import gc
import json
import os
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

from benchmarks.multi_gpu_peers import RATE, Fsdp2, Zero3, batches, device  # noqa: E402


class OurPipeline:
    """pipe x data ranks of pipeline_train's engine."""

    def __init__(self, task, case):
        from pipeline_train import config, engine, families, plan

        world = int(os.environ["WORLD_SIZE"])
        data = case.get("data", 1)
        self.dims = families.dims_of(task["model"])
        self.rows = case.get("rows", task["batch"])
        run = config.parse({
            "run": {"out": "unused", "compile": case.get("compile", False)},
            "model": {"path": "unused", "init": "random", "dtype": "bf16"},
            "data": {"train": "unused", "seq_len": case["seq"]},
            "parallel": {"pipe": world // data, "data": data, "recompute": case["recompute"]},
            "batch": {"micro": case["micro"], "global": self.rows}, "optim": {"lr": RATE},
        })  # fmt: skip
        again = case["recompute"] == "blocks"
        boundaries = plan.bounds(self.dims, world // data, "auto", case["seq"], again)
        run.parallel.parts = plan.parts_of(boundaries)
        self.planned = plan.memory_of(run, self.dims)
        self.parts = run.parallel.parts
        self.pipe = engine.Pipeline(run, self.dims, boundaries, device().type == "cuda")
        for layer, module in self.pipe.stage.layers.items():
            for number, parameter in enumerate(module.parameters()):
                self.pipe.write_whole(parameter, self._random(parameter, 1000 * int(layer) + number))
        self.pipe.set_steps(0)
        self.stage_s = self.span = 0.0

    def _random(self, parameter, seed):
        import torch

        generator = torch.Generator(device=device()).manual_seed(seed)
        if parameter.dim() == 1:
            return torch.ones(parameter.shape, device=device())
        return torch.empty(parameter.shape, device=device()).normal_(0.0, 0.02, generator=generator)

    def use(self, case):
        pass

    def step(self, case, number):
        import torch

        pipe, mine = self.pipe, self.rows // self.pipe.config.parallel.data
        positions = torch.arange(case["seq"]).expand(case["micro"], case["seq"]).contiguous()

        def feed():
            for ids in batches(case, mine, number, self.dims.vocab, pipe.data_rank):
                yield (ids, positions, torch.ones_like(ids)), ids.roll(-1, 1)

        result = pipe.train(feed(), self.rows * case["seq"], RATE)
        self.stage_s, self.span = result.busy, result.span
        return result.loss

    def facts(self):
        stage = self.pipe.pipe_rank
        return {"plan_gib": self.planned[stage]["total"], "stage": stage, "stage_s": self.stage_s, "span": self.span,
                "parts": self.parts}  # fmt: skip


ENGINES = {"pipeline": OurPipeline, "fsdp2": Fsdp2, "zero3": Zero3}


built = {}  # engine name -> a peer, which serves every case


def engine_of(task, case):
    """-> (the engine, whether it has taken steps of this shape before)."""
    name = task["engine"]
    if name == "pipeline":
        return OurPipeline(task, case), False
    if name not in built:
        built[name] = ENGINES[name](task, case)
    built[name].use(case)
    return built[name], case.get("best") == case["seq"]


def measure(task, case):
    """Build, one step to warm up, then ``steps`` timed ones; -> the row (the same on every rank)."""
    import torch
    import torch.distributed as dist

    from pipeline_train import families, plan
    from pipeline_train.plan.cards import peak_flops

    cuda = device().type == "cuda"
    began = time.perf_counter()
    engine, warm = engine_of(task, case)
    build_s = time.perf_counter() - began
    if not warm:
        engine.step(case, 0)
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    seconds, losses = [], []
    for number in range(1, 1 + case.get("steps", task["steps"])):
        dist.barrier()
        if cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        losses.append(engine.step(case, number))
        if cuda:
            torch.cuda.synchronize()
        dist.barrier()
        seconds.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated() / 2**30 if cuda else 0.0
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, dict(engine.facts(), gib=round(peak, 3)))
    rows = case.get("rows", task["batch"])
    tokens, step_s = rows * case["seq"], sorted(seconds)[len(seconds) // 2]
    flops = plan.step_flops(families.dims_of(task["model"]), tokens, rows * case["seq"] * (case["seq"] + 1) // 2)
    top = peak_flops(torch.cuda.get_device_name()) * len(everyone) if cuda else 0.0
    return dict(case, engine=task["engine"], family=task["model"]["model_type"], gpus=len(everyone), rows=rows,
                card=torch.cuda.get_device_name() if cuda else "CPU", step_s=step_s, all_s=[round(s, 3) for s in seconds],
                tokens_per_s=tokens / step_s, samples_per_s=rows / step_s, mfu=flops / step_s / top if top else None,
                gib=[one["gib"] for one in everyone], ranks=everyone, loss=losses[-1], built_s=round(build_s, 1))  # fmt: skip


def best_of(known, case):
    """The case with what it leaves open filled in, as rank 0 has measured it."""
    import torch.distributed as dist

    if not case.get("best"):
        return case
    wanted = case["best"], case.get("data")
    rows = [row for row in known if "tokens_per_s" in row and (row["seq"], row.get("data")) == wanted]
    chosen = [max(rows, key=lambda row: row["tokens_per_s"])] if rows else [None]
    dist.broadcast_object_list(chosen, src=0)
    if chosen[0] is None:
        raise SystemExit("no case of seq %d has been measured" % case["best"])
    same = {key: chosen[0][key] for key in ("recompute", "keep", "compile") if key in chosen[0]}
    return dict(same, micro=chosen[0]["micro"] * case["best"] // case["seq"], **case)


def main():
    import torch
    import torch.distributed as dist

    from pipeline_train import engine

    task = json.loads(sys.argv[1])
    rank, cuda = int(os.environ["RANK"]), device().type == "cuda"
    if rank:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    engine.connect(cuda, int(os.environ["LOCAL_RANK"]))
    known = task.get("known", [])
    for number, case in enumerate(task["cases"]):
        case = best_of(known, case)
        try:
            row = measure(task, case)
        except torch.OutOfMemoryError as error:
            row = dict(case, engine=task["engine"], family=task["model"]["model_type"], error="out of memory",
                       detail=str(error).split(". ")[0])  # fmt: skip
        known.append(row)
        if rank == 0:
            print(json.dumps(dict(row, number=number)), flush=True)
        if "error" in row:
            os._exit(3)  # what the others wait for will not come: the driver starts again behind this case
        gc.collect()
        if cuda:
            torch.cuda.empty_cache()
    dist.barrier()
    os._exit(0)  # NCCL's threads need no leave


if __name__ == "__main__":
    main()
