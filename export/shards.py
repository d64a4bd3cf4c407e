"""Which tensors go into which file of an export, and the index that says so."""

import json
import re
from pathlib import Path
from typing import List, Tuple

from pipeline_train.errors import UserError
from pipeline_train.weights.files import WIDTHS
from pipeline_train.weights.writing import Item

Shard = Tuple[str, List[Item]]  # its file's name, its tensors in order
SHARD_SIZE = "5GB"  # unless somebody says otherwise
UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def plan(items: List[Item], limit: int) -> List[Shard]:
    """[(file name, its items)]: shards of at most ``limit`` bytes (one larger tensor makes a shard of its own), in order.

    Inside a shard wide dtypes come first, so that every tensor is aligned to its own width.
    """
    shards: List[List[Item]] = [[]]
    used = 0
    for item in items:
        if shards[-1] and used + item.nbytes > limit:
            shards.append([])
            used = 0
        shards[-1].append(item)
        used += item.nbytes
    shards = [sorted(shard, key=lambda i: -WIDTHS[i.dtype]) for shard in shards]
    if len(shards) == 1:
        return [("model.safetensors", shards[0])]
    return [("model-%05d-of-%05d.safetensors" % (n + 1, len(shards)), shard) for n, shard in enumerate(shards)]


def write_index(folder: Path, planned: List[Shard]) -> None:
    """model.safetensors.index.json, when there is more than one shard."""
    if len(planned) == 1:
        return
    index = {
        "metadata": {"total_size": sum(item.nbytes for _, items in planned for item in items)},
        "weight_map": {item.name: name for name, items in planned for item in items},
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def parse_size(text: str) -> int:
    """ "5GB", "500MB", "2GiB" or a number of bytes -> bytes. Raises UserError."""
    found = re.match(r"^\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*$", str(text))
    size = float(found.group(1)) * UNITS.get(found.group(2).upper(), 0) if found else 0.0
    if found is not None and not found.group(2) and 0 < size < 100:
        raise UserError("--shard-size: %s bytes? Write it as 5GB, 500MB or 2GiB" % found.group(1))
    if not 0 < size < 2**63:
        raise UserError("--shard-size: %.40r is not a size; write it as 5GB, 500MB or 2GiB" % text)
    return max(1, int(size))
