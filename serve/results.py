"""What the clients give back: whole answers, pieces of streams, and the errors. No network and no JSON here."""

from dataclasses import dataclass
from typing import Optional, Tuple


class ClientError(Exception):
    """A request that did not work out. ``status``: HTTP code or None; ``kind``: the server's error_type or None;
    ``retry_after``: seconds that the server asks to wait, 0 if it does not say."""

    def __init__(self, message: str, status: Optional[int] = None, kind: Optional[str] = None) -> None:
        super().__init__(message)
        self.status, self.kind, self.retry_after = status, kind, 0.0


class Unreachable(ClientError):
    """No connection, or it broke."""


class TimedOut(ClientError):
    """The server did not answer within the client's time."""


class Overloaded(ClientError):
    """429: too many requests at once. Repeating later helps."""


class Unavailable(ClientError):
    """502, 503 or 504: not ready, or not healthy. Repeating later helps."""


class Invalid(ClientError):
    """The server refuses this request: 400, 413, 415, 422, or error_type validation, template_error, tool_error."""


class Unauthorized(ClientError):
    """401 or 403: the API key is missing or wrong."""


class NotFound(ClientError):
    """404 or 405: this server has no such route (chat needs version 1.4)."""


class GenerationFailed(ClientError):
    """The model failed while generating, or the stream ended too early."""


@dataclass(frozen=True)
class Token:
    """``id`` -1: this server does not tell; ``logprob`` None: it was no number, or is not told."""

    id: int
    text: str
    logprob: Optional[float]
    special: bool = False


@dataclass(frozen=True)
class Generation:
    """A whole answer. ``tokens`` and what follows are empty when details were not asked for; ``seed`` None: greedy."""

    text: str
    finish_reason: str = ""
    generated_tokens: int = 0
    seed: Optional[int] = None
    tokens: Tuple[Token, ...] = ()
    prefill: Tuple[Token, ...] = ()
    top_tokens: Tuple[Tuple[Token, ...], ...] = ()
    others: Tuple["Generation", ...] = ()

    @property
    def generated_text(self) -> str:
        """``text`` by the name it has on the wire and in TGI's own client."""
        return self.text


@dataclass(frozen=True)
class Piece:
    """One token of a stream. The last one has ``generated_text`` and, from servers that tell, ``finish_reason`` and counts."""

    token: Token
    top_tokens: Tuple[Token, ...] = ()
    generated_text: Optional[str] = None
    finish_reason: Optional[str] = None
    generated_tokens: Optional[int] = None
    seed: Optional[int] = None
    input_length: Optional[int] = None

    @property
    def text(self) -> str:
        """What to show: special tokens show nothing."""
        return "" if self.token.special else self.token.text


@dataclass(frozen=True)
class Place:
    """A token of a prompt: its text and where that stands in it, in characters. TGI's fallback tokenizer tells only the id."""

    id: int
    text: str = ""
    start: int = 0
    stop: int = 0


@dataclass(frozen=True)
class Templated:
    """What a server makes of a conversation: the text of its template and the tokens of that."""

    text: str
    tokens: Tuple[Place, ...]


@dataclass(frozen=True)
class Chat:
    content: str
    finish_reason: str
    model: str = ""
    prompt_tokens: Optional[int] = None
    completion_tokens: Optional[int] = None


@dataclass(frozen=True)
class ChatPiece:
    """A piece of a streamed chat answer; counts come with a last piece without text."""

    text: str = ""
    finish_reason: Optional[str] = None
    prompt_tokens: Optional[int] = None
    completion_tokens: Optional[int] = None
