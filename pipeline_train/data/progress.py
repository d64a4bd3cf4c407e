"""How far a long preparation is: a bar on a terminal, a plain line now and then elsewhere."""

import sys
import time
from typing import Any, Callable

Say = Callable[[str], None]

EVERY_S = 5.0  # between two plain lines
FRAME_S = 0.1  # between two pictures of the bar


def say_line(line: str) -> None:
    print(line, file=sys.stderr)


class Progress:
    """``start`` names a part of the work and how much of it there is, ``at`` says how much is done. A context."""

    def __init__(self, name: str, tell: Say) -> None:
        self.name, self.tell = name, tell
        self.bar: Any = _bar() if sys.stderr.isatty() else None
        self.task: Any = None
        self.what, self.total, self.begun, self.first, self.shown = "", 0, 0.0, 0, 0.0

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *raised: Any) -> None:
        if self.bar is not None:
            self.bar.stop()

    def start(self, what: str, total: int, done: int = 0) -> None:
        """``total`` and ``done`` are bytes; what was ``done`` before does not count as fast."""
        self.what, self.total, self.first = what, total, done
        self.begun = self.shown = time.monotonic()
        if self.bar is not None:
            if self.task is not None:
                self.bar.remove_task(self.task)
            self.task = self.bar.add_task("%s: %s" % (self.name, what), total=total, completed=done)
            self.bar.start()
            self.bar.refresh()

    def at(self, done: int, unit: str = "") -> None:
        """``unit``: what is counted instead of bytes, of nobody knows how many."""
        now = time.monotonic()
        if now - self.shown < (EVERY_S if self.bar is None else FRAME_S):
            return
        self.shown = now
        if self.bar is not None:
            if unit:
                self.bar.update(self.task, total=None, description="%s: %s, %d %s" % (self.name, self.what, done, unit))
            else:
                self.bar.update(self.task, completed=done)
            self.bar.refresh()
            return
        if unit:
            self.tell("%s: %s, %d %s" % (self.name, self.what, done, unit))
            return
        speed = (done - self.first) / (now - self.begun)
        left = int((self.total - done) / speed) if speed > 0 else 0
        self.tell(
            "%s: %s, %d %% (%.0f of %.0f MB, %.1f MB/s, %d:%02d:%02d left)"
            % (self.name, self.what, 100 * done // max(1, self.total), done / 1e6, self.total / 1e6, speed / 1e6,
               left // 3600, left // 60 % 60, left % 60)
        )  # fmt: skip


def _bar() -> Any:
    """Drawn when it is told to: a thread of its own would be in the way of forked processes."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    return Bar(*columns, console=Console(stderr=True), auto_refresh=False, transient=True)
