"""Between HTTP and the model thread: permits, checks, tokenizing beside the event loop, cancellation, figures of a request."""

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any, AsyncGenerator, Dict, List, Tuple, Union

from . import validation
from .batching import Scheduler
from .errors import ApiError, failed, overloaded
from .metrics import Metrics
from .params import Request
from .row import Job
from .shapes import KEEP_ALIVE, TokenEvent
from .text import Text
from .validation import Accepted, Limits

KEEP_ALIVE_S = 15.0


class Service:
    """One model behind one contract. All coroutines run in one event loop."""

    def __init__(
        self,
        text: Text,
        scheduler: Scheduler,
        metrics: Metrics,
        limits: Limits,
        max_concurrent: int,
        workers: int,
        info: Dict[str, Any],
    ) -> None:
        self.text, self.scheduler, self.metrics, self.limits, self.info = text, scheduler, metrics, limits, info
        self._free = max_concurrent
        self._workers = ThreadPoolExecutor(workers, thread_name_prefix="validation")

    async def start(self) -> None:
        self.scheduler.start(asyncio.get_running_loop())

    def stop(self) -> None:
        self.scheduler.stop()
        self._workers.shutdown(wait=False)

    async def generate(self, request: Request) -> Tuple[Job, List[Job]]:
        """-> (the answer, the other sequences of best_of), or ApiError."""
        self.metrics.count("tgi_request_count")
        best_of = request.parameters.best_of or 1
        try:
            if best_of > 1:
                validation.check_best_of(best_of, self.limits)
            jobs = await _all([self._one(request) for _ in range(best_of)])
        except ApiError as error:
            raise self._counted(error)
        jobs.sort(key=_mean_logprob, reverse=True)
        return jobs[0], jobs[1:]

    async def stream(self, request: Request) -> AsyncGenerator[Tuple[Job, Union[TokenEvent, bytes]], None]:
        """Token events as they come, and keep-alive comments (bytes) while none comes. Leaving the iterator frees the row."""
        self.metrics.count("tgi_request_count")
        with Permit(self) as permit:
            try:
                validation.check_stream(request.parameters)
                permit.take()
                job = Job(await self._accept(request), stream=True)
                self._submit(job)
            except ApiError as error:
                raise self._counted(error)
            beat = Beat(job.events)
            try:
                while not job.over:
                    event = await job.events.get()
                    beat.heard()
                    yield job, event if event is KEEP_ALIVE else self._received(job, event)
            except ApiError as error:
                raise self._counted(error)
            finally:
                beat.stop()
                self._release(job)

    async def healthy(self) -> bool:
        """The model thread lives, and after a failed forward pass: the next one works."""
        if not self.scheduler.alive:
            return False
        if not self.scheduler.suspect:
            return True
        probe = Job(Accepted([0], 1, validation.Sampling()), stream=False)
        self._submit(probe)
        try:
            return not isinstance(await asyncio.wait_for(probe.events.get(), 10.0), ApiError)
        except asyncio.TimeoutError:
            return not self.scheduler.suspect  # it waits for its turn, and others' passes work
        finally:
            probe.cancelled = True

    async def aside(self, function: Any, *args: Any) -> Any:
        """Run something slow of the tokenizer beside the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self._workers, function, *args)

    async def _one(self, request: Request) -> Job:
        with Permit(self) as permit:
            permit.take()
            job = Job(await self._accept(request), stream=False)
            self._submit(job)
            try:
                self._received(job, await job.events.get())
            finally:
                self._release(job)
            return job

    async def _accept(self, request: Request) -> Accepted:
        started = time.perf_counter()
        validation.check(request.inputs, request.parameters, self.limits)
        ids = await self.aside(self.text.encode, request.inputs, request.special)
        accepted = validation.accept(ids, request.parameters, self.limits)
        self.metrics.observe("tgi_request_validation_duration", time.perf_counter() - started)
        self.metrics.observe("tgi_request_input_length", len(accepted.ids))
        self.metrics.observe("tgi_request_max_new_tokens", accepted.max_new_tokens)
        return accepted

    def _submit(self, job: Job) -> None:
        if not self.scheduler.alive:
            raise failed("the model thread has ended")
        self.scheduler.submit(job)

    def _release(self, job: Job) -> None:
        """Tell the model thread that nobody listens any more."""
        if not job.over:
            self.metrics.count("tgi_request_failure", "dropped")
        job.cancelled = True

    def _received(self, job: Job, event: Union[TokenEvent, ApiError]) -> TokenEvent:
        """Note how a request ended; an error is raised."""
        job.over = isinstance(event, ApiError) or event.finish_reason is not None
        if isinstance(event, ApiError):
            raise event
        if job.over:
            self._finished(job)
        return event

    def _finished(self, job: Job) -> None:
        count = len(job.tokens)
        self.metrics.count("tgi_request_success")
        self.metrics.observe("tgi_request_generated_tokens", count)
        self.metrics.observe("tgi_request_queue_duration", job.started - job.submitted)
        self.metrics.observe("tgi_request_inference_duration", job.ended - job.started)
        self.metrics.observe("tgi_request_duration", job.ended - job.submitted)
        self.metrics.observe("tgi_request_mean_time_per_token_duration", (job.ended - job.started) / count)

    def _counted(self, error: ApiError) -> ApiError:
        self.metrics.count("tgi_request_failure", error.label or "generation")
        return error


class Beat:
    """Puts KEEP_ALIVE into a stream's queue when nothing has been heard for KEEP_ALIVE_S. One timer for a whole stream: a limit on
    every single wait costs as much as sending the token."""

    def __init__(self, events: "asyncio.Queue[Any]") -> None:
        self._events, self._loop = events, asyncio.get_running_loop()
        self.heard()
        self._timer = self._loop.call_later(KEEP_ALIVE_S, self._look)

    def heard(self) -> None:
        self._last = self._loop.time()

    def stop(self) -> None:
        self._timer.cancel()

    def _look(self) -> None:
        left = self._last + KEEP_ALIVE_S - self._loop.time()
        if left <= 0:
            left = KEEP_ALIVE_S
            if self._events.empty():  # else the client does not read
                self._events.put_nowait(KEEP_ALIVE)
        self._timer = self._loop.call_later(left, self._look)


class Permit:
    """One of max_concurrent_requests places, given back at the end of the with block. Nobody waits for one."""

    def __init__(self, service: Service) -> None:
        self._service, self._taken = service, False

    def take(self) -> None:
        if self._service._free <= 0:
            raise overloaded()
        self._service._free -= 1
        self._taken = True

    def __enter__(self) -> "Permit":
        return self

    def __exit__(self, *_: object) -> None:
        self._service._free += self._taken


def _mean_logprob(job: Job) -> float:
    values = [token.logprob for token in job.tokens if token.logprob is not None]
    return sum(values) / len(job.tokens) if values else float("-inf")


async def _all(coroutines: List[Any]) -> List[Any]:
    """Results of all; the first failure cancels the others before it is raised."""
    tasks = [asyncio.ensure_future(one) for one in coroutines]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
