"""Which tensors a file of weights holds, without loading it. Standard library only.

.safetensors: the header says it. .bin: a zip with a pickle in it (torch.save since 1.6);
its strings are read, nothing of it is run.
"""

import os
import pickletools
import zipfile
from typing import Dict, FrozenSet, Optional, Tuple

from pipeline_train import safetensors_header

PIECE = 4 << 20  # bytes compared at a time
Span = Tuple[str, int, int]  # (file, first byte, end)


def of_safetensors(path: str) -> Optional[Dict[str, Span]]:
    """Where each tensor lies; None for a file that is not whole or cannot be read."""
    try:
        size = os.path.getsize(path)
        header, data = safetensors_header.read(path)
        found = {name: (path, data + item["data_offsets"][0], data + item["data_offsets"][1])
                 for name, item in header.items() if name != "__metadata__"}  # fmt: skip
        return found if all(end <= size for _, _, end in found.values()) else None
    except (OSError, ValueError, KeyError, TypeError, IndexError, RecursionError):
        return None


def of_bin(path: str) -> Optional[FrozenSet[str]]:
    """Names of the tensors; None for a file of another making."""
    try:
        with zipfile.ZipFile(path) as archive:
            inner = [name for name in archive.namelist() if name.endswith("/data.pkl")]
            pickled = archive.read(inner[0])
        words = [word for _, word, _ in pickletools.genops(pickled) if isinstance(word, str)]
    except (OSError, ValueError, IndexError, KeyError, zipfile.BadZipFile, NotImplementedError, RuntimeError):
        return None
    found = frozenset(word for word in words if word.endswith((".weight", ".bias", ".inv_freq")))
    return found or None


def same_bytes(one: Span, other: Span) -> Optional[bool]:
    """Whether two tensors of the same dtype hold the same; None when a file cannot be read."""
    if one[2] - one[1] != other[2] - other[1]:
        return False
    try:
        with open(one[0], "rb") as first, open(other[0], "rb") as second:
            first.seek(one[1])
            second.seek(other[1])
            left = one[2] - one[1]
            while left > 0:
                size = min(PIECE, left)
                piece = first.read(size)
                if len(piece) < size:
                    return None
                if piece != second.read(size):
                    return False
                left -= size
    except OSError:
        return None
    return True
