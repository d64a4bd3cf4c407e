"""Requests that ask for more room than there is: who is let in, who pauses, and that an answer has the same bits all the same."""

import asyncio
from types import SimpleNamespace

import pytest

pytest.importorskip("starlette", reason="the embedded server needs Python 3.10")
import torch  # noqa: E402

from serve.embedded import batching, seats, validation  # noqa: E402
from serve.embedded.errors import ApiError  # noqa: E402
from serve.embedded.recorded import most_needed, needed  # noqa: E402
from serve.embedded.row import Job  # noqa: E402
from serve.embedded.validation import Accepted, Sampling  # noqa: E402
from tests.contract.jobs import ended, job, play, scheduler_of, tiny_parts  # noqa: E402

LEG, PROMPT, COUNT = 16, 3, 60
THREE = 3 * (PROMPT + LEG)  # tokens: room for the first leg of three


@pytest.fixture(scope="module", params=[False, True], ids=["usual", "recorded"])
def parts(request, tmp_path_factory):
    usual = torch.get_num_threads()
    if request.param:
        torch.set_num_threads(1)  # with more, torch's attention of many rows at once has other bits than of one on some CPUs
    engine, text = tiny_parts(tmp_path_factory.mktemp("model"))
    if request.param:  # as on a GPU
        with torch.inference_mode():
            engine.record(lambda: lambda run: run)
    yield engine, text
    torch.set_num_threads(usual)


@pytest.fixture(autouse=True)
def short_legs(monkeypatch):
    monkeypatch.setattr(validation, "LEG", LEG)


@pytest.fixture
def seen(monkeypatch):
    """What happened: ("pause" or "resume", tokens in the row, rows there are)."""
    found, pause, put = [], seats.Seats._pause, batching.Engine.put

    def paused(self, row):
        found.append(("pause", row.length, len(self.rows)))
        pause(self, row)

    def back(self, row, saved):
        found.append(("resume", saved[0].shape[1] if saved else 0, row))
        put(self, row, saved)

    monkeypatch.setattr(seats.Seats, "_pause", paused)
    monkeypatch.setattr(batching.Engine, "put", back)
    return found


def asked(**how):
    return [job([5 + k, 9, 20 + k], COUNT, stream=True, **how) for k in range(3)]


def alone(parts, jobs):
    """The same requests, one after the other."""
    scheduler = scheduler_of(parts)

    async def work():
        for one in jobs:
            scheduler.submit(one)
            await ended(one)

    play(scheduler, work())
    return jobs


def bits(one):
    return [(token.id, token.logprob) for token in one.tokens] + [(token.id, token.logprob) for token in one.prefill]


def together(scheduler, jobs):
    async def work():
        for one in jobs:
            scheduler.submit(one)
        return [await ended(one) for one in jobs]

    return play(scheduler, work())


def test_room_is_kept_for_legs():
    accepted = Accepted([1] * PROMPT, COUNT, Sampling())
    room = [accepted.reserved(tokens) for tokens in (0, 3, 4, 19, 20, 35, 36, 62, 63)]
    assert room == [19, 19, 19, 19, 35, 35, 51, 63, 63]
    assert Accepted([1] * PROMPT, 5, Sampling()).reserved() == 8


@pytest.mark.parametrize("how", [{}, {"seed": 3, "top_k": 20, "repetition_penalty": 1.2}], ids=["greedy", "sampled"])
def test_who_outgrows_the_room_pauses_and_goes_on_with_the_same_bits(parts, seen, how):
    """Three begin, though only one could come to its end beside others; the newest two pause, the oldest never does."""
    wanted = [bits(one) for one in alone(parts, asked(**how))]
    jobs, scheduler, gauges = asked(**how), scheduler_of(parts, max_tokens=THREE), []
    scheduler._metrics.gauge = lambda name, value: gauges.append((name, value))
    streams = together(scheduler, jobs)
    assert max(value for name, value in gauges if name == "tgi_batch_current_max_tokens") == 3 * (PROMPT + COUNT)
    assert [bits(one) for one in jobs] == wanted
    assert [[event.token.id for event in stream] for stream in streams] == [[token.id for token in one.tokens] for one in jobs]
    rows = [rows for what, _, rows in seen if what == "pause"]
    assert rows[:2] == [3, 2] and len(rows) >= 2 and [what for what, _, _ in seen].count("resume") == len(rows)
    assert "pipedock_batch_pause_count %.1f\n" % len(rows) in scheduler._metrics.text().decode()
    assert all(length >= LEG for _, length, _ in seen) and [one.started for one in jobs] == sorted(one.started for one in jobs)


