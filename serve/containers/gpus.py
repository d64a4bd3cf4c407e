"""Which GPUs of this machine a container gets."""

import os
import shutil
import subprocess
from typing import List, Mapping, NamedTuple, Optional

from pipeline_train.errors import UserError
from pipeline_train.plan import cards

QUERY = ["nvidia-smi", "--query-gpu=index,uuid,name,memory.total,driver_version", "--format=csv,noheader,nounits"]


class Gpus(NamedTuple):
    """``ids``: those a container may have, as Docker is told; ``chosen``: CUDA_VISIBLE_DEVICES named them; ``card``: the first one
    as plan/cards.py calls it, None when it is not in that table; ``driver``: "580.65.06", None without a GPU."""

    ids: List[str]
    chosen: bool
    card: Optional[str]
    driver: Optional[str]


def seen(environment: Mapping[str, str] = os.environ) -> Gpus:
    """By nvidia-smi; CUDA_VISIBLE_DEVICES, where it is set, chooses among them."""
    rows = _rows()
    picked = environment.get("CUDA_VISIBLE_DEVICES")
    if picked is not None:
        wanted = [part.strip() for part in picked.split(",") if part.strip()]
        rows = [row for want in wanted for row in rows if want == row[0] or (want.startswith("GPU-") and row[1].startswith(want))]
    if not rows:
        return Gpus([], False, None, None)
    _, _, name, mib, driver = rows[0]
    card = cards.from_cuda(name, float(mib) / 1024) if mib.isdigit() else None
    return Gpus([row[0] for row in rows], picked is not None, card, driver)


def _rows() -> List[List[str]]:
    if shutil.which("nvidia-smi") is None:
        return []
    try:
        done = subprocess.run(QUERY, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return []
    rows = [[cell.strip() for cell in line.split(",")] for line in done.stdout.splitlines()]
    return [row for row in rows if len(row) == 5] if done.returncode == 0 else []


def take(gpus: Gpus, shards: int) -> List[str]:
    """The ids for that many shards; none where no GPU was seen. UserError when there are too few."""
    if gpus.ids and shards > len(gpus.ids):
        where = " in CUDA_VISIBLE_DEVICES" if gpus.chosen else ""
        raise UserError("--num-shard %d: each shard needs a GPU, %d seen%s" % (shards, len(gpus.ids), where))
    return gpus.ids[:shards]
