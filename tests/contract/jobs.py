"""A Scheduler outside of a server: a tiny model, jobs, and a loop to play them in."""

import asyncio

from serve.embedded.batching import Scheduler
from serve.embedded.engine import Engine
from serve.embedded.errors import ApiError
from serve.embedded.metrics import Metrics
from serve.embedded.row import Job
from serve.embedded.text import Text
from serve.embedded.validation import Accepted, Sampling
from serve.embedded.worker import Worker
from tests.models import make_hf, tiny_config
from tests.tokenizers import tiny_tokenizer


def tiny_parts(folder):
    """Engine and tokenizer of a random llama without end-of-sequence: answers are as long as a test asks for."""
    tiny_tokenizer(folder, "bpe")
    text = Text(str(folder))
    size = {"hidden_size": 64, "intermediate_size": 96, "max_position_embeddings": 2048}
    make_hf(folder, tiny_config("llama", vocab_size=len(text.tokenizer), **size))
    text.stop_ids = frozenset()
    return Engine(str(folder)), text


def scheduler_of(parts, max_tokens=10000, max_rows=4):
    engine, text = parts
    return Scheduler(engine, Worker(), text, Metrics(1000, 2048), max_rows, max_tokens)


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
