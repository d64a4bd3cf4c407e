"""Bytes per second and peak memory of a conversion, measured by the process itself."""

import resource
import sys
import threading
import time
from typing import Callable, Dict, Optional

Progress = Callable[[int, int], None]  # (bytes done, bytes in all)


def peak_gib() -> float:
    """The most memory this process ever had resident, GiB. VmHWM, because ru_maxrss keeps a parent's peak across exec."""
    try:
        with open("/proc/self/status", encoding="ascii") as file:
            kib = next(int(line.split()[1]) for line in file if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
    return kib / 2**20


class Meter:
    """Counts the bytes written and tells ``progress`` after each tensor. For several threads."""

    def __init__(self, total: int, progress: Optional[Progress] = None) -> None:
        self.total, self.done, self._lock = total, 0, threading.Lock()
        self._progress, self._start = progress, time.perf_counter()

    def add(self, nbytes: int) -> None:
        with self._lock:
            self.done += nbytes
            if self._progress is not None:
                self._progress(self.done, self.total)

    def figures(self) -> Dict[str, float]:
        """{"bytes", "seconds", "gb_per_s", "peak_gib"} so far."""
        seconds = time.perf_counter() - self._start
        rate = self.done / 1e9 / seconds if seconds > 0 else 0.0
        return {"bytes": self.done, "seconds": round(seconds, 3), "gb_per_s": round(rate, 3), "peak_gib": round(peak_gib(), 3)}


def print_progress(what: str) -> Progress:
    """A progress line on stderr: rewritten in place on a terminal, a line every few seconds elsewhere. With GB/s and time left."""
    terminal, start = sys.stderr.isatty(), time.perf_counter()
    shown = [start]

    def show(done: int, total: int) -> None:
        now = time.perf_counter()
        if now - shown[0] < (0.1 if terminal else 5.0) and not (terminal and done >= total):
            return
        shown[0] = now
        rate = done / max(now - start, 1e-9)
        line = "%s: %.2f of %.2f GB, %.2f GB/s, %d s left" % (
            what,
            done / 1e9,
            total / 1e9,
            rate / 1e9,
            (total - done) / max(rate, 1.0),
        )
        sys.stderr.write("\r%s\x1b[K" % line + ("\n" if done >= total else "") if terminal else line + "\n")
        sys.stderr.flush()

    return show


def text_of(figures: Dict[str, float]) -> str:
    return "%.2f GB in %.1f s (%.2f GB/s), peak memory %.2f GiB" % (
        figures["bytes"] / 1e9, figures["seconds"], figures["gb_per_s"], figures["peak_gib"],
    )  # fmt: skip
