"""Bytes of a server -> ``results``: answers, stream events and errors of text-generation-inference 0.8 to 3.3; errors of vLLM.

No network here: ``client`` brings the bytes.
"""

import json
from typing import Any, Dict, List, Optional, Tuple, Type

from .results import (
    Chat,
    ChatPiece,
    ClientError,
    Generation,
    GenerationFailed,
    Invalid,
    NotFound,
    Overloaded,
    Piece,
    Place,
    Templated,
    Token,
    Unauthorized,
    Unavailable,
)

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
STARTS: Tuple[Tuple[str, Type[ClientError]], ...] = (
    ("Model is overloaded", Overloaded),
    ("Request failed during generation", GenerationFailed),
    ("Incomplete generation", GenerationFailed),
)


def error_of(status: int, body: bytes, retry_after: str = "") -> ClientError:
    """The exception for a refused request; ``body``: JSON of the contract or of vLLM, plain text, or empty; ``retry_after``: that
    header, of which seconds are understood and dates are not."""
    text = body.decode("utf-8", "replace").strip()
    found = _json(text)
    error = _typed(found, status) if isinstance(found, dict) else None
    if error is None:
        kind_of = _by_code(status)
        if text[:1] == "<":  # a web page: nothing of ours
            text = "an HTML page with code %d; is this another server's port?" % status
        error = kind_of(text[:2000] or "the server answered %d without a text" % status, status)
    error.retry_after = float(retry_after) if retry_after.isdigit() else 0.0
    return error


def document(body: bytes, where: str) -> Any:
    """The JSON of a 200 answer."""
    text = body.decode("utf-8", "replace")
    found = _json(text)
    if found is None:
        raise GenerationFailed("%s: the answer is no JSON: %s" % (where, text[:200]))
    return found


def _typed(document: Dict[str, Any], status: Optional[int]) -> Optional[ClientError]:
    """The error that a document tells of, None if it tells of none. In a stream ``status`` is None: it is 200 whatever happens."""
    error, kind = document.get("error"), document.get("error_type")
    if document.get("object") == "error":  # vLLM up to 0.10: the same without a box around it
        error = document
    if isinstance(error, dict):  # the form of the /v1 routes; the original's code there is 422 whatever happened
        text = str(error.get("message"))
        code = status or error.get("http_status_code") or error.get("code")
        known = next((made for start, made in STARTS if text.startswith(start)), None)
        return (known or _by_code(code))(text, code, kind or error.get("type"))
    if error:
        return (KINDS.get(str(kind)) or _by_code(status))(str(error), status, kind)
    if status and "detail" in document:  # FastAPI's own answers, behind which vLLM stands
        return _by_code(status)(str(document["detail"]), status)
    return None


def _by_code(code: Any) -> Type[ClientError]:
    refused = isinstance(code, int) and 400 <= code < 500
    return CODES.get(code, Invalid if refused else ClientError) if isinstance(code, int) else ClientError


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
    error = _typed(found, None)
    if error is not None:
        raise error
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
