"""The model thread: joining, leaving, cancelling and limits, on a real tiny model."""

import asyncio

import pytest

pytest.importorskip("starlette", reason="the embedded server needs Python 3.10")
import torch  # noqa: E402

from serve.embedded import batching, seats  # noqa: E402
from serve.embedded.errors import ApiError  # noqa: E402
from serve.embedded.row import Job  # noqa: E402
from serve.embedded.validation import Accepted, Sampling  # noqa: E402
from tests.contract.jobs import ended, job, play, scheduler_of, tiny_parts, tokens  # noqa: E402


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    return tiny_parts(tmp_path_factory.mktemp("model"))


@pytest.fixture
def scheduler(parts):
    return scheduler_of(parts)


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
    crowd = scheduler_of(parts)

    async def together():
        jobs = [job(ids, count, stream=True, **how) for ids, count, how in asked]
        for one in jobs:
            crowd.submit(one)
        streams = await asyncio.gather(*[ended(one) for one in jobs])
        assert [[event.token.id for event in stream] for stream in streams] == [tokens(one) for one in jobs]
        return [tokens(one) for one in jobs]

    assert play(crowd, together()) == expected
    assert [len(one) for one in expected] == [count for _, count, _ in asked]


def test_waiting_prompts_are_read_in_one_pass(parts, monkeypatch):
    """Nobody reads all weights for a few tokens alone; a request that wants its prompt's logits does, and a long prompt goes on."""
    engine, scheduler = parts[0], scheduler_of(parts)
    asked = [[5] * 7, [6] * 9, [7] * 3, [8] * (batching.PIECE + 20)]
    passes, crowd = [], [job(ids, 4) for ids in asked]
    crowd[2] = Job(Accepted(asked[2], 4, Sampling(), decoder_input_details=True), False)
    several, one = engine.prefill_together, engine.prefill
    monkeypatch.setattr(engine, "prefill_together", lambda *how: passes.append((how[0], *map(len, how[1]))) or several(*how))
    monkeypatch.setattr(engine, "prefill", lambda *how: passes.append((how[0], len(how[1]))) or one(*how))

    for waiting in crowd:  # before the scheduler runs
        scheduler.submit(waiting)

    async def work():
        await asyncio.gather(*[ended(waiting) for waiting in crowd])

    play(scheduler, work())
    assert passes == [(0, 7, 9), (2, 3), (3, batching.PIECE), (3, 20)] and engine.together
    alone = scheduler_of(parts)

    async def single():
        made = []
        for ids in asked:
            made.append(job(ids, 4))
            alone.submit(made[-1])
            await ended(made[-1])
        return [tokens(done) for done in made]

    assert play(alone, single()) == [tokens(done) for done in crowd]


def test_a_prompt_that_ends_with_its_first_token_leaves_before_one_that_waits_to_be_read(parts):
    """The waiting one, which is read alone, has its row but nothing in it."""
    engine, scheduler = parts[0], scheduler_of(parts)
    engine.clear()
    short, other = job([5] * 3, 1), job([6] * 4, 3)
    waits = Job(Accepted([7] * 5, 3, Sampling(), decoder_input_details=True), False)
    for one in (short, other, waits):
        scheduler.submit(one)

    async def work():
        return [(await ended(one))[-1] for one in (short, other, waits)]

    assert [event.finish_reason for event in play(scheduler, work())] == ["length"] * 3
    assert [len(one.tokens) for one in (short, other, waits)] == [1, 3, 3]


def test_a_request_that_cannot_begin_fails_alone(parts, monkeypatch):
    scheduler, row = scheduler_of(parts), seats.Row
    asked = [job([number] * 3, 2) for number in (5, 6, 7, 6)]

    def begins(one, text):
        if one.accepted.ids[0] == 6:
            raise MemoryError("no room")
        return row(one, text)

    monkeypatch.setattr(seats, "Row", begins)
    for one in asked:
        scheduler.submit(one)

    async def work():
        return [(await ended(one))[-1] for one in asked]

    last = play(scheduler, work())
    assert [len(one.tokens) for one in asked] == [2, 0, 2, 0]
    assert [event.body()["error"] for event in last[1::2]] == [
        "Request failed during generation: Server error: MemoryError: no room"
    ] * 2


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
    engine, scheduler = parts[0], scheduler_of(parts, max_tokens=250)
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


def test_prompt_logprobs_do_not_depend_on_the_pieces(parts, scheduler, monkeypatch):
    ids = [5 + k % 60 for k in range(100)]

    def asked():
        return Job(Accepted(ids, 1, Sampling(), decoder_input_details=True), False)

    async def work(one):
        scheduler.submit(one)
        await ended(one)

    whole = asked()
    play(scheduler, work(whole))
    monkeypatch.setattr(batching, "PIECE", 7)
    scheduler = scheduler_of(parts)
    pieces = asked()
    play(scheduler, work(pieces))
    assert [one.id for one in pieces.prefill] == ids and pieces.prefill[0].logprob is None
    assert [one.logprob for one in pieces.prefill[1:]] == pytest.approx([one.logprob for one in whole.prefill[1:]], abs=1e-4)


@pytest.mark.parametrize("recorded", [False, True])
def test_events_are_written_while_a_gpu_computes_the_next_token(tmp_path, monkeypatch, recorded):
    """A recorded pass is launched and runs by itself: what came before it is handed over then, and at once where nobody runs on."""
    parts = tiny_parts(tmp_path)
    engine, seen = parts[0], []
    if recorded:
        with torch.inference_mode():
            engine.record(lambda: lambda run: run)
    decode, deliver = engine.decode, batching.Scheduler._deliver
    monkeypatch.setattr(engine, "decode", lambda *how: (decode(*how), seen.append("launched"))[0])
    monkeypatch.setattr(batching.Scheduler, "_deliver", lambda self: (seen.append(len(self._out)), deliver(self)))
    scheduler = scheduler_of(parts)
    one = job([5, 6, 7], 4, stream=True)

    async def alone():
        scheduler.submit(one)
        return await ended(one)

    assert len(play(scheduler, alone())) == 4
    seen = [what for what in seen if what]
    if recorded:
        # The first time the pass has to be recorded, and nobody waits for that.
        assert seen == [1, "launched", "launched", 1, "launched", 1, 1]
    else:
        assert seen == ["launched", 2, "launched", 1, "launched", 1]


class TritonError(Exception):
    """A kind of error that nobody here knows."""


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), TritonError("out of shared memory")])
def test_whatever_a_pass_raises_the_thread_goes_on(parts, scheduler, monkeypatch, error):
    def fails(*how):
        raise error

    first, second = job([5, 6, 7], 4, stream=True), job([5, 6, 7], 4)

    async def both():
        monkeypatch.setattr(parts[0], "decode", fails)
        scheduler.submit(first)
        events = await ended(first)
        monkeypatch.undo()
        assert scheduler.alive
        scheduler.submit(second)
        await ended(second)
        return events

    events = play(scheduler, both())
    assert len(events) == 2 and events[0].token.id == tokens(second)[0]  # what there was before is not lost
    assert isinstance(events[1], ApiError) and str(error) in events[1].text and len(tokens(second)) == 4
