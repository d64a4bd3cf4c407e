"""The model thread. Requests join and leave the batch between tokens; nobody waits for somebody else's end.

    submitted -> waiting (in order) -> joining (its prompt is read, piece by piece) -> running (one token per step) -> gone
                                                                                        paused, where room is short (seats)

Each turn reads some ``TURN`` prompt tokens and then decodes one token for everyone who runs, so a long prompt slows the others
down but never stops them. Prompts are read in pieces of a fixed size, several in one pass only where that changes no bit.
"""

import asyncio
import logging
import time
from typing import Callable, List, Optional, Sequence, Tuple, Union

import torch
from torch import Tensor

from .engine import Engine
from .errors import ApiError, failed
from .inbox import STOPPING, Event, Inbox, hand_over
from .metrics import Metrics
from .row import BROKEN, Job, Row, choose, words
from .sampling import Choice
from .seats import Seats
from .text import Text
from .worker import Worker

LOG = logging.getLogger("pipedock.serve")
PIECE = 256  # prompt tokens per forward pass
TURN = 256  # prompt tokens between two decode steps; the last piece may go beyond


class Scheduler:
    """Owns the engine and ``worker``, the thread in which that was loaded. ``max_rows``, ``max_tokens``: see Seats."""

    def __init__(self, engine: Engine, worker: Worker, text: Text, metrics: Metrics, max_rows: int, max_tokens: int) -> None:
        self._worker, self._engine, self._text, self._metrics = worker, engine, text, metrics
        engine.before_recording = self._deliver
        self._seats = Seats(
            engine, text, max_rows, max_tokens,
            lost=lambda job, error: self._out.append((job, failed(words(error)))),
            short=lambda: metrics.count("pipedock_batch_pause_count"),
        )  # fmt: skip
        self._inbox = Inbox()
        self._out: List[Tuple[Job, Event]] = []
        self._loop: Optional[asyncio.AbstractEventLoop] = None
        self.suspect = False  # the last forward pass failed

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._worker.end_with(self._run)

    def stop(self) -> None:
        self._inbox.stop()
        self._worker.join(timeout=30)

    @property
    def alive(self) -> bool:
        return self._worker.alive

    def submit(self, job: Job) -> None:
        self._inbox.put(job)

    def _run(self) -> None:
        try:
            with torch.inference_mode():
                while self._turn():
                    pass
        finally:
            self._fail(STOPPING, self._seats.queued + self._inbox.close())

    def _turn(self) -> bool:
        """False: stop. Whatever is raised here is one failed pass: everybody needs this thread."""
        try:
            if not self._take():
                return False
            self._seats.drop_cancelled()
            self._gauges()
            self._seats.settle()
            self._join()
            self._decode()
        except Exception as error:  # noqa: BLE001 - a model, Triton's compiler
            self._fail(words(error))
        if not self._behind:
            self._deliver()
        return True

    def _take(self) -> bool:
        """New requests from the inbox; waits for one when there is nothing to do. False: stop."""
        idle = self._seats.empty
        if idle:
            self._safely(lambda: self._engine.rest(self._seats.max_tokens))
            self._gauges()
        while idle or not self._inbox.empty():
            job = self._inbox.get()
            if job is None:
                return False
            self._seats.waiting.append(job)
            idle = False
        return True

    def _gauges(self) -> None:
        self._metrics.gauge("tgi_queue_size", len(self._seats.queued))
        self._metrics.gauge("tgi_batch_current_size", len(self._seats.rows))
        self._metrics.gauge("tgi_batch_current_max_tokens", sum(row.job.accepted.total for row in self._seats.rows))

    def _join(self) -> None:
        """Read prompts of waiting requests while this turn's share lasts."""
        left = TURN
        while left > 0 and (self._seats.joining or self._seats.admit()):
            read = self._next_pieces(left)
            left -= sum(len(piece) for _, piece in read)
            started = self._metrics.begin("prefill", len(read))
            self._deliver()  # this may take longer than the pass before it
            logits = self._prefill(read)
            self._end("prefill", started)
            for row, piece in read:
                if row.job.accepted.decoder_input_details:
                    row.add_prefill(self._text, piece, logits)
                row.length += len(piece)
            done = [row for row, _ in read if row is not self._seats.joining]
            first = len(logits) - len(read)  # one prompt may have logits behind each of its tokens
            for row, choice in zip(done, choose(done, logits[first:][: len(done)], self._engine.best)):
                self._add(row, choice)

    def _next_pieces(self, left: int) -> List[Tuple[Row, List[int]]]:
        """What the next pass reads: the joining row's piece and, if the engine can, those of rows admitted behind it, up to about
        ``left`` tokens. A row whose prompt has been read then is no longer the joining one."""
        read: List[Tuple[Row, List[int]]] = []
        while left > 0 and (self._seats.joining or self._seats.admit()):
            row = self._seats.joining
            assert row is not None
            alone = row.job.accepted.decoder_input_details or not self._engine.together
            if read and alone:
                break
            piece = row.job.accepted.ids[row.length : row.length + PIECE]
            read.append((row, piece))
            left -= len(piece)
            if row.length + len(piece) < len(row.job.accepted.ids):
                break
            self._seats.joining = None
            if alone:
                break
        return read

    def _prefill(self, read: List[Tuple[Row, List[int]]]) -> Tensor:
        row, piece = read[0]
        first = self._seats.rows.index(row)
        if len(read) == 1:
            return self._engine.prefill(first, piece, row.length, row.job.accepted.decoder_input_details)
        return self._engine.prefill_together(first, [piece for _, piece in read], [row.length for row, _ in read])

    def _decode(self) -> None:
        """One more token for every running request."""
        rows = self._seats.running
        if not rows:
            return
        started = self._metrics.begin("decode", len(rows))
        logits = self._engine.decode([row.tokens[-1].id for row in rows], [row.length for row in rows])
        if self._behind:
            self._deliver()
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
            event = failed(words(error))
        if isinstance(event, ApiError):
            self._out.append((row.job, event))
            self._seats.leave(row)
            return
        if row.job.stream or event.finish_reason:
            self._out.append((row.job, event))
        if event.finish_reason:
            row.job.finish(row)
            self._seats.leave(row)

    def _fail(self, text: str, others: Sequence[Job] = ()) -> None:
        """The forward pass broke: everybody in it (and ``others``) gets the error, those who wait do not."""
        self.suspect = True
        self._out += [(job, failed(text)) for job in self._seats.clear() + list(others)]
        self._deliver()
        self._safely(self._engine.clear)

    def _safely(self, work: Callable[[], None]) -> None:
        """Give memory back: where that fails, the next pass will, too."""
        try:
            work()
        except Exception as error:  # noqa: BLE001 - a card that is out of order raises anything, and the thread must go on
            self.suspect = True
            LOG.warning("memory could not be given back: %s", words(error))

    def _end(self, method: str, started: float, forward: Optional[float] = None) -> None:
        self.suspect = False
        self._metrics.end(method, started, forward)

    @property
    def _behind(self) -> bool:
        """Events are handed over when the next decode pass has been launched: they are written while the GPU computes it."""
        return self._engine.graphs and bool(self._seats.rows)

    def _deliver(self) -> None:
        """Hand the turn's events to the event loop, all in one call."""
        batch, self._out = self._out, []
        if batch and self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(hand_over, batch)