def test_short_answers_run_side_by_side_whatever_they_might_have_come_to(parts, monkeypatch):
    """Each could come to more than there is room for at all; each ends in its first leg, at a stop sequence say."""
    most, decode = [], parts[0].decode
    monkeypatch.setattr(parts[0], "decode", lambda chosen, lengths: (most.append(len(lengths)), decode(chosen, lengths))[1])
    jobs = asked()
    for one in jobs:
        one.accepted = Accepted(one.accepted.ids, THREE, one.accepted.sampling)
    scheduler = scheduler_of(parts, max_tokens=THREE)

    async def work():
        for one in jobs:
            scheduler.submit(one)
        for one in jobs:
            for _ in range(LEG // 2):
                await asyncio.wait_for(one.events.get(), 60)
            one.cancelled = True

    play(scheduler, work())
    assert max(most) == 3


def test_a_prompt_that_is_being_read_pauses_too(parts, seen, monkeypatch):
    """Its logits have been asked for: those of the part that was read before are not given twice."""
    monkeypatch.setattr(batching, "PIECE", 4)
    monkeypatch.setattr(batching, "TURN", 4)
    prompt = [7 + k % 50 for k in range(90)]

    def reader():
        return Job(Accepted(list(prompt), 5, Sampling(), decoder_input_details=True), False)

    wanted = bits(alone(parts, [reader()])[0])
    talker, late = job([5, 9, 20], COUNT, stream=True), reader()
    scheduler = scheduler_of(parts, max_tokens=2 * (len(prompt) + 5))

    def reserve(row):
        total = row.job.accepted.total
        row.reserved = 10 * total if 20 < row.length + 1 < 40 else total

    monkeypatch.setattr(Accepted, "reserved", lambda self, tokens=0: self.total)
    monkeypatch.setattr(batching.Row, "reserve", reserve)
    together(scheduler, [talker, late])
    assert bits(late) == wanted and [token.id for token in late.prefill] == prompt
    assert ("pause", 2) in [(what, rows) for what, length, rows in seen if 0 < length < len(prompt)]


def test_nobody_new_is_let_in_before_those_who_have_paused(parts, seen):
    jobs = asked()
    scheduler = scheduler_of(parts, max_tokens=THREE)
    late = job([8], 2)

    async def work():
        for one in jobs:
            scheduler.submit(one)
        for _ in range(LEG + 4):
            await asyncio.wait_for(jobs[0].events.get(), 60)
        scheduler.submit(late)
        await ended(late)
        return [len(one.tokens) for one in jobs]

    assert play(scheduler, work()) == [COUNT] * 3 and late.started > max(one.started for one in jobs)


def test_a_paused_request_can_be_cancelled_and_a_server_that_stops_tells_it(parts, seen):
    jobs = asked()
    scheduler = scheduler_of(parts, max_tokens=THREE)

    async def work():
        for one in jobs:
            scheduler.submit(one)
        for _ in range(LEG + 4):
            await asyncio.wait_for(jobs[0].events.get(), 60)
        jobs[1].cancelled = True
        await asyncio.get_running_loop().run_in_executor(None, scheduler.stop)
        return [await ended(one) for one in jobs[:1] + jobs[2:]]

    for events in play(scheduler, work()):
        assert isinstance(events[-1], ApiError) and "stop" in events[-1].text.lower()
    assert len(jobs[1].tokens) < COUNT and [what for what, _, _ in seen] == ["pause", "pause"]


def test_a_failed_pass_leaves_the_paused_ones(parts, seen, monkeypatch):
    """Everything in the cache is dropped then; what has paused lies elsewhere."""
    wanted = [bits(one) for one in alone(parts, asked())]
    engine, jobs, decode = parts[0], asked(), parts[0].decode

    def fails(chosen, lengths):
        if len(seen) == 2:
            seen.append(("failed", LEG, 0))
            raise RuntimeError("a device that is out of order")
        return decode(chosen, lengths)

    monkeypatch.setattr(engine, "decode", fails)
    first, second, third = together(scheduler_of(parts, max_tokens=THREE), jobs)
    assert isinstance(first[-1], ApiError) and "out of order" in first[-1].text
    assert [bits(one) for one in jobs[1:]] == wanted[1:] and len(second) == len(third) == COUNT


def test_without_memory_to_pause_a_request_ends_and_the_others_go_on(parts, monkeypatch):
    wanted = [bits(one) for one in alone(parts, asked())]

    def full(*how):
        raise RuntimeError("not enough memory")

    monkeypatch.setattr(batching.Engine, "taken", full)
    jobs = asked()
    first, *others = together(scheduler_of(parts, max_tokens=THREE), jobs)
    assert bits(jobs[0]) == wanted[0] and len(first) == COUNT
    assert all(isinstance(events[-1], ApiError) and "not enough memory" in events[-1].text for events in others)


@pytest.mark.parametrize("first", ["long", "many"])
def test_tables_that_were_long_once_are_not_that_long_for_many(parts, monkeypatch, first):
    """Under a load that never ends nobody clears them: a long request, then many, and the other way round, would leave both."""
    engine, most = parts[0], 1024
    sizes, decode = [], engine.decode
    monkeypatch.setattr(engine, "decode", lambda *how: (decode(*how), sizes.append(engine._cache.size))[0])
    prompt, short = [7 + k % 50 for k in range(900)], [[5 + k, 9] for k in range(16)]
    talks = [job(prompt, 12, stream=True)] + [job(ids, 12, stream=True) for ids in short]
    wanted = [bits(one) for one in alone(parts, [job(prompt, 12)] + [job(ids, 12) for ids in short])]
    engine.clear()
    sizes.clear()
    order = talks if first == "long" else talks[1:] + talks[:1]
    together(scheduler_of(parts, max_tokens=most, max_rows=16), order)
    assert [bits(one) for one in talks] == wanted
    assert max(rows for rows, _ in sizes) == 16 and max(columns for _, columns in sizes) > 900
    assert max(rows * columns for rows, columns in sizes) <= 5 * most


def test_what_tables_may_take_is_more_than_any_need():
    """Else they would be cut and grow again at every turn."""
    for tokens in (100, 1000, 4096, 16929, 33857, 100000):
        most = most_needed(64, tokens)
        for rows in range(1, 65):
            for columns in {1, 64, 128, 256, 257, 513, 1025, 2049, tokens // rows} - {0}:
                if rows * columns <= tokens:
                    need = needed(rows, columns)
                    assert need[0] * need[1] <= most, (tokens, rows, columns)


def test_passes_are_recorded_a_few_times_not_at_every_turn(tmp_path):
    """Recording one takes a GPU a second. Many short prompts, each padded to a piece, in tables that may not be large."""
    engine, text = tiny_parts(tmp_path)
    recorded = []
    with torch.inference_mode():
        engine.record(lambda: lambda run: (recorded.append(1), run)[1])
    recorded.clear()
    jobs = [job([5 + (k + n) % 50 for n in range(70)], 12 + k % 5) for k in range(60)]
    scheduler = scheduler_of((engine, text), max_tokens=4096, max_rows=64)
    together(scheduler, jobs)
    assert all(len(one.tokens) == one.accepted.max_new_tokens for one in jobs) and len(recorded) <= 25


def test_a_row_that_cannot_be_moved_fails_with_the_others_and_does_not_come_back():
    class Broken:
        def taken(self, row, length):
            return []

        def move(self, source, target):
            raise RuntimeError("out of order")

    seated = seats.Seats(Broken(), None, 4, 10, lambda *lost: None, lambda: None)
    seated.rows = [SimpleNamespace(job=SimpleNamespace(started=when), reserved=5, length=3, reserve=list) for when in (1, 3, 2)]
    with pytest.raises(RuntimeError):
        seated.settle()
    assert seated.paused == [] and [one.started for one in seated.clear()] == [1, 3, 2]
