"""How much memory is left."""

import os
from pathlib import Path
from typing import List

import torch


def free_memory(device: torch.device) -> int:
    """Bytes: of the GPU, or what the system (and the container's limit) leaves."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for line in _lines("/proc/meminfo"):
        if line.startswith("MemAvailable:"):
            free = int(line.split()[1]) * 1024
    limit = "".join(_lines("/sys/fs/cgroup/memory.max")).strip()
    used = "".join(_lines("/sys/fs/cgroup/memory.current")).strip()
    return min(free, int(limit) - int(used)) if limit.isdigit() and used.isdigit() else free


def _lines(path: str) -> List[str]:
    try:
        return Path(path).read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
