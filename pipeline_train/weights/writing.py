"""Safetensors files written one tensor at a time, so that memory is one tensor and not one file, hashed on the way.

The format (huggingface/safetensors, README "Format"): 8 bytes little-endian length n, n bytes of JSON
{name: {"dtype", "shape", "data_offsets"}} padded with spaces to a multiple of 8, then the tensors' bytes, little-endian, row-major.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any, Dict, Iterable, List, NamedTuple, Optional, Tuple

import torch

from .files import NAMES, WIDTHS

PIECE = 1 << 24  # bytes hashed and written at once


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


def header_of(items: List[Item], more: Optional[Dict[str, str]] = None) -> bytes:
    """All of a file that stands before the tensors' bytes, which follow in the order of ``items`` without gaps. Metadata
    {"format": "pt"}, which transformers 4.30 insists on, and ``more``."""
    header: Dict[str, Any] = {"__metadata__": dict({"format": "pt"}, **(more or {}))}
    end = 0
    for item in items:
        header[item.name] = {"dtype": item.dtype, "shape": list(item.shape), "data_offsets": [end, end + item.nbytes]}
        end += item.nbytes
    text = json.dumps(header, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def bytes_of(values: torch.Tensor) -> memoryview:
    """The values of a tensor of the host, as they are written."""
    return memoryview(values.detach().contiguous().reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


class TensorFile:
    """Writes the header (see ``header_of``) at once, then exactly ``items`` in their order, and fsyncs at the end of the ``with``.
    With ``hashed``, ``entry`` is then {"size", "sha256"} as a manifest lists it. OSError passes through."""

    def __init__(self, path: Path, items: List[Item], hashed: bool = False, more: Optional[Dict[str, str]] = None) -> None:
        self._left = list(items)
        self._size, self._digest = 0, hashlib.sha256() if hashed else None
        self._file = open(str(path), "wb")
        self._append(memoryview(header_of(items, more)))

    def __enter__(self) -> "TensorFile":
        return self

    def write(self, name: str, pieces: Iterable[torch.Tensor]) -> None:
        """Append the next tensor, as flat pieces in order; name, dtype and size are those announced."""
        item = self._left.pop(0)
        assert name == item.name, (name, item)
        before = self._size
        for piece in pieces:
            assert NAMES[piece.dtype] == item.dtype, (piece.dtype, item)
            self._append(bytes_of(piece))
        assert self._size - before == item.nbytes, (self._size - before, item)

    def _append(self, data: memoryview) -> None:
        for start in range(0, len(data), PIECE):
            piece = data[start : start + PIECE]
            if self._digest is not None:
                self._digest.update(piece)
            self._file.write(piece)
        self._size += len(data)

    @property
    def entry(self) -> Dict[str, Any]:
        assert self._digest is not None, "opened without hashed"
        return {"size": self._size, "sha256": self._digest.hexdigest()}

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        try:
            if kind is None:
                assert not self._left, self._left[:1]
                self._file.flush()
                os.fsync(self._file.fileno())
        finally:
            self._file.close()


def write_file(path: Path, tensors: Dict[str, torch.Tensor]) -> Dict[str, Any]:
    """Write and fsync a file of whole tensors; -> its entry in a manifest."""
    items = [Item(name, NAMES[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors.items()]
    with TensorFile(path, items, hashed=True) as file:
        for name, tensor in tensors.items():
            file.write(name, [tensor])
    return file.entry
