"""The model thread. Requests join and leave the batch between tokens; nobody waits for somebody else's end.

    submitted -> waiting (in order) -> joining (its prompt is read, piece by piece) -> running (one token per step) -> gone

Each turn reads at most ``TURN`` prompt tokens and then decodes one token for everyone who runs, so a long prompt slows the others
down but never stops them. Prompts are read alone and in pieces of a fixed size: the same numbers whoever else is there.
"""

import asyncio
import queue
import threading
import time
from collections import deque
from typing import Deque, Dict, List, Optional, Sequence, Tuple, Union

import torch
from torch import Tensor

from .engine import Engine
from .errors import ApiError, failed
from .metrics import Metrics
from .row import Job, Row
from .sampling import Choice, choices, likeliest
from .shapes import TokenEvent
from .text import Text

PIECE = 256  # prompt tokens per forward pass
TURN = 256  # prompt tokens between two decode steps

Event = Union[TokenEvent, ApiError]
# What torch raises, and what a mistake of ours would: that must not end the thread that everybody needs.
BROKEN = (RuntimeError, MemoryError, ArithmeticError, AssertionError, AttributeError, LookupError, TypeError, ValueError)


class Scheduler:
    """Owns the engine. ``max_rows`` requests run at once, and rows x the longest one's tokens stay within ``max_tokens``."""

    def __init__(self, engine: Engine, text: Text, metrics: Metrics, max_rows: int, max_tokens: int) -> None:
        self._engine, self._text, self._metrics = engine, text, metrics
        self._max_rows, self._max_tokens = max_rows, max_tokens
        self._inbox: queue.SimpleQueue[Optional[Job]] = queue.SimpleQueue()
        self._waiting: Deque[Job] = deque()
        self._rows: List[Row] = []  # row i of the cache; a joining one comes last
        self._joining: Optional[Row] = None
        self._out: List[Tuple[Job, Event]] = []
        self._thread = threading.Thread(target=self._run, name="model", daemon=True)
        self._loop: Optional[asyncio.AbstractEventLoop] = None
        self.suspect = False  # the last forward pass failed

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._thread.start()

    def stop(self) -> None:
        self._inbox.put(None)
        self._thread.join(timeout=30)

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def submit(self, job: Job) -> None:
        self._inbox.put(job)

    def _run(self) -> None:
        try:
            with torch.inference_mode():
                while self._take():
                    self._drop_cancelled()
                    try:
                        self._join()
                        self._decode()
                    except BROKEN as error:
                        self._fail(_words(error))
                    self._deliver()
        finally:
            self._fail("the server is stopping", list(self._waiting))
            self._deliver()

    def _take(self) -> bool:
        """New requests from the inbox; waits for one when there is nothing to do. False: stop."""
        idle = not self._rows and not self._waiting
        if idle:
            self._engine.rest(self._max_tokens)
            self._gauges()
        while idle or not self._inbox.empty():
            job = self._inbox.get()
            if job is None:
                return False
            self._waiting.append(job)
            idle = False
        return True

    def _drop_cancelled(self) -> None:
        for row in [row for row in self._rows if row.job.cancelled]:
            self._leave(row)
        if any(job.cancelled for job in self._waiting):
            self._waiting = deque(job for job in self._waiting if not job.cancelled)
        self._gauges()

    def _gauges(self) -> None:
        self._metrics.gauge("tgi_queue_size", len(self._waiting))
        self._metrics.gauge("tgi_batch_current_size", len(self._rows))
        self._metrics.gauge("tgi_batch_current_max_tokens", sum(row.job.accepted.total for row in self._rows))

    def _join(self) -> None:
        """Read prompts of waiting requests while this turn's share lasts."""
        left = TURN
        while left > 0 and (self._joining or self._admit()):
            row = self._joining
            assert row is not None
            piece = row.job.accepted.ids[row.length : row.length + PIECE]
            left -= len(piece)
            details = row.job.accepted.decoder_input_details
            started = self._begin("prefill", 1)
            logits = self._engine.prefill(len(self._rows) - 1, piece, row.length, details)
            self._end("prefill", started)
            if details:
                row.add_prefill(self._text, piece, logits)
            row.length += len(piece)
            if row.length == len(row.job.accepted.ids):
                self._joining = None
                self._add(row, choose([row], logits[-1:], self._engine.best)[0])

    def _admit(self) -> bool:
        """Let the next waiting request in if there is a row and room for all its tokens; the first one always has both."""
        if not self._waiting or len(self._rows) >= self._max_rows:
            return False
        longest = max([self._waiting[0].accepted.total] + [row.job.accepted.total for row in self._rows])
        if self._rows and (len(self._rows) + 1) * longest > self._max_tokens:
            return False
        self._joining = Row(self._waiting.popleft(), self._text)
        self._joining.job.started = time.perf_counter()
        self._rows.append(self._joining)
        return True

    def _decode(self) -> None:
        """One more token for every running request."""
        rows = [row for row in self._rows if row is not self._joining]
        if not rows:
            return
        started = self._begin("decode", len(rows))
        logits = self._engine.decode([row.tokens[-1].id for row in rows], [row.length for row in rows])
        forward = time.perf_counter()
        for row in rows:  # all of them before anybody leaves: a row is moved with its newest token
            row.length += 1
        for row, choice in zip(rows, choose(rows, logits, self._engine.best)):
            self._add(row, choice)
        self._metrics.observe("tgi_batch_decode_duration", time.perf_counter() - forward, "decode")
        self._end("decode", started, forward)

    def _add(self, row: Row, choice: Union[Choice, ApiError]) -> None:
        """A chosen token: its text, whether it ends the request, and its event. What fails here concerns this request alone."""
        try:
            event: Event = choice if isinstance(choice, ApiError) else row.add(self._text, choice)
        except BROKEN as error:
            event = failed(_words(error))
        if isinstance(event, ApiError):
            self._out.append((row.job, event))
            self._leave(row)
            return
        if row.job.stream or event.finish_reason:
            self._out.append((row.job, event))
        if event.finish_reason:
            row.job.finish(row)
            self._leave(row)

    def _leave(self, row: Row) -> None:
        """Free the row. Running rows stay in front without holes and a joining one behind them, so up to two are moved."""
        hole = self._rows.index(row)
        if row is self._joining:
            self._joining = None
        last_running = len(self._rows) - (2 if self._joining else 1)
        for source in [last_running] + ([last_running + 1] if self._joining else []):
            if source > hole:
                self._engine.move(source, hole)
                self._rows[hole] = self._rows[source]
                hole = source
        self._rows.pop()

    def _fail(self, text: str, others: Sequence[Job] = ()) -> None:
        """The forward pass broke: everybody in it (and ``others``) gets the error, those who wait do not."""
        self.suspect = True
        self._out += [(job, failed(text)) for job in [row.job for row in self._rows] + list(others)]
        self._rows, self._joining = [], None
        self._engine.clear()

    def _deliver(self) -> None:
        """Hand the turn's events to the event loop, all in one call."""
        batch, self._out = self._out, []
        if batch and self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(_put_all, batch)

    def _begin(self, method: str, rows: int) -> float:
        self._metrics.count("tgi_batch_inference_count", method)
        self._metrics.observe("tgi_batch_next_size", rows)
        return time.perf_counter()

    def _end(self, method: str, started: float, forward: Optional[float] = None) -> None:
        self.suspect = False
        now = time.perf_counter()
        self._metrics.count("tgi_batch_inference_success", method)
        self._metrics.observe("tgi_batch_forward_duration", (forward or now) - started, method)
        self._metrics.observe("tgi_batch_inference_duration", now - started, method)


def choose(rows: List[Row], logits: Tensor, best: Optional[Tensor]) -> List[Union[Choice, ApiError]]:
    """The next token of each row; ``logits`` [B, V]; ``best``: what ``likeliest`` gives for them (and more), where it is known.
    How a row is treated depends on that row alone, and so does its failure."""
    plain = [place for place, row in enumerate(rows) if row.sampler.plain]
    found: Dict[int, Union[Choice, ApiError]] = {}
    if plain:
        these = slice(len(rows)) if len(plain) == len(rows) else plain
        found.update(zip(plain, choices(likeliest(logits[these]) if best is None else best[:, these])))
    for place, row in enumerate(rows):
        if place not in found:
            try:
                found[place] = row.sampler.pick(logits[place])
            except BROKEN as error:
                found[place] = failed(_words(error))
    return [found[place] for place in range(len(rows))]


def _words(error: BaseException) -> str:
    return "%s: %s" % (type(error).__name__, str(error).split("\n")[0])


def _put_all(batch: List[Tuple[Job, Event]]) -> None:
    for job, event in batch:
        job.events.put_nowait(event)
