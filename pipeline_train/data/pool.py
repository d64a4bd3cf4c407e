"""Blocks -> encoded blocks, in order, by several processes."""

import collections
import gc
import multiprocessing
import os
import signal
import sys
import threading
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, Callable, Deque, Generator, Iterator, Optional, Tuple

from ..errors import RunFailed
from ..leaving import outlive
from . import template
from .block_encoder import BlockEncoder, Encoded
from .files import Block

AHEAD = 2  # blocks given out for each process, so that none waits for the next
MOST = 16  # processes: each holds some 40 MB of its own and all share 300, so that as many stay under a gigabyte
START = "fork" if sys.platform.startswith("linux") else "spawn"  # elsewhere libraries are known not to survive a fork

_encoder: Optional[BlockEncoder] = None  # of this worker process


def cores() -> int:
    """Processes that make sense on this machine."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(allowed, MOST)


def encoded(
    blocks: Iterator[Block], encoder: BlockEncoder, check_only: Callable[[], bool], processes: int
) -> Generator[Tuple[Block, Encoded], None, None]:
    """Each block with what it gives, in order. ``processes`` 0: all in this process. ``check_only`` is asked for each block when it
    is given out. Close the iterator when leaving it early. Raises RunFailed when a process is killed."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # threads of the library would fight the processes, and forbid fork
    if not processes:
        for block in blocks:
            yield block, encoder.encode(block, check_only())
        return
    waiting: Deque[Tuple[Block, Future[Encoded]]] = collections.deque()
    executor = ProcessPoolExecutor(
        processes, multiprocessing.get_context(START), _begin, (encoder, os.getpid(), template.fixed_now())
    )
    try:
        for block in blocks:
            waiting.append((_without_values(block), executor.submit(_encode, block, check_only())))
            if len(waiting) >= AHEAD * processes:
                yield _next(waiting)
        while waiting:
            yield _next(waiting)
    except BrokenProcessPool:
        raise RunFailed(
            "a process that encodes the data was killed, perhaps because memory ran out; start again: it goes on from there"
        ) from None
    finally:
        executor.shutdown(wait=True)  # after the few blocks given out: Python 3.8 never ends when some of them are cancelled


def _next(waiting: "Deque[Tuple[Block, Future[Encoded]]]") -> Tuple[Block, Encoded]:
    block, future = waiting[0]
    result = future.result()
    waiting.popleft()
    return block, result


def _without_values(block: Block) -> Block:
    return block._replace(values=None)


def _begin(encoder: BlockEncoder, parent: int, now: Any) -> None:
    """The beginning of a worker process. Ctrl-C reaches it too, and is the parent's to answer."""
    global _encoder
    _encoder = encoder
    template.fix_now(now)
    gc.freeze()  # what came from the parent stays, and so stays shared and unlooked at
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    """A parent that was killed cannot end its workers, and they would wait for work for ever."""
    outlive(parent, 0.5)
    os._exit(1)


def _encode(block: Block, check_only: bool) -> Encoded:
    assert _encoder is not None
    return _encoder.encode(block, check_only)
