"""Permits, keep-alive, health and endings, with a model thread that does what a test says."""

import asyncio

import pytest

pytest.importorskip("starlette", reason="the embedded server needs Python 3.10")
from serve.embedded import service as module  # noqa: E402
from serve.embedded.errors import ApiError, failed  # noqa: E402
from serve.embedded.metrics import Metrics  # noqa: E402
from serve.embedded.native import stream_events  # noqa: E402
from serve.embedded.params import Parameters, Request  # noqa: E402
from serve.embedded.service import Service  # noqa: E402
from serve.embedded.shapes import Token, TokenEvent  # noqa: E402
from serve.embedded.validation import Limits  # noqa: E402


class FakeText:
    def encode(self, text, special):
        return list(range(len(text)))


class FakeScheduler:
    """``play(job)`` is called in the event loop for every submitted job."""

    def __init__(self, play):
        self.play, self.jobs, self.alive, self.suspect = play, [], True, False

    def submit(self, job):
        self.jobs.append(job)
        self.play(job)


def token(job, text="a", finish=None):
    made = Token(5, text, -0.5, False)
    job.tokens.append(made)
    job.finish_reason = finish or ""
    job.generated_text = "".join(one.text for one in job.tokens)
    job.events.put_nowait(TokenEvent(made, [], finish))


def made(play, places=2):
    return Service(FakeText(), FakeScheduler(play), Metrics(100, 200), Limits(), places, 1, {})


def request(text="hello", **more):
    return Request(text, Parameters(**{"do_sample": False, "max_new_tokens": 5, **more}))


async def collected(events):
    return [one async for one in events]


def counted(service, line):
    return line.encode() in service.metrics.text()


def test_comments_keep_an_idle_stream_alive(monkeypatch):
    monkeypatch.setattr(module, "KEEP_ALIVE_S", 0.05)

    def play(job):
        asyncio.get_running_loop().call_later(0.13, token, job, "a", "length")

    async def work():
        return await collected(stream_events(made(play), request()))

    events = asyncio.run(work())
    assert events[:-1] == [b":\n\n"] * 2 and events[-1].startswith(b'data: {"index":1,')


def test_places_are_counted_and_given_back_however_a_request_ends():
    async def work():
        service = made(lambda job: None, places=1)
        stream = service.stream(request())
        waiting = asyncio.ensure_future(stream.__anext__())
        await asyncio.sleep(0.05)
        with pytest.raises(ApiError, match="overloaded"):
            await service.generate(request())
        with pytest.raises(ApiError, match="overloaded"):  # before anything is looked at
            await service.generate(request("", temperature=-1.0))
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        assert service.scheduler.jobs[0].cancelled and counted(service, 'tgi_request_failure{err="dropped"} 1.0')
        with pytest.raises(ApiError, match="temperature"):
            await service.generate(request(temperature=-1.0))
        service.scheduler.play = lambda job: job.events.put_nowait(failed("x"))
        with pytest.raises(ApiError, match="Server error: x"):
            await service.generate(request())
        service.scheduler.play = lambda job: token(job, "a", "length")
        assert (await service.generate(request()))[0].generated_text == "a"
        assert counted(service, 'tgi_request_failure{err="overloaded"} 2.0') and counted(service, "tgi_request_success 1.0")
        assert counted(service, 'tgi_request_failure{err="generation"} 1.0') and counted(service, "tgi_request_count 6.0")

    asyncio.run(work())


def test_best_of_takes_a_place_each_and_the_best_wins():
    def play(job):
        number = len(service.scheduler.jobs)
        job.tokens.append(Token(1, "t%d" % number, -1.0 / number, False))
        job.generated_text, job.finish_reason = "t%d" % number, "length"
        job.events.put_nowait(TokenEvent(job.tokens[0], [], "length"))

    service = made(play, places=2)

    async def work():
        best, others = await service.generate(request(best_of=2, do_sample=True))
        assert best.generated_text == "t2" and [job.generated_text for job in others] == ["t1"]
        service.scheduler.jobs.clear()
        one = made(lambda job: None, places=1)
        with pytest.raises(ApiError, match="overloaded"):
            await one.generate(request(best_of=2, do_sample=True))
        assert all(job.cancelled for job in one.scheduler.jobs)

    asyncio.run(work())


def test_an_error_in_the_middle_is_the_last_event():
    def play(job):
        token(job)
        job.events.put_nowait(failed("x"))

    async def work():
        return await collected(stream_events(made(play), request()))

    first, last = asyncio.run(work())
    assert first.startswith(b'data: {"index":1,')
    assert last == b'data: {"error":"Request failed during generation: Server error: x","error_type":"generation"}\n\n'


def test_health_probes_after_a_failure(monkeypatch):
    usual = asyncio.wait_for

    async def work():
        service = made(lambda job: token(job, "a", "length"))
        assert await service.healthy() and not service.scheduler.jobs
        service.scheduler.suspect = True
        assert await service.healthy() and len(service.scheduler.jobs) == 1
        service.scheduler.play = lambda job: job.events.put_nowait(failed("still broken"))
        assert not await service.healthy()
        monkeypatch.setattr(asyncio, "wait_for", lambda waited, seconds: usual(waited, 0.2))
        for works in (False, True):  # those before the probe have the batch for themselves
            service.scheduler.suspect = True
            service.scheduler.play = lambda job, works=works: setattr(service.scheduler, "suspect", not works)
            assert await service.healthy() is works
        service.scheduler.alive = False
        assert not await service.healthy()
        with pytest.raises(ApiError, match="the model thread has ended"):
            await service.generate(request())

    asyncio.run(work())


def test_who_goes_in_the_moment_a_token_comes_is_gone():
    """The cancellation and the token in one turn of the loop: asyncio.wait_for would return the token and forget the other."""

    async def work():
        service = made(lambda job: token(job))
        reading = asyncio.ensure_future(collected(stream_events(service, request())))
        while not service.scheduler.jobs or not service.scheduler.jobs[0].events.empty():
            await asyncio.sleep(0)
        for _ in range(5):  # until it waits for the next one
            await asyncio.sleep(0)
        job = service.scheduler.jobs[0]
        token(job)
        await asyncio.sleep(0)
        reading.cancel()
        token(job)
        await asyncio.wait({reading}, timeout=5)
        return reading.cancelled(), job.cancelled

    assert asyncio.run(work()) == (True, True)
