"""What a run takes of each node, from its run.yaml and its model's config.json alone. No torch."""

import copy
from typing import Any, Dict

from .. import checkpoint_folder, compat, plan
from ..config_schema import RunConfig
from ..data.store import default_seq_len
from ..families import Dims
from ..plan import cards

GIB = 2**30
SURE = 0.9  # of what plan expects: below that it does not fit, whatever plan is off by


def need(run: RunConfig, dims: Dims, raw: Dict[str, Any], cuda: bool, first: int, ranks: int) -> Dict[str, Any]:
    """Of the node that has ``ranks`` ranks from ``first`` on, in bytes: {"gpu": of each rank's card, or None, "host": of the CPU's
    memory at least, "copy": of it, for saves behind the next steps, "checkpoint": one of them, "checkpoints": how many are on the
    disk at most}. ``raw``: the model's config.json."""
    stack = compat.stack(compat.versions())
    run = _filled(run, dims, raw, cuda, stack)
    stages = plan.memory_of(run, dims, stack)
    mine = [stages[stage_of(run, rank)] for rank in range(first, first + ranks)]
    context = cards.CONTEXT_GIB
    states = int(sum(row["weights"] + row["grads"] + row["optimizer"] for row in mine) * SURE * GIB)
    saved = int(sum(row["weights"] + row["optimizer"] for row in mine) * GIB)
    return {
        "gpu": [int((SURE * row["total"] + context) * GIB) for row in mine] if cuda else None, "host": 0 if cuda else states,
        "copy": saved if run.train.async_save else 0, "checkpoint": checkpoint_folder.nbytes(dims, run.optim.type),
        "checkpoints": run.train.keep + 1,
    }  # fmt: skip


def stage_of(run: RunConfig, rank: int) -> int:
    """The pipeline stage of a rank: the last of parallel.axes counts fastest."""
    return rank // run.parallel.data if run.parallel.axes[0] == "pipe" else rank % run.parallel.pipe


def _filled(run: RunConfig, dims: Dims, raw: Dict[str, Any], cuda: bool, stack: str) -> RunConfig:
    """As prepare fills it."""
    run = copy.deepcopy(run)
    if run.model.dtype == "auto":
        run.model.dtype = "bf16" if cuda else "fp32"
    if run.data.seq_len is None:
        run.data.seq_len = default_seq_len(raw, dims)
    run.parallel.parts = plan.parts_for(run, dims, plan.card_here() if cuda else None, stack)
    return run
