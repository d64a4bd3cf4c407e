"""The model thread: joining, leaving, cancelling, limits and failures, on a real tiny model."""

import asyncio
import threading
import time

import pytest

pytest.importorskip("starlette", reason="the embedded server needs Python 3.10")
from serve.embedded import batching  # noqa: E402
from serve.embedded.batching import Scheduler  # noqa: E402
from serve.embedded.engine import Engine  # noqa: E402
from serve.embedded.errors import ApiError  # noqa: E402
from serve.embedded.metrics import Metrics  # noqa: E402
from serve.embedded.row import Job  # noqa: E402
from serve.embedded.text import Text  # noqa: E402
from serve.embedded.validation import Accepted, Sampling  # noqa: E402
from tests.models import make_hf, tiny_config  # noqa: E402
from tests.tokenizers import tiny_tokenizer  # noqa: E402


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_tokenizer(folder, "bpe")
    text = Text(str(folder))
    config = tiny_config("llama", vocab_size=len(text.tokenizer), hidden_size=64, intermediate_size=96, max_position_embeddings=2048)
    make_hf(folder, config)
    text.stop_ids = frozenset()  # lengths are then what a test asks for
    return Engine(str(folder)), text


@pytest.fixture
def scheduler(parts):
    """Not started; its loop runs in ``play``."""
    engine, text = parts
    made = Scheduler(engine, text, Metrics(1000, 2048), max_rows=4, max_tokens=10000)
    yield made
    if made.alive:
        made.stop()


def job(ids, count=8, stream=False, **sampling):
    return Job(Accepted(list(ids), count, Sampling(**sampling)), stream)


async def ended(one):
    """All events of a job up to its last."""
    events = []
    while True:
        event = await asyncio.wait_for(one.events.get(), 60)
        events.append(event)
        if isinstance(event, ApiError) or event.finish_reason:
            return events


def play(scheduler, coroutine):
    async def work():
        scheduler.start(asyncio.get_running_loop())
        try:
            return await coroutine
        finally:
            await asyncio.get_running_loop().run_in_executor(None, scheduler.stop)

    return asyncio.run(work())


def tokens(one):
    return [token.id for token in one.tokens]


def test_many_requests_get_what_they_get_alone(parts, scheduler):
    asked = [([5 + k, 9, 20 + k] * (k % 3 + 1), 5 + 3 * (k % 4), {"seed": k, "top_k": 20} if k % 3 == 2 else {}) for k in range(12)]

    async def alone():
        made = []
        for ids, count, how in asked:
            one = job(ids, count, **how)
            scheduler.submit(one)
            await ended(one)
            made.append(tokens(one))
        return made

    expected = play(scheduler, alone())
    engine, text = parts
    crowd = Scheduler(engine, text, Metrics(1000, 2048), max_rows=4, max_tokens=4096)

    async def together():
        jobs = [job(ids, count, stream=True, **how) for ids, count, how in asked]
        for one in jobs:
            crowd.submit(one)
        streams = await asyncio.gather(*[ended(one) for one in jobs])
        assert [[event.token.id for event in stream] for stream in streams] == [tokens(one) for one in jobs]
        return [tokens(one) for one in jobs]

    assert play(crowd, together()) == expected
    assert [len(one) for one in expected] == [count for _, count, _ in asked]


def test_a_cancelled_request_leaves_before_the_next_token(scheduler):
    gone, stays = job([5, 6], 2000, stream=True), job([7, 8], 40, stream=True)

    async def work():
        scheduler.submit(gone)
        scheduler.submit(stays)
        await gone.events.get()
        gone.cancelled = True
        had = len(gone.tokens)
        await ended(stays)
        return had

    had = play(scheduler, work())
    assert len(gone.tokens) <= had + 2  # the token under way, and one whose step had begun
    assert len(stays.tokens) == 40


def test_a_waiting_request_can_be_cancelled(scheduler):
    long = [job([5 + k], 300) for k in range(4)]
    waiting, last = job([9], 3), job([10], 3)

    async def work():
        for one in long + [waiting, last]:
            scheduler.submit(one)
        waiting.cancelled = True
        await ended(last)

    play(scheduler, work())
    assert not waiting.tokens and len(last.tokens) == 3


def test_a_long_prompt_does_not_stop_the_others(scheduler):
    """Between two pieces of a prompt everybody who runs gets a token."""
    talker, reader = job([5], 1000, stream=True), job([6] * (6 * batching.PIECE), 1)

    async def work():
        scheduler.submit(talker)
        await talker.events.get()
        before = len(talker.tokens)
        scheduler.submit(reader)
        await ended(reader)
        after = len(talker.tokens)
        talker.cancelled = True
        return after - before

    assert play(scheduler, work()) >= 5


