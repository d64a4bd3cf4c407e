"""What this machine still has to give, and where its user keeps things. Standard library only."""

import os
from pathlib import Path
from typing import Dict, Optional

MEMINFO = Path("/proc/meminfo")
GROUPS = Path("/sys/fs/cgroup")  # a container's own limits, version 2 in this folder, version 1 in memory/
UNLIMITED = 1 << 60  # version 1 says "none" with a number like this
GROUP_FILES = (
    ("memory.max", "memory.current", "memory.stat", "inactive_file"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_inactive_file"),
)


def available_memory() -> Optional[int]:
    """Bytes that can be taken without swapping or meeting the container's limit; None where that is not known."""
    found = []
    kib = _table(MEMINFO).get("MemAvailable:")
    if kib is not None:
        found.append(kib * 1024)
    for limit, usage, statistics, cache in GROUP_FILES:
        numbers = [_number(GROUPS / limit), _number(GROUPS / usage)]
        if numbers[0] is not None and numbers[1] is not None:
            found.append(numbers[0] - numbers[1] + _table(GROUPS / statistics).get(cache, 0))
    return max(0, min(found)) if found else None


def memory_limit() -> Optional[int]:
    """Bytes that this container may take; None without a limit of its own."""
    found = [number for number in (_number(GROUPS / limit) for limit, _, _, _ in GROUP_FILES) if number is not None]
    return min(found) if found and min(found) < UNLIMITED else None


def _number(path: Path) -> Optional[int]:
    try:
        return int(path.read_text(encoding="ascii"))  # "max": no limit
    except (OSError, ValueError):
        return None


def _table(path: Path) -> Dict[str, int]:
    """Lines of "name number ..."."""
    try:
        rows = [line.split() for line in path.read_text(encoding="ascii").splitlines()]
    except (OSError, ValueError):
        return {}
    return {row[0]: int(row[1]) for row in rows if len(row) > 1 and row[1].isdigit()}


def cache_folder() -> Optional[Path]:
    """pipedock's own in $XDG_CACHE_HOME or ~/.cache; None where no home is known: no HOME, and a user without a passwd entry."""
    named = os.environ.get("XDG_CACHE_HOME") or os.path.join("~", ".cache")
    path = os.path.expanduser(named)
    return None if path.startswith("~") else Path(path) / "pipedock"


def size(nbytes: int) -> str:
    return "%.2f GiB" % (nbytes / 2**30) if nbytes >= 2**30 / 100 else "%.2f MiB" % (nbytes / 2**20)
