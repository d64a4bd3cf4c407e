"""One process of a measurement: builds an engine, takes one step to warm up and some that count, prints a JSON row (rank 0).

RANK=... LOCAL_RANK=... WORLD_SIZE=... MASTER_ADDR=... MASTER_PORT=... python -m bench.rank '<task.Case as JSON>'
"""

import json
import os
import sys
import time
from typing import Any, Dict, List

os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

from pipeline_train import engine, families, plan  # noqa: E402
from pipeline_train.loop import peak_memory  # noqa: E402
from pipeline_train.plan.cards import peak_flops  # noqa: E402

from .rows import Rows  # noqa: E402
from .task import Case  # noqa: E402

ENGINES = {
    "ours": "bench.ours:Ours", "ancestor": "bench.ancestor:Ancestor", "hf": "bench.peers:Hf", "hf-eager": "bench.peers:HfEager",
    "hf-compiled": "bench.peers:HfCompiled",
    "fsdp2": "bench.peers:Fsdp2", "fsdp2-compiled": "bench.peers:Fsdp2Compiled", "zero3": "bench.peers:Zero3",
}  # fmt: skip


def device_of() -> torch.device:
    return torch.device("cpu" if os.environ.get("DS_ACCELERATOR") == "cpu" else "cuda")


def build(case: Case) -> Any:
    """The case's engine on this rank: a name of ENGINES, or module:class of another."""
    import importlib

    module, name = ENGINES.get(case.engine, case.engine).split(":")
    return getattr(importlib.import_module(module), name)(case, device_of())


def measure(running: Any, case: Case, warm: bool = False) -> Dict[str, Any]:
    """Time ``case.steps`` steps, after one that is not timed unless ``warm``. -> the row, the same on every rank:
    {step_s (median), all_s, tokens_per_s, learnt_tokens_per_s, positions_per_s, mfu (None on a CPU), gib (each rank's peak), ranks
    (see the engines' ``facts``), loss, card}. Tokens are those of documents; padding counts among positions only."""
    device, dims = device_of(), families.dims_of(case.model)
    rows = Rows(case.documents, case.seq, running.packs, dims.vocab)
    each = case.rows // case.data if running.packs or case.engine == "ancestor" else case.rows // dist.get_world_size()
    seconds: List[float] = []
    totals = [0, 0, 0, 0]
    loss = first_s = 0.0
    for number in range(0 if not warm else 1, 1 + case.steps):
        batches, counts = rows.step(number, case.rows, case.micro)
        mine = batches[running.replica * each // case.micro :][: each // case.micro]
        if number == 1 and device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        began = _now(device)
        loss = running.step(mine, counts)
        took = _now(device) - began
        if number:
            seconds.append(took)
            totals = [a + b for a, b in zip(totals, counts)]
        else:
            first_s = took
    return _row(case, running, seconds, totals, loss, first_s)


def _row(case: Case, running: Any, seconds: List[float], totals: List[int], loss: float, first_s: float) -> Dict[str, Any]:
    cuda, dims = device_of().type == "cuda", families.dims_of(case.model)
    everyone: List[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, dict(running.facts(), gib=round(peak_memory(cuda), 3)))
    tokens, learnt, pairs, positions = totals
    whole = sum(seconds)
    card = torch.cuda.get_device_name() if cuda else "CPU"
    top = peak_flops(card) * len(everyone) if cuda else 0.0
    return {
        "engine": case.engine, "family": dims.family, "blocks": dims.blocks, "hidden": dims.hidden,
        "seq": case.seq, "micro": case.micro,
        "micro_batches": case.micro_batches, "pipe": case.pipe, "data": case.data, "dtype": case.dtype, "recompute": case.recompute,
        "compile": case.compile, "fp8": case.fp8, "packed": running.packs, "card": card, "world": len(everyone),
        "step_s": sorted(seconds)[len(seconds) // 2], "all_s": [round(s, 4) for s in seconds], "first_step_s": round(first_s, 3),
        "tokens_per_s": tokens / whole, "learnt_tokens_per_s": learnt / whole, "positions_per_s": positions / whole,
        "mfu": plan.step_flops(dims, tokens, pairs) / whole / top if top else None,
        "gib": [one["gib"] for one in everyone], "ranks": everyone, "loss": loss,
    }  # fmt: skip


def _now(device: torch.device) -> float:
    """When every rank has come here with all its work done."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    dist.barrier()
    return time.perf_counter()


def main() -> None:
    rank, cuda = int(os.environ["RANK"]), device_of().type == "cuda"
    case = Case.of(sys.argv[1])
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # DeepSpeed writes there
    engine.connect(cuda, int(os.environ["LOCAL_RANK"]))
    try:
        row = measure(build(case), case)
    except torch.OutOfMemoryError as error:
        row = {"engine": case.engine, "micro": case.micro, "error": "out of memory", "detail": str(error).split(". ")[0]}
    if rank == 0 or "error" in row:
        answer.write(json.dumps(row) + "\n")
        answer.flush()
    if "error" not in row:
        dist.barrier()
    os._exit(3 if "error" in row else 0)  # NCCL's threads need no leave


if __name__ == "__main__":
    main()