def test_budget_of_tokens_limits_the_batch(parts):
    engine, text = parts
    scheduler = Scheduler(engine, text, Metrics(1000, 2048), max_rows=4, max_tokens=250)
    most = []
    decode = engine.decode

    def spy(chosen, lengths):
        most.append(len(lengths))
        return decode(chosen, lengths)

    engine.decode = spy
    try:
        jobs = [job([5 + k], 99) for k in range(4)]  # 100 tokens each: two fit

        async def work():
            for one in jobs:
                scheduler.submit(one)
            await asyncio.gather(*[ended(one) for one in jobs])

        play(scheduler, work())
    finally:
        del engine.decode
    assert max(most) == 2 and all(len(one.tokens) == 99 for one in jobs)


def test_a_failed_step_fails_its_batch_and_nobody_later(parts, scheduler):
    engine, _ = parts
    decode, calls = engine.decode, []

    def breaks(chosen, lengths):
        calls.append(len(lengths))
        if len(calls) == 3:
            raise RuntimeError("out of memory\nmore lines")
        return decode(chosen, lengths)

    engine.decode = breaks
    try:

        async def work():
            first = job([5], 50)
            scheduler.submit(first)
            error = (await ended(first))[-1]
            suspect = scheduler.suspect
            later = job([6], 5)
            scheduler.submit(later)
            await ended(later)
            return error, suspect, scheduler.suspect, later

        error, suspect, after, later = play(scheduler, work())
    finally:
        del engine.decode
    assert error.body() == {
        "error": "Request failed during generation: Server error: RuntimeError: out of memory",
        "error_type": "generation",
    }
    assert error.status == 424 and suspect and not after and len(later.tokens) == 5


def test_stop_answers_everybody(scheduler):
    running, waiting = [job([5 + k], 2000) for k in range(4)], job([9], 5)

    async def work():
        for one in running + [waiting]:
            scheduler.submit(one)
        while not running[-1].tokens:
            await asyncio.sleep(0.01)
        threading.Thread(target=scheduler.stop).start()
        return [(await ended(one))[-1] for one in running + [waiting]]

    assert all(isinstance(event, ApiError) and event.status == 424 for event in play(scheduler, work()))


def test_prompt_logprobs_do_not_depend_on_the_pieces(parts, scheduler, monkeypatch):
    ids = [5 + k % 60 for k in range(100)]

    def asked():
        return Job(Accepted(ids, 1, Sampling(), decoder_input_details=True), False)

    async def work(one):
        scheduler.submit(one)
        await ended(one)

    whole = asked()
    play(scheduler, work(whole))
    engine, text = parts
    monkeypatch.setattr(batching, "PIECE", 7)
    scheduler = Scheduler(engine, text, Metrics(1000, 2048), 4, 4096)
    pieces = asked()
    play(scheduler, work(pieces))
    assert [one.id for one in pieces.prefill] == ids and pieces.prefill[0].logprob is None
    assert [one.logprob for one in pieces.prefill[1:]] == pytest.approx([one.logprob for one in whole.prefill[1:]], abs=1e-4)


def test_ends_length_before_eos_before_stop(parts, scheduler):
    _, text = parts
    one = job([5, 6], 12)

    async def work():
        scheduler.submit(one)
        await ended(one)
        place = next(number for number, token in enumerate(one.tokens) if number > 1 and token.text)
        first = tokens(one).index(one.tokens[place].id) + 1  # the same token may have come before
        words = "".join(token.text for token in one.tokens[: place + 1])
        for stops, eos, count, reason, length in [
            ((), {one.tokens[place].id}, 12, "eos_token", first),
            ((), {one.tokens[place].id}, first, "length", first),
            ((words,), set(), 12, "stop_sequence", place + 1),
            (("never", words), set(), place + 1, "length", place + 1),
        ]:
            again = Job(Accepted([5, 6], count, Sampling(), stops), False)
            text.stop_ids = frozenset(eos)
            scheduler.submit(again)
            await ended(again)
            assert (again.finish_reason, len(again.tokens)) == (reason, length)
        assert again.generated_text == words  # what stopped it stays

    try:
        play(scheduler, work())
    finally:
        text.stop_ids = frozenset()


def test_the_cache_is_given_back_when_nobody_runs(parts, scheduler):
    engine, _ = parts
    one = job([5], 3)

    async def work():
        scheduler.submit(one)
        await ended(one)
        deadline = time.monotonic() + 10
        while engine._cache.bytes_per_token and time.monotonic() < deadline:
            await asyncio.sleep(0.01)

    play(scheduler, work())
    assert engine._cache.bytes_per_token == 0
