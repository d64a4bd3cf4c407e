"""Safetensors files written one tensor at a time, so that memory is one tensor and not one shard.

The format (huggingface/safetensors, README "Format"): 8 bytes little-endian length n, n bytes of JSON
{name: {"dtype", "shape", "data_offsets"}} padded with spaces to a multiple of 8, then the tensors' bytes, little-endian, row-major.
"""

import json
import os
import re
from pathlib import Path
from typing import Any, Dict, Iterable, List, NamedTuple, Tuple

import torch

from pipeline_train.errors import UserError
from pipeline_train.weights.files import NAMES, WIDTHS

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


class Item(NamedTuple):
    """A tensor to be written: its name in the file, safetensors dtype name, shape, and where the caller finds it."""

    name: str
    dtype: str
    shape: Tuple[int, ...]
    source: Any = None

    @property
    def nbytes(self) -> int:
        count = WIDTHS[self.dtype]
        for n in self.shape:
            count *= n
        return count


class ShardWriter:
    """Writes the header at once, then exactly ``items`` in their order, and fsyncs. Metadata {"format": "pt"}, which transformers
    4.30 insists on."""

    def __init__(self, path: Path, items: List[Item]) -> None:
        self._left = list(items)
        header: Dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for item in items:
            header[item.name] = {"dtype": item.dtype, "shape": list(item.shape), "data_offsets": [end, end + item.nbytes]}
            end += item.nbytes
        text = json.dumps(header, separators=(",", ":")).encode("utf-8")
        text += b" " * (-len(text) % 8)
        self._file = open(str(path), "wb")
        self._file.write(len(text).to_bytes(8, "little") + text)

    def __enter__(self) -> "ShardWriter":
        return self

    def write(self, name: str, pieces: Iterable[torch.Tensor]) -> None:
        """Append the next tensor, as flat pieces in order; name, dtype and size are those announced."""
        item = self._left.pop(0)
        assert name == item.name, (name, item)
        written = 0
        for piece in pieces:
            assert NAMES[piece.dtype] == item.dtype, (piece.dtype, item)
            data = piece.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
            self._file.write(memoryview(data))  # type: ignore[arg-type]
            written += data.nbytes
        assert written == item.nbytes, (written, item)

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        try:
            if kind is None:
                assert not self._left, self._left[:1]
                self._file.flush()
                os.fsync(self._file.fileno())
        finally:
            self._file.close()


def plan(items: List[Item], limit: int) -> List[Tuple[str, List[Item]]]:
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


def write_index(folder: Path, planned: List[Tuple[str, List[Item]]]) -> None:
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
    if not 0 < size < 2**63:
        raise UserError("--shard-size: %.40r is not a size; write it as 5GB, 500MB or 2GiB" % text)
    return max(1, int(size))
