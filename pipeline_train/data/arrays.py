"""A .npy file that grows: written in pieces, opened by ``numpy.load(mmap_mode="r")``."""

import os
from pathlib import Path
from typing import Any, List

import numpy as np

HEADER = 128  # bytes; room for any shape, and a multiple of 64 as the format wants


class GrowingArray:
    """Rows of one dtype and fixed further dimensions, appended to ``path``.part; ``close`` names the file ``path``.

    Format: numpy.lib.format, version 1.0.
    """

    def __init__(self, path: Path, dtype: Any, columns: int = 0) -> None:
        self.path, self.dtype, self.columns, self.rows = path, np.dtype(dtype), columns, 0
        self.part = path.with_name(path.name + ".part")
        self.file = self.part.open("wb")
        self.file.write(b"\0" * HEADER)

    def append(self, rows: Any) -> np.ndarray:
        """Returns what was written, as an array."""
        array = np.ascontiguousarray(rows, dtype=self.dtype)
        if self.columns:
            array = array.reshape(-1, self.columns)
        self.file.write(array.tobytes())
        self.rows += len(array)
        return array

    def close(self) -> None:
        shape = "(%d, %d)" % (self.rows, self.columns) if self.columns else "(%d,)" % self.rows
        text = "{'descr': '%s', 'fortran_order': False, 'shape': %s, }" % (self.dtype.str, shape)
        self.file.seek(0)
        self.file.write(b"\x93NUMPY\x01\x00" + (HEADER - 10).to_bytes(2, "little"))
        self.file.write(text.ljust(HEADER - 11).encode("ascii") + b"\n")
        self.file.close()
        os.replace(str(self.part), str(self.path))

    def abandon(self) -> None:
        """Remove what was written so far, unless it is complete."""
        if not self.file.closed:
            self.file.close()
            self.part.unlink()


def load(path: Path) -> np.ndarray:
    """Mapped, not read. An empty file cannot be mapped."""
    rows: List[Any] = np.load(str(path), mmap_mode="r")
    return rows  # type: ignore[return-value]
