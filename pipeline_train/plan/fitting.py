"""Stages that fit on a card, and what a run is to know of them: ``parts_for``, ``memory_of``, ``lack``. Standard library only."""

from typing import Any, Dict, List, Optional, Sequence, Union

from ..families import Dims
from . import cards
from .memory import GIB, Setup, Sizes, setup_of, stage_bytes
from .split import Fits, NoSplit, bounds, parts_of

PARTS = ("weights", "grads", "optimizer", "activations", "buffers", "total")


def bounds_on(sizes: Sizes, setup: Setup, parts: Union[str, Sequence[int]], gpu: Optional[str]) -> List[int]:
    """Stage bounds under the card's limit if that can be; else, or for no card, without one."""
    found = None if gpu is None else bounds_that_fit(sizes, setup, parts, gpu)
    return found or bounds(sizes.dims, setup.pipe, parts, setup.seq_len, setup.again, fp8=setup.fp8_pays)


def bounds_that_fit(sizes: Sizes, setup: Setup, parts: Union[str, Sequence[int]], gpu: str) -> Optional[List[int]]:
    """Stage bounds under the card's limit, None where none are."""
    try:
        return bounds(sizes.dims, setup.pipe, parts, setup.seq_len, setup.again, fits_on(sizes, setup, gpu), setup.fp8_pays)
    except NoSplit:
        return None


def fits_on(sizes: Sizes, setup: Setup, gpu: str) -> Fits:
    """Whether a stage's layers fit on the card beside context and reserve."""
    limit = cards.usable(gpu) * GIB
    known: Dict[Any, bool] = {}  # a stage of blocks is like any other with as many micro-batches in flight

    def fits(stage: int, start: int, end: int) -> bool:
        key = (min(setup.pipe - stage, setup.micro_batches), stage == 0, sizes.part(start, end))
        if key not in known:
            known[key] = stage_bytes(sizes, setup, stage, start, end).total <= limit
        return known[key]

    return fits


def gib_of(sizes: Sizes, setup: Setup, boundaries: Sequence[int]) -> List[Dict[str, float]]:
    """GiB of each stage, by part and in all."""
    found = []
    for stage, (start, end) in enumerate(zip(boundaries, boundaries[1:])):
        row = stage_bytes(sizes, setup, stage, start, end)
        found.append({name: round(value / GIB, 4) for name, value in zip(PARTS, tuple(row) + (row.total,))})
    return found


def parts_for(run: Any, dims: Dims, gpu: Optional[str], stack: str) -> List[int]:
    """Layers per stage of a run whose seq_len and dtype are resolved (config_schema.RunConfig). "auto": the slowest stage is as
    fast as can be among the splits that fit on the card; ``gpu`` None: a CPU, or a card that is not in the table."""
    return parts_of(bounds_on(Sizes(dims), setup_of(run, stack), run.parallel.parts, gpu))


def memory_of(run: Any, dims: Dims, stack: str = "current") -> List[Dict[str, float]]:
    """GiB per stage of a run whose parts are resolved too: what ``torch.cuda.max_memory_allocated`` should show on each, and its
    parts. ``stack``: cards.stack_of's names."""
    setup = setup_of(run, stack)
    return gib_of(Sizes(dims), setup, bounds(dims, setup.pipe, run.parallel.parts, setup.seq_len, setup.again))


def lack(run: Any, dims: Dims, gpu: str, stack: str) -> Optional[str]:
    """Why a run whose parts are resolved may not fit on the card, or None."""
    needed, limit = [row["total"] for row in memory_of(run, dims, stack)], cards.usable(gpu)
    worst = max(range(len(needed)), key=lambda stage: needed[stage])
    if needed[worst] <= limit:
        return None
    return ("by the plan stage %d needs %.1f GiB, a %s has %.1f beside context and reserve: it may run out of memory. More stages, "
            "a smaller batch.micro or parallel.recompute: blocks need less" % (worst, needed[worst], gpu, limit))  # fmt: skip
