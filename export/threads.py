"""Work for a pool of threads."""

from concurrent.futures import Executor
from typing import Any, Callable, Iterable, List


def in_turn(pool: Executor, work: Callable[[Any], Any], things: Iterable[Any]) -> List[Any]:
    """The results, in order. The first failure is raised, and what has not begun then is not begun."""
    jobs = [pool.submit(work, thing) for thing in things]
    try:
        return [job.result() for job in jobs]
    finally:
        for job in jobs:
            job.cancel()
