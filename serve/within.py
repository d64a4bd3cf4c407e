"""Waiting with a limit, for the asynchronous client."""

import asyncio
from typing import Any, Awaitable


async def within(awaitable: Awaitable[Any], seconds: float) -> Any:
    """Its result; asyncio.TimeoutError when it takes longer. Not asyncio.wait_for: up to Python 3.11 that forgets a cancellation
    when the result comes in the same turn of the loop, and the call would go on."""
    task = asyncio.ensure_future(awaitable)
    try:
        done, _ = await asyncio.wait({task}, timeout=seconds)
        if not done:
            raise asyncio.TimeoutError
        return task.result()
    finally:
        task.cancel()
