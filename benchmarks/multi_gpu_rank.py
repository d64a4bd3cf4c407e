"""One rank of multi_gpu.py: trains one model by one engine, case after case, and prints a JSON row for each (rank 0).

    RANK=... LOCAL_RANK=... WORLD_SIZE=... MASTER_ADDR=... MASTER_PORT=... python benchmarks/multi_gpu_rank.py '<task as JSON>'

A task: {engine: pipeline | zero3 | fsdp2, family: the rows' name of the model, model: config.json's content, batch: rows of a step,
steps: timed ones, cases: [{seq, micro, recompute, rows (of a step, where they differ), data, compile and fp8 (pipeline), keep
(fsdp2), warm (no step beforehand), documents (see bench.task.Case; default: each row is one)}], known: rows of an earlier process}.
A case with ``best``: a sequence length, takes the rest from the fastest row of that length, as many tokens at once.

Weights are random, made on the device; every token is learnt. The engines: bench/.
"""

import gc
import json
import os
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from bench import rank as measuring  # noqa: E402
from bench.task import Case  # noqa: E402
from benchmarks import multi_gpu_cases  # noqa: E402

built = {}  # engine name -> a peer, which serves every case


def case_of(task, case):
    """The bench's own words for a case."""
    world, data = int(os.environ["WORLD_SIZE"]), case.get("data", 1)
    ours = task["engine"] == "pipeline"
    rows = case.get("rows", task["batch"])
    data = data if ours else world
    return Case(
        "ours" if ours else task["engine"], task["model"], case["seq"], case["micro"], rows // data // case["micro"],
        pipe=world // data, data=data, recompute=case["recompute"], compile=case.get("compile", False),
        fp8=case.get("fp8", False), keep=case.get("keep", False),
        documents=case.get("documents", []), steps=case.get("steps", task["steps"]),
    )  # fmt: skip


def measure(task, case):
    """Build, one step to warm up, then ``steps`` timed ones; -> the row (the same on every rank)."""
    import torch.distributed as dist

    one, began = case_of(task, case), time.perf_counter()
    known = one.engine in built and case.get("best") == case["seq"]  # it has taken steps of this shape before
    engine = built.get(one.engine) or measuring.build(one)
    build_s = time.perf_counter() - began
    if one.engine != "ours":
        built[one.engine] = engine
        engine.use(one)
    row = measuring.measure(engine, one, known or case.get("warm", False))
    kept = ("card", "step_s", "all_s", "tokens_per_s", "mfu", "gib", "ranks", "loss")
    return dict(case, engine=task["engine"], family=task["family"], gpus=dist.get_world_size(), rows=one.rows,
                samples_per_s=one.rows / row["step_s"], built_s=round(build_s, 1), **{key: row[key] for key in kept})  # fmt: skip


def best_of(known, case, batch):
    """The case with what it leaves open filled in, as rank 0 has measured it."""
    import torch.distributed as dist

    if not case.get("best"):
        return case
    chosen = [multi_gpu_cases.fastest(known, case, batch)]
    dist.broadcast_object_list(chosen, src=0)
    if chosen[0] is None:
        raise SystemExit("no case of seq %d has been measured" % case["best"])
    same = {key: chosen[0][key] for key in ("recompute", "keep", "compile", "fp8") if key in chosen[0]}
    return dict(same, micro=chosen[0]["micro"] * case["best"] // case["seq"], **case)


def main():
    import torch
    import torch.distributed as dist

    from pipeline_train import engine

    task = json.loads(sys.argv[1])
    rank, cuda = int(os.environ["RANK"]), measuring.device_of().type == "cuda"
    if rank:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    engine.connect(cuda, int(os.environ["LOCAL_RANK"]))
    known = task.get("known", [])
    for number, case in enumerate(task["cases"]):
        case = best_of(known, case, task["batch"])
        try:
            row = measure(task, case)
        except torch.OutOfMemoryError as error:
            row = dict(case, engine=task["engine"], family=task["family"], error="out of memory",
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
