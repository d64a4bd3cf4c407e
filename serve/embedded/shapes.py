"""Bodies of the native routes and of their stream events. The order of the fields is the order of the keys on the wire."""

from typing import Any, List, Optional, Union

import msgspec
from msgspec import UNSET, UnsetType

encode = msgspec.json.encode  # compact, UTF-8 as it is, like the original's


class Token(msgspec.Struct):
    id: int
    text: str
    logprob: Optional[float]
    special: bool


class PrefillToken(msgspec.Struct):
    id: int
    text: str
    logprob: Optional[float]


class Sequence(msgspec.Struct):
    """One of the other sequences of ``best_of``."""

    generated_text: str
    finish_reason: str
    generated_tokens: int
    seed: Optional[int]
    prefill: List[PrefillToken]
    tokens: List[Token]
    top_tokens: Union[List[List[Token]], UnsetType] = UNSET


class Details(msgspec.Struct):
    finish_reason: str
    generated_tokens: int
    seed: Optional[int]
    prefill: List[PrefillToken]
    tokens: List[Token]
    best_of_sequences: Union[List[Sequence], UnsetType] = UNSET
    top_tokens: Union[List[List[Token]], UnsetType] = UNSET


class Generated(msgspec.Struct):
    generated_text: str
    details: Union[Details, UnsetType] = UNSET


class StreamDetails(msgspec.Struct):
    finish_reason: str
    generated_tokens: int
    seed: Optional[int]
    input_length: int


class StreamEvent(msgspec.Struct):
    index: int
    token: Token
    top_tokens: Union[List[Token], UnsetType] = UNSET
    generated_text: Optional[str] = None
    details: Optional[StreamDetails] = None


class SimpleToken(msgspec.Struct):
    id: int
    text: str
    start: int
    stop: int


class TokenEvent(msgspec.Struct):
    """From the model thread: one more token, and with the last one how it ended."""

    token: Token
    top: List[Token]
    finish_reason: Optional[str] = None


def data(body: Any) -> bytes:
    """One server-sent event as the original writes it: ``data: `` and compact JSON, two line feeds."""
    return b"data: " + (body if isinstance(body, bytes) else encode(body)) + b"\n\n"


KEEP_ALIVE = b":\n\n"
DONE = b"data: [DONE]\n\n"
