"""Requests on their way from the event loop to the model thread, and their events on the way back."""

import queue
from contextlib import suppress
from typing import List, Optional, Tuple, Union

from .errors import ApiError, failed
from .row import Job
from .shapes import TokenEvent

STOPPING = "the server is stopping"
Event = Union[TokenEvent, ApiError]


class Inbox:
    """``put`` and ``stop`` are the event loop's, the rest the model thread's. No request is lost between them: one that comes when
    nobody looks any more is answered at once."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[Optional[Job]] = queue.SimpleQueue()
        self._closed = False

    def put(self, job: Job) -> None:
        self._queue.put(job)
        if self._closed:  # perhaps after the last look
            for late in self._left():
                late.events.put_nowait(failed(STOPPING))

    def stop(self) -> None:
        self._queue.put(None)

    def empty(self) -> bool:
        return self._queue.empty()

    def get(self) -> Optional[Job]:
        """The next one, waiting for it; None: stop."""
        return self._queue.get()

    def close(self) -> List[Job]:
        """-> those that are left."""
        self._closed = True
        return self._left()

    def _left(self) -> List[Job]:
        jobs: List[Job] = []
        with suppress(queue.Empty):
            while True:
                job = self._queue.get_nowait()
                jobs += [job] if job is not None else []
        return jobs


def hand_over(batch: List[Tuple[Job, Event]]) -> None:
    """In the event loop."""
    for job, event in batch:
        job.events.put_nowait(event)
