"""What a server answers, as typed values: whole answers, stream events and errors of text-generation-inference 0.8 to 3.3.

No network here: ``client`` brings the bytes.
"""

import json
from dataclasses import dataclass
from typing import Any, Dict, List, Optional, Tuple, Type


class ClientError(Exception):
    """A request that did not work out. ``status``: HTTP code or None; ``kind``: the server's error_type or None."""

    def __init__(self, message: str, status: Optional[int] = None, kind: Optional[str] = None) -> None:
        super().__init__(message)
        self.status, self.kind = status, kind


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


KINDS: Dict[str, Type[ClientError]] = {
    "validation": Invalid,
    "template_error": Invalid,
    "tool_error": Invalid,
    "overloaded": Overloaded,
    "healthcheck": Unavailable,
    "generation": GenerationFailed,
    "incomplete_generation": GenerationFailed,
    "incomplete_generation_stream": GenerationFailed,
}
CODES: Dict[int, Type[ClientError]] = {
    401: Unauthorized,
    403: Unauthorized,
    404: NotFound,
    405: NotFound,
    429: Overloaded,
    502: Unavailable,
    503: Unavailable,
    504: Unavailable,
}


def error_of(status: int, body: bytes) -> ClientError:
    """The exception for a refused request; ``body``: JSON of the contract, plain text, or empty."""
    text = body.decode("utf-8", "replace").strip()
    found = _json(text)
    if isinstance(found, dict) and "error" in found:
        return _typed(found, status)
    kind_of = CODES.get(status, Invalid if 400 <= status < 500 else ClientError)
    if text[:1] == "<":  # a web page: nothing of ours
        text = "an HTML page with code %d; is this another server's port?" % status
    return kind_of(text[:2000] or "the server answered %d without a text" % status, status)


def document(body: bytes, where: str) -> Any:
    """The JSON of a 200 answer."""
    text = body.decode("utf-8", "replace")
    found = _json(text)
    if found is None:
        raise GenerationFailed("%s: the answer is no JSON: %s" % (where, text[:200]))
    return found


def _typed(document: Dict[str, Any], status: Optional[int]) -> ClientError:
    error, kind = document["error"], document.get("error_type")
    if isinstance(error, dict):  # the form of the /v1 routes: the code is there, the type is not
        text, code = str(error.get("message")), error.get("http_status_code")
        known = Overloaded if text == "Model is overloaded" else CODES.get(code or 0, Invalid if code == 422 else ClientError)
        return known(text, status or code, kind)
    made = KINDS.get(str(kind)) or CODES.get(status or 0) or (Invalid if status and 400 <= status < 500 else ClientError)
    return made(str(error), status, kind)


def event(line: str) -> Optional[Dict[str, Any]]:
    """The document of one line, None for everything that carries none; an error event is raised."""
    if not line.startswith("data:"):
        return None
    text = line[5:].strip()
    if not text or text == "[DONE]":
        return None
    found = _json(text)
    if not isinstance(found, dict):
        raise GenerationFailed("the server sent an event that is no JSON object: %s" % text[:200])
    if "error" in found:
        raise _typed(found, None)  # the HTTP code of a stream is 200 whatever happens in it
    return found


def generation_of(document: Any) -> Generation:
    """Body of /generate (an object) or of POST / (a list of one)."""
    body = document[0] if isinstance(document, list) and document else document
    if not isinstance(body, dict) or "generated_text" not in body:
        raise GenerationFailed("not an answer of a text generation server: %s" % json.dumps(document)[:200])
    return _generation(body["generated_text"], body.get("details") or {})


def _generation(text: str, details: Dict[str, Any]) -> Generation:
    return Generation(
        text,
        details.get("finish_reason", ""),
        details.get("generated_tokens", 0),
        details.get("seed"),
        _tokens(details.get("tokens")),
        _tokens(details.get("prefill")),
        tuple(_tokens(one) for one in details.get("top_tokens") or ()),
        tuple(_generation(one["generated_text"], one) for one in details.get("best_of_sequences") or ()),
    )


def piece_of(document: Dict[str, Any]) -> Piece:
    details = document.get("details") or {}
    return Piece(
        _token(document["token"]),
        _tokens(document.get("top_tokens")),
        document.get("generated_text"),
        details.get("finish_reason"),
        details.get("generated_tokens"),
        details.get("seed"),
        details.get("input_length"),
    )


def places_of(document: Any) -> Tuple[Place, ...]:
    """Body of /tokenize."""
    if not isinstance(document, list) or not all(isinstance(one, dict) and "id" in one for one in document):
        raise GenerationFailed("not a list of tokens: %s" % json.dumps(document)[:200])
    return tuple(Place(one["id"], one.get("text") or "", one.get("start") or 0, one.get("stop") or 0) for one in document)


def templated_of(document: Any) -> Templated:
    """Body of /chat_tokenize."""
    if not isinstance(document, dict) or "tokenize_response" not in document:
        raise GenerationFailed("not a tokenized conversation: %s" % json.dumps(document)[:200])
    return Templated(document.get("templated_text") or "", places_of(document["tokenize_response"]))


def chat_of(document: Dict[str, Any]) -> Chat:
    choice, usage = document["choices"][0], document.get("usage") or {}
    return Chat(
        choice["message"].get("content") or "",
        choice.get("finish_reason") or "",
        document.get("model", ""),
        usage.get("prompt_tokens"),
        usage.get("completion_tokens"),
    )


def chat_piece_of(document: Dict[str, Any]) -> ChatPiece:
    usage = document.get("usage") or {}
    choice = (document.get("choices") or [{}])[0]
    text = (choice.get("delta") or {}).get("content") or ""
    return ChatPiece(text, choice.get("finish_reason"), usage.get("prompt_tokens"), usage.get("completion_tokens"))


def _token(document: Dict[str, Any]) -> Token:
    return Token(document["id"], document["text"], document.get("logprob"), bool(document.get("special")))


def _tokens(documents: Optional[List[Dict[str, Any]]]) -> Tuple[Token, ...]:
    return tuple(_token(one) for one in documents or ())


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None
