"""The model thread: how requests end, by their own tokens or by a failure."""

import asyncio
import threading
import time

import pytest

pytest.importorskip("starlette", reason="the embedded server needs Python 3.10")
from serve.embedded.errors import ApiError  # noqa: E402
from serve.embedded.row import Job, Row  # noqa: E402
from serve.embedded.sampling import Sampler  # noqa: E402
from serve.embedded.validation import Accepted, Sampling  # noqa: E402
from tests.contract.jobs import ended, job, play, scheduler_of, tiny_parts, tokens  # noqa: E402


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    return tiny_parts(tmp_path_factory.mktemp("model"))


@pytest.fixture
def scheduler(parts):
    return scheduler_of(parts)


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


@pytest.mark.parametrize("where", ["pick", "add"])
def test_a_request_that_cannot_be_chosen_for_fails_alone(scheduler, monkeypatch, where):
    """Its neighbour in the batch goes on, and so does the thread."""
    owner = {"pick": Sampler, "add": Row}[where]

    def breaks(function):
        def work(self, *args):
            how = getattr(self, "how", None) or self.sampler.how
            if how.seed == 13:
                raise IndexError("index 514 is out of bounds")
            return function(self, *args)

        return work

    monkeypatch.setattr(owner, where, breaks(getattr(owner, where)))
    good, bad = job([5, 6], 20, stream=True), job([7, 8], 20, seed=13)

    async def work():
        scheduler.submit(good)
        await good.events.get()
        scheduler.submit(bad)
        error = (await ended(bad))[-1]
        await ended(good)
        return error, scheduler.alive

    error, alive = play(scheduler, work())
    assert error.text.endswith("Server error: IndexError: index 514 is out of bounds") and error.status == 424
    assert alive and len(good.tokens) == 20


@pytest.mark.parametrize("kind", [IndexError, TypeError, AssertionError, ZeroDivisionError])
def test_no_error_in_a_step_ends_the_thread(parts, scheduler, kind):
    engine, _ = parts

    def breaks(*unused):
        raise kind("ours")

    engine.prefill = breaks
    try:

        async def work():
            one = job([5], 5)
            scheduler.submit(one)
            error = (await ended(one))[-1]
            del engine.prefill
            later = job([6], 5)
            scheduler.submit(later)
            await ended(later)
            return error, len(later.tokens)

        error, count = play(scheduler, work())
    finally:
        engine.__dict__.pop("prefill", None)
    assert error.text.endswith("%s: ours" % kind.__name__) and count == 5


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
        while engine._cache.size[0] and time.monotonic() < deadline:
            await asyncio.sleep(0.01)

    play(scheduler, work())
    assert engine._cache.size == (0, 0)


@pytest.mark.parametrize("broken", ["move", "clear", "rest"])
def test_what_fails_beside_a_pass_does_not_end_the_thread_either(parts, scheduler, broken, monkeypatch):
    """A row that is left, memory that cannot be given back: the others hear the true reason, and later ones are served."""
    engine, _ = parts
    calls = []

    def breaks(*given):
        calls.append(given)
        raise RuntimeError("an illegal memory access\nmore lines")

    if broken == "clear":
        monkeypatch.setattr(engine, "decode", lambda *given: breaks())
    monkeypatch.setattr(engine, broken, breaks)

    async def work():
        first, second = job([5], 400, stream=True), job([6], 400, stream=True)
        for one in (first, second):
            scheduler.submit(one)
            await one.events.get()
        first.cancelled = True
        said = None if broken == "rest" else (await ended(second))[-1]
        second.cancelled = True
        monkeypatch.undo()
        later = job([7], 5)
        scheduler.submit(later)
        await ended(later)
        return said, len(later.tokens), scheduler.alive

    said, count, alive = play(scheduler, work())
    assert calls and alive and count == 5
    assert said is None or said.text.endswith("Server error: RuntimeError: an illegal memory access")


def test_a_request_that_comes_after_the_end_is_answered(scheduler):
    """Between the thread's last look into its inbox and its end."""

    async def work():
        before, after = job([5], 5), job([6], 5)
        scheduler._inbox.stop()
        scheduler.submit(before)  # behind the end
        error = (await asyncio.wait_for(ended(before), 20))[-1]
        scheduler.submit(after)
        return error, (await asyncio.wait_for(ended(after), 20))[-1]

    for error in play(scheduler, work()):
        assert error.text.endswith("Server error: the server is stopping")
