"""Which GPUs of this machine a container gets."""

import os
from typing import List, Mapping, NamedTuple, Optional

from pipeline_train.errors import UserError
from pipeline_train.plan import cards


class Gpus(NamedTuple):
    """``ids``: those a container may have, as Docker is told; ``chosen``: CUDA_VISIBLE_DEVICES named them; ``card``: the first one
    as plan/cards.py calls it, None when it is not in that table; ``driver``: "580.65.06", None without a GPU."""

    ids: List[str]
    chosen: bool
    card: Optional[str]
    driver: Optional[str]


def seen(environment: Mapping[str, str] = os.environ) -> Gpus:
    """By nvidia-smi; CUDA_VISIBLE_DEVICES, where it is set, chooses among them."""
    rows = cards.cards_here()
    picked = environment.get("CUDA_VISIBLE_DEVICES")
    if picked is not None:
        wanted = [part.strip() for part in picked.split(",") if part.strip()]
        rows = [row for want in wanted for row in rows if _named(row, want)]
    if not rows:
        return Gpus([], False, None, None)
    return Gpus([row.number for row in rows], picked is not None, rows[0].card, rows[0].driver)


def _named(row: cards.Here, want: str) -> bool:
    return want == row.number or (want.startswith("GPU-") and row.uuid.startswith(want))


def take(gpus: Gpus, shards: int) -> List[str]:
    """The ids for that many shards; none where no GPU was seen. UserError when there are too few."""
    if gpus.ids and shards > len(gpus.ids):
        where = " in CUDA_VISIBLE_DEVICES" if gpus.chosen else ""
        raise UserError("--num-shard %d: each shard needs a GPU, %d seen%s" % (shards, len(gpus.ids), where))
    return gpus.ids[:shards]
