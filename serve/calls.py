"""What the synchronous and the asynchronous client share: settings, request bodies, pauses, and the reading of lines."""

import codecs
import os
import random
import time
from typing import Any, Dict, Iterator, List, Optional, TypeVar

from .replies import ChatPiece, ClientError, GenerationFailed, Overloaded, Piece, TimedOut, Unavailable, Unreachable

Messages = List[Dict[str, Any]]
TEMPORARY = (Overloaded, Unavailable, Unreachable)
P = TypeVar("P", Piece, ChatPiece)


class Settings:
    """What both clients share: where to, for how long, how often."""

    def __init__(
        self,
        url: str,
        api_key: Optional[str] = None,
        timeout: float = 60.0,
        deadline: Optional[float] = None,
        retries: int = 5,
        backoff: float = 0.25,
    ) -> None:
        """``timeout``: seconds to wait for a connection and for each next byte; ``deadline``: seconds for a whole call, retries
        included (looked at between reads); ``retries``: how often more; ``backoff``: first pause in seconds, doubled up to 8,
        with jitter."""
        self.url = url.rstrip("/")
        self.timeout, self.deadline, self.retries, self.backoff = timeout, deadline, retries, backoff
        self.headers = {"Authorization": "Bearer " + api_key} if api_key else {}

    def end(self) -> float:
        return time.monotonic() + self.deadline if self.deadline else float("inf")

    def pause(self, attempt: int, error: ClientError, end: float) -> float:
        """Seconds before the next attempt; raises ``error`` when there is none."""
        seconds = min(8.0, self.backoff * 2**attempt) * random.uniform(0.5, 1.0)
        if attempt >= self.retries or time.monotonic() + seconds > end or not isinstance(error, TEMPORARY):
            raise error
        return seconds

    def wait(self, end: float) -> float:
        """Seconds that reading may take now."""
        left = end - time.monotonic()
        if left <= 0:
            raise TimedOut("no complete answer within %g s" % (self.deadline or 0))
        return min(self.timeout, left)


def generate_body(inputs: str, parameters: Dict[str, Any]) -> Dict[str, Any]:
    """``parameters`` is always there: without it, 3.3 samples."""
    given = {"details": True, **{name: value for name, value in parameters.items() if value is not None}}
    return {"inputs": inputs, "parameters": given}


def chat_body(messages: Messages, parameters: Dict[str, Any], stream: bool) -> Dict[str, Any]:
    body = {"model": "tgi", "messages": messages, **{name: value for name, value in parameters.items() if value is not None}}
    return {**body, "stream": True, "stream_options": {"include_usage": True}} if stream else body


class Lines:
    """Bytes in pieces of any size -> whole lines; a character cut in two waits for its other half."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._rest = ""

    def add(self, chunk: bytes) -> Iterator[str]:
        *whole, self._rest = (self._rest + self._decoder.decode(chunk)).split("\n")
        yield from whole


class Ending:
    """Sees the pieces of a stream pass and says at the end whether the last one was there."""

    def __init__(self) -> None:
        self._seen = False

    def __call__(self, piece: P) -> P:
        done = piece.generated_text is not None if isinstance(piece, Piece) else piece.finish_reason is not None
        self._seen = self._seen or done
        return piece

    def check(self) -> None:
        if not self._seen:
            raise GenerationFailed("the stream ended before the answer did")


def reason(error: BaseException) -> str:
    """The system's own words behind the libraries' chain of exceptions, ``Connection refused`` say; else what they say."""
    todo: List[Any] = [error]
    for number in range(20):  # chains can be loops
        if number == len(todo):
            break
        one = todo[number]
        if isinstance(one, OSError) and one.errno:
            return os.strerror(one.errno)
        todo += [next_ for next_ in (one.__cause__, one.__context__, *one.args) if isinstance(next_, BaseException)]
    return str(error) or type(error).__name__
