"""Our clients and time: timeouts, deadlines, servers that load or say when, and what is closed when its client goes."""

import asyncio
import time

import pytest

pytest.importorskip("httpx", reason="the async client needs Python 3.10")
from serve import client as library  # noqa: E402
from serve.client import AsyncClient, Client  # noqa: E402
from serve.within import within  # noqa: E402
from tests.contract.recorded import OVERLOADED, STREAM_33, UNHEALTHY, WHOLE, Stub, whole  # noqa: E402
from tests.unit.test_client import both  # noqa: E402


@both
def test_timeout_and_deadline(kind):
    slow = (200, [b":\n\n"] * 50, 0.1)
    silent = (200, [b":\n\n", b":\n\n"], 1.5)
    with Stub(silent, slow) as stub:
        with pytest.raises(library.TimedOut, match="nothing for 0.3 s"):
            kind(stub.url, timeout=0.3).call("generate_stream", "x")
        started = time.monotonic()
        with pytest.raises(library.TimedOut, match="no complete answer within 0.5 s"):
            kind(stub.url, deadline=0.5).call("generate_stream", "x")
        assert time.monotonic() - started < 4  # all of it takes 5 s


@both
def test_what_would_pass_the_deadline_is_not_waited_for(kind, monkeypatch):
    monkeypatch.setattr("serve.calls.random.uniform", lambda low, high: high)  # pauses of 1, 2, 4 s
    with Stub(whole(OVERLOADED, 429)) as stub:
        started = time.monotonic()
        with pytest.raises(library.Overloaded):
            kind(stub.url, deadline=3, backoff=1, retries=50).call("generate", "x")
        assert time.monotonic() - started < 2.9 and len(stub.seen) == 2


@both
def test_a_deadline_ends_a_read_that_began_before_it(kind):
    """A byte shortly before the deadline does not give the next read the whole time again."""
    with Stub((200, [b":\n\n"] * 3, 2.0)) as stub:
        started = time.monotonic()
        with pytest.raises(library.TimedOut, match="no complete answer within 2.5 s"):
            kind(stub.url, deadline=2.5).call("generate_stream", "x")
        assert 2.4 < time.monotonic() - started < 3.9  # the next byte comes after 4 s


@both
def test_a_server_that_says_when(kind):
    """Retry-After is longer than the backoff would be; what is past the deadline is not waited for; a date is not understood."""
    with Stub(whole(OVERLOADED, 429), whole(WHOLE), headers=[("retry-after", "1")]) as stub:
        started = time.monotonic()
        assert kind(stub.url).call("generate", "x").text == "ab" and time.monotonic() - started > 0.9
    with Stub(whole(UNHEALTHY, 503), headers=[("retry-after", "30")]) as stub:
        with pytest.raises(library.Unavailable) as error:
            kind(stub.url, deadline=5).call("generate", "x")
        assert error.value.retry_after == 30 and len(stub.seen) == 1
    with Stub(whole(OVERLOADED, 429), whole(WHOLE), headers=[("retry-after", "Fri, 31 Dec 1999 23:59:59 GMT")]) as stub:
        assert kind(stub.url).call("generate", "x").text == "ab"


@both
def test_waiting_for_a_server_that_loads(kind):
    with Stub(whole(UNHEALTHY, 503), whole(b"")) as stub:
        kind(stub.url).call("wait_ready")
        assert len(stub.seen) == 2
    with Stub(whole(UNHEALTHY, 503)) as stub:
        with pytest.raises(library.TimedOut, match="not ready within 0 s"):
            kind(stub.url).call("wait_ready", 0)
    with pytest.raises(ValueError, match="localhost:80: expected http://HOST:PORT"):
        kind("localhost:80").call("health")


def endless():
    """A stub that never ends its stream, and notes when its client has gone."""
    return Stub((200, [STREAM_33[: STREAM_33.index(b":\n\n")]] * 1000, 0.02))


def gone(stub):
    deadline = time.monotonic() + 10
    while not stub.left and time.monotonic() < deadline:
        time.sleep(0.02)
    return bool(stub.left)


def test_cancelling_a_task_closes_its_connection():
    async def work(url):
        async with AsyncClient(url) as client:
            begun = asyncio.Event()

            async def read():
                async for _ in client.generate_stream("x"):
                    begun.set()

            task = asyncio.create_task(read())
            await asyncio.wait_for(begun.wait(), 10)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            whole_one = asyncio.create_task(client.generate("x"))  # and one that waits for its whole answer
            await asyncio.sleep(0.2)
            whole_one.cancel()
            with pytest.raises(asyncio.CancelledError):
                await whole_one
            return await asyncio.get_running_loop().run_in_executor(None, lambda: gone(stub))

    with endless() as stub:
        assert asyncio.run(work(stub.url)) and len(stub.seen) == 2


def test_a_cancellation_in_the_moment_of_an_answer_is_not_forgotten():
    """As asyncio.wait_for does up to Python 3.11."""

    async def work():
        answer = asyncio.get_running_loop().create_future()
        waiting = asyncio.ensure_future(within(answer, 5))
        for _ in range(3):
            await asyncio.sleep(0)
        answer.set_result("late")
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.wait({waiting})
        assert waiting.cancelled()
        with pytest.raises(asyncio.TimeoutError):
            await within(asyncio.sleep(5), 0.01)

    asyncio.run(work())


def test_an_exception_while_reading_closes_the_connection():
    """Ctrl-C, say."""
    with endless() as stub, Client(stub.url) as client:
        with pytest.raises(KeyboardInterrupt):
            for _ in client.generate_stream("x"):
                raise KeyboardInterrupt
        assert gone(stub)


def test_leaving_a_stream_closes_its_connection():
    slow = (200, [STREAM_33[: STREAM_33.index(b":\n\n")]] * 100, 0.05)
    with Stub(slow) as stub:
        with Client(stub.url) as client:
            stream = client.generate_stream("x")
            next(stream)
            stream.close()
            assert client.health() is True  # the pool is usable; the stub answered a second request
        assert len(stub.seen) == 2
