"""A .npy file that grows: written in pieces, opened by ``numpy.load(mmap_mode="r")``, or read through by ``pieces``."""

import os
from pathlib import Path
from typing import Any, Iterator, List

import numpy as np

HEADER = 128  # bytes; room for any shape, and a multiple of 64 as the format wants
PIECE = 1 << 18  # rows read at once


class GrowingArray:
    """Rows of one dtype and fixed further dimensions; ``close`` writes the head that makes it a .npy file. What a process that was
    killed has written is still there: ``read`` what is trusted of it, then ``keep`` that.

    Format: numpy.lib.format, version 1.0.
    """

    def __init__(self, path: Path, dtype: Any, columns: int = 0) -> None:
        self.dtype, self.columns, self.rows = np.dtype(dtype), columns, 0
        self.file = path.open("r+b" if path.exists() else "w+b")
        self.file.seek(HEADER)

    def read(self, rows: int) -> np.ndarray:
        """The next rows of an unfinished file; fewer when it ends before."""
        size = self.dtype.itemsize * (self.columns or 1)
        left = max(0, os.fstat(self.file.fileno()).st_size - self.file.tell())
        raw = self.file.read(min(rows * size, left))
        return self._shaped(np.frombuffer(raw[: len(raw) // size * size], self.dtype))

    def keep(self, rows: int) -> None:
        """The first rows and nothing behind them; ``append`` goes on there."""
        self.rows = rows
        self.file.truncate(HEADER + rows * self.dtype.itemsize * (self.columns or 1))
        self.file.seek(0, os.SEEK_END)

    def append(self, rows: Any) -> None:
        array = self._shaped(np.ascontiguousarray(rows, dtype=self.dtype))
        self.file.write(array.tobytes())
        self.rows += len(array)

    def _shaped(self, array: np.ndarray) -> np.ndarray:
        return array.reshape(-1, self.columns) if self.columns else array

    def close(self) -> None:
        shape = "(%d, %d)" % (self.rows, self.columns) if self.columns else "(%d,)" % self.rows
        text = "{'descr': '%s', 'fortran_order': False, 'shape': %s, }" % (self.dtype.str, shape)
        self.file.seek(0)
        self.file.write(b"\x93NUMPY\x01\x00" + (HEADER - 10).to_bytes(2, "little"))
        self.file.write(text.ljust(HEADER - 11).encode("ascii") + b"\n")
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()


def load(path: Path) -> np.ndarray:
    """Mapped, not read. An empty file cannot be mapped."""
    rows: List[Any] = np.load(str(path), mmap_mode="r")
    return rows  # type: ignore[return-value]


def head(path: Path) -> bytes:
    """What stands before the rows."""
    with path.open("rb") as file:
        return file.read(os.path.getsize(str(path)) - load(path).nbytes)


def pieces(path: Path) -> Iterator[np.ndarray]:
    """All rows of a file in memory, some at a time: of a mapped file each page that was read would stay counted as used."""
    shape, dtype = load(path).shape, load(path).dtype
    size = int(np.prod(shape[1:], dtype=np.int64)) * dtype.itemsize
    with path.open("rb") as file:
        file.seek(os.path.getsize(str(path)) - shape[0] * size)
        for begin in range(0, shape[0], PIECE):
            rows = min(PIECE, shape[0] - begin)
            yield np.frombuffer(file.read(rows * size), dtype).reshape((rows,) + shape[1:])
