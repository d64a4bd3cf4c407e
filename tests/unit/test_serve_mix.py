"""Any mix of requests that come, go and give up at any time: each gets, bit by bit, what it gets alone."""

import asyncio
import random

import pytest

pytest.importorskip("starlette", reason="the embedded server needs Python 3.10")
import torch  # noqa: E402

from serve.embedded.batching import PIECE  # noqa: E402
from serve.embedded.row import Job  # noqa: E402
from serve.embedded.validation import Accepted, Sampling  # noqa: E402
from tests.contract.jobs import ended, play, scheduler_of, tiny_parts  # noqa: E402

COUNT = 24


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    return tiny_parts(tmp_path_factory.mktemp("model"))


def asked(pick):
    """Prompts of one token to three pieces; greedy and sampled; some want the prompt's log-probabilities, some one token only."""
    made = []
    for number in range(COUNT):
        ids = [pick.randrange(5, 500) for _ in range(pick.choice([1, 2, 7, 40, 100, PIECE - 1, PIECE, PIECE + 1, 3 * PIECE - 9]))]
        how = {"temperature": 0.8, "seed": number, "top_k": 10} if pick.random() < 0.3 else {}
        made.append(Accepted(ids, pick.choice([1, 2, 5]), Sampling(**how), decoder_input_details=pick.random() < 0.2))
    return [Job(one, False) for one in made]


def told(job):
    return [(token.id, token.logprob) for token in job.tokens], [(token.id, token.logprob) for token in job.prefill]


@pytest.mark.parametrize("seed, threads", [(3, 1), (4, 2), (5, 2), (6, 1)])
def test_each_gets_what_it_gets_alone(parts, seed, threads):
    pick, usual = random.Random(seed), torch.get_num_threads()
    alone, crowd = asked(random.Random(seed)), asked(random.Random(seed))
    first, second = scheduler_of(parts, 10**6, 1), scheduler_of(parts, 10**6, pick.choice([3, 8, 16]))
    gone = {crowd[pick.randrange(COUNT)] for _ in range(3)}

    async def one_by_one():
        for job in alone:
            first.submit(job)
            await ended(job)

    async def all_of_them():
        waiting = []
        for job in pick.sample(crowd, COUNT):
            second.submit(job)
            if job not in gone:
                waiting.append(asyncio.ensure_future(ended(job)))
            await asyncio.sleep(pick.choice([0, 0, 0.01]))
            pick.choice(sorted(gone, key=crowd.index)).cancelled = pick.random() < 0.5
        for job in gone:
            job.cancelled = True
        await asyncio.gather(*waiting)

    torch.set_num_threads(threads)
    try:
        play(first, one_by_one())
        play(second, all_of_them())
    finally:
        torch.set_num_threads(usual)
    assert all(len(job.tokens) == job.accepted.max_new_tokens for job in alone)
    assert [told(one) for one, job in zip(alone, crowd) if job not in gone] == [told(job) for job in crowd if job not in gone]
