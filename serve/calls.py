"""What the synchronous and the asynchronous client share: settings, the server's dialect, pauses, and the reading of lines."""

import codecs
import logging
import os
import random
import socket
import ssl
import time
from typing import Any, Callable, Iterator, List, Optional, Union

from .dialects import Call, Tgi
from .results import ClientError, Invalid, NotFound, Overloaded, TimedOut, Unavailable, Unreachable
from .vllm import Vllm, name_of, room_of

LOG = logging.getLogger("pipedock.client")
MISSING = (NotFound,)
OTHER = (NotFound, Invalid)  # of /tokenize, which is there at both and wants other bodies
TEMPORARY = (Overloaded, Unavailable, Unreachable)
FOREVER = float("inf")
PATIENCE_S = 60.0  # the longest pause that a server may ask for
Dialect = Union[Tgi, Vllm]


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
        say: Callable[[str], None] = LOG.info,
    ) -> None:
        """``url``: http://HOST:PORT, with or without /v1 behind it; ``timeout``: seconds to wait for a connection and for each
        next byte; ``deadline``: seconds for a whole call, retries included; ``retries``: how often more; ``backoff``: first
        pause in seconds, doubled up to 8, with jitter; ``say`` is told once when the server turns out to be of another kind."""
        if not url.startswith(("http://", "https://")):
            raise ValueError("%s: expected http://HOST:PORT" % url)
        if not timeout > 0:
            raise ValueError("timeout %s: expected seconds, more than 0" % timeout)
        self.url = url.rstrip("/")
        self.url = self.url[:-3] if self.url.endswith("/v1") else self.url
        self.dialect: Dialect = Tgi()
        self._say = say
        self.timeout, self.deadline, self.retries, self.backoff = timeout, deadline, retries, backoff
        self.headers = {"Authorization": "Bearer " + api_key} if api_key else {}

    def end(self) -> float:
        return time.monotonic() + self.deadline if self.deadline else FOREVER

    def pause(self, attempt: int, error: ClientError, end: float) -> float:
        """Seconds before the next attempt; raises ``error`` when there is none."""
        seconds = min(8.0, self.backoff * 2**attempt) * random.uniform(0.5, 1.0)
        seconds = max(seconds, min(error.retry_after, PATIENCE_S))
        if attempt >= self.retries or time.monotonic() + seconds > end or not isinstance(error, TEMPORARY):
            raise error
        return seconds

    def adopt(self, error: ClientError, models: Any, version: Any) -> None:
        """``error``: a route is missing, or another one of its name refuses the request. If the server has OpenAI's routes, its
        dialect is spoken from now on, else ``error`` is raised. ``models`` and ``version``: what GET /v1/models and GET /version
        (vLLM's alone) answer, None when they do not."""
        listed = models.get("data") if isinstance(models, dict) else None
        if not isinstance(self.dialect, Tgi) or not listed or (version is None and not isinstance(error, NotFound)):
            raise error
        self.dialect = Vllm(str(listed[0]["id"]), name_of(version))
        self._say("%s: %s, which has no /generate; asked through its /v1 routes" % (self.url, self.dialect.name))

    def wait(self, end: float) -> float:
        """Seconds that reading may take now."""
        left = end - time.monotonic()
        if left <= 0:
            raise TimedOut("no complete answer within %g s" % (self.deadline or 0))
        return min(self.timeout, left)


def roomed(call: Call, found: Any) -> Call:
    """``call`` with the number of tokens that its prompt leaves; ``found``: what /tokenize said, or None."""
    room = room_of(found)
    return call if room is None else call._replace(body={**call.body, "max_tokens": room})


class Lines:
    """Bytes in pieces of any size -> whole lines; a character cut in two waits for its other half."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._rest = ""

    def add(self, chunk: bytes) -> Iterator[str]:
        *whole, self._rest = (self._rest + self._decoder.decode(chunk)).split("\n")
        yield from whole


def reason(error: BaseException) -> str:
    """The system's own words behind the libraries' chain of exceptions, ``Connection refused`` say; else what they say."""
    chain: List[Any] = [error]
    for number in range(20):  # chains can be loops
        if number == len(chain):
            break
        one = chain[number]
        chain += [next_ for next_ in (one.__cause__, one.__context__, *one.args) if isinstance(next_, BaseException)]
    for one in chain:
        if isinstance(one, (socket.gaierror, ssl.SSLError)) and one.strerror:  # their numbers are not the system's
            return str(one.strerror)
    numbers = [one.errno for one in chain if isinstance(one, OSError) and one.errno]
    return os.strerror(numbers[0]) if numbers else str(error) or type(error).__name__
