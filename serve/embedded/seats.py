"""Who is in the batch: the cache's rows, who waits for one, and who has left one for a while.

A request may ask for far more tokens than it comes to: one that names no limit, for all that the model has positions for. So room
is kept for what a request has and for a leg more (validation.LEG). When the legs of all no longer fit, the newest request's keys
and values go to the host's memory until there is room again: the same bits, only later. The oldest one stays, so all come to their
end, and nobody new is let in before those who wait in the middle of their answer.
"""

import time
from collections import deque
from typing import Callable, Deque, List, NamedTuple, Optional

from torch import Tensor

from .engine import Engine
from .recorded import most_needed
from .row import BROKEN, Job, Row
from .text import Text


class Paused(NamedTuple):
    """A row that has left, with what the cache held of it."""

    row: Row
    saved: List[Tensor]


class Seats:
    """``rows[i]`` is row i of the cache; the ``joining`` one, whose prompt is being read, comes last. There are at most
    ``max_rows``, and rows x the most that one of them has room for stays within ``max_tokens``; a single one is always let in.
    ``lost`` is told of a job that fails by itself, ``short`` of every pause."""

    def __init__(
        self,
        engine: Engine,
        text: Text,
        max_rows: int,
        max_tokens: int,
        lost: Callable[[Job, BaseException], None],
        short: Callable[[], None],
    ) -> None:
        self._engine, self._text, self._lost, self._short = engine, text, lost, short
        self.max_rows, self.max_tokens, self._most = max_rows, max_tokens, most_needed(max_rows, max_tokens)
        self.waiting: Deque[Job] = deque()
        self.paused: List[Paused] = []  # oldest first, all of them newer than those in ``rows``
        self.rows: List[Row] = []
        self.joining: Optional[Row] = None

    @property
    def empty(self) -> bool:
        return not (self.rows or self.waiting or self.paused)

    @property
    def queued(self) -> List[Job]:
        """Who is in no row."""
        return [one.row.job for one in self.paused] + list(self.waiting)

    @property
    def running(self) -> List[Row]:
        """Whose prompts have been read: one more token each."""
        return [row for row in self.rows if row is not self.joining]

    def drop_cancelled(self) -> None:
        for row in [row for row in self.rows if row.job.cancelled]:
            self.leave(row)
        if any(job.cancelled for job in self.queued):
            self.waiting = deque(job for job in self.waiting if not job.cancelled)
            self.paused = [one for one in self.paused if not one.row.job.cancelled]

    def settle(self) -> None:
        """Before a turn: the newest pause while there is no room for all; those who have paused come back when there is."""
        for row in self.rows:
            row.reserve()
        while len(self.rows) > 1 and len(self.rows) * self._longest() > self.max_tokens:
            self._pause(max(self.rows, key=lambda row: row.job.started))
        self._fit()
        while self.paused and self.joining is None and self._fits(self.paused[0].row.reserved):
            row, saved = self.paused.pop(0)
            self.rows.append(row)
            if row.length < len(row.job.accepted.ids):
                self.joining = row
            self._fit()
            self._engine.put(len(self.rows) - 1, saved)

    def _pause(self, row: Row) -> None:
        try:
            saved = self._engine.taken(self.rows.index(row), row.length)
        except BROKEN as error:  # the host's memory is full: this one ends, the others go on
            self._lost(row.job, error)
            self.leave(row)
            return
        self._short()
        self.leave(row)  # where that fails, it fails with all others
        self.paused.insert(0, Paused(row, saved))

    def _fits(self, reserved: int) -> bool:
        longest = self._longest(reserved)
        return not self.rows or (len(self.rows) < self.max_rows and (len(self.rows) + 1) * longest <= self.max_tokens)

    def _longest(self, reserved: int = 0) -> int:
        return max([reserved] + [row.reserved for row in self.rows])

    def _fit(self) -> None:
        if self.rows:
            self._engine.fit(len(self.rows), self._longest(), self._most)

    def admit(self) -> bool:
        """Let the next waiting request in if there is room: it is the joining one then."""
        if not self.waiting or self.paused or not self._fits(self.waiting[0].accepted.reserved()):
            return False
        job = self.waiting.popleft()
        try:
            self.joining = Row(job, self._text)
        except BROKEN as error:  # its own failure, nobody else's
            self._lost(job, error)
            return self.admit()
        job.started = time.perf_counter()
        self.rows.append(self.joining)
        self._fit()
        return True

    def leave(self, row: Row) -> None:
        """Free the row. Running rows stay in front without holes and a joining one behind them, so up to two are moved."""
        hole = self.rows.index(row)
        if row is self.joining:
            self.joining = None
        last_running = len(self.rows) - (2 if self.joining else 1)
        for source in [last_running] + ([last_running + 1] if self.joining else []):
            if source > hole:
                if self.rows[source].length:  # else nothing of it has been read, and the table may have no such row yet
                    self._engine.move(source, hole)
                self.rows[hole] = self.rows[source]
                hole = source
        self.rows.pop()

    def clear(self) -> List[Job]:
        """All rows are free -> whose they were."""
        jobs = [row.job for row in self.rows]
        self.rows, self.joining = [], None
        return jobs
