"""The encoded files of a data file in the making, and a journal of the blocks they hold: what was killed is gone on with behind the
last one that is whole."""

import hashlib
import json
import zlib
from pathlib import Path
from typing import Any, Dict, List, Optional

import numpy as np

from . import arrays, files
from .block_encoder import Encoded
from .totals import Totals


class Journal:
    """``folder`` holds ids, learn and offsets (see feed) and ``journal``: a JSON line of the block size, then one for each block:
    its rows in the three files, its counts, and a checksum of both. Each is written behind what it tells of."""

    def __init__(self, folder: Path, totals: Totals) -> None:
        self.folder, self.totals = folder, totals
        self.arrays = {
            "ids": arrays.GrowingArray(folder / "ids.npy", np.int32),
            "learn": arrays.GrowingArray(folder / "learn.npy", np.bool_),
            "offsets": arrays.GrowingArray(folder / "offsets.npy", np.int64, 3),
        }
        self.hashes = {name: hashlib.sha256() for name in self.arrays}
        self.blocks = 0
        self.path = folder / "journal"
        lines = self._go_on()
        self.file = self.path.open("wb")
        self.file.write(b"".join(lines))
        self.file.flush()

    def _go_on(self) -> List[bytes]:
        """Take up what is whole; -> the journal's lines as far as they are true."""
        head = _line({"bytes": files.BYTES, "values": files.VALUES})
        lines = self.path.read_bytes().splitlines(keepends=True) if self.path.exists() else []
        true = [head]
        rows = [0, 0, 0]
        for line in lines[1:] if lines[:1] == [head] else []:
            told = _read(line)
            if told is None:
                break  # torn, or damaged
            some = [array.read(n) for array, n in zip(self.arrays.values(), told["rows"])]
            if _checksum(some, told.get("counts"), told.get("shown")) != told.get("checksum"):
                break
            self._count(some, told["counts"], told["shown"])
            rows = [before + len(more) for before, more in zip(rows, some)]
            true.append(line)
        for array, number in zip(self.arrays.values(), rows):
            array.keep(number)
        return true

    def add(self, part: Encoded) -> None:
        offsets = part.offsets + np.array([self.arrays["ids"].rows, 0, 0])
        some = [part.ids, part.learn, offsets]
        for array, rows in zip(self.arrays.values(), some):
            array.append(rows)
            array.file.flush()
        checksum = _checksum(some, part.counts, part.shown)
        told = {"rows": [len(a) for a in some], "checksum": checksum, "counts": part.counts, "shown": part.shown}
        self.file.write(_line(told))
        self.file.flush()
        self._count(some, part.counts, part.shown)

    def _count(self, some: List[np.ndarray], counts: Dict[str, int], shown: Dict[str, List[str]]) -> None:
        for hashed, rows in zip(self.hashes.values(), some):
            hashed.update(rows.tobytes())
        self.totals.add(counts, shown, some[2][:, 1])
        self.blocks += 1

    def close(self) -> None:
        self.file.close()
        for array in self.arrays.values():
            array.file.close()

    def finish(self) -> Dict[str, str]:
        """Makes the files whole; -> a hash of each one's rows. The journal stays."""
        for array in self.arrays.values():
            array.close()
        return {name: found.hexdigest() for name, found in self.hashes.items()}


def _line(told: Dict[str, Any]) -> bytes:
    return (json.dumps(told) + "\n").encode("ascii")


def _read(line: bytes) -> Optional[Dict[str, Any]]:
    """A block's line with rows that can be read; whether the rest of it is true, its checksum tells."""
    try:
        told = json.loads(line) if line.endswith(b"\n") else None
    except (ValueError, RecursionError):
        return None
    rows = told.get("rows") if isinstance(told, dict) else None
    right = isinstance(rows, list) and len(rows) == 3 and all(type(number) is int and number >= 0 for number in rows)
    return told if right else None


def _checksum(some: List[np.ndarray], counts: Any, shown: Any) -> int:
    found = zlib.crc32(json.dumps([counts, shown], sort_keys=True).encode("ascii"))
    for rows in some:
        found = zlib.crc32(rows.tobytes(), found)
    return found
