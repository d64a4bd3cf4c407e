"""How a wish becomes a request and its answer a value, for servers with text-generation-inference's routes; for vLLM see ``vllm``.

A dialect has ``generate``, ``chat``, ``tokenize`` and ``chat_tokenize``, each -> Call; the clients send it.
"""

import difflib
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Union

from . import replies
from .results import ChatPiece, GenerationFailed, Piece

Messages = List[Dict[str, Any]]
GENERATE = (
    "adapter_id", "best_of", "decoder_input_details", "details", "do_sample", "frequency_penalty", "grammar", "max_new_tokens",
    "repetition_penalty", "return_full_text", "seed", "stop", "temperature", "top_k", "top_n_tokens", "top_p", "truncate",
    "typical_p", "watermark",
)  # fmt: skip
CHAT = (
    "frequency_penalty", "logit_bias", "logprobs", "max_tokens", "n", "presence_penalty", "response_format", "seed", "stop",
    "temperature", "tool_choice", "tool_prompt", "tools", "top_logprobs", "top_p",
)  # fmt: skip
NOT_CHAT = ("max_new_tokens", "do_sample", "details", "decoder_input_details", "return_full_text", "truncate", "top_n_tokens")


class Call(NamedTuple):
    """``read``: the JSON of a whole answer -> value; ``pieces``: a fresh reader of a stream's documents. ``room``: a body for
    /tokenize, whose answer says how many tokens are left for the answer (``max_tokens``), when the server has to be told."""

    path: str
    body: Dict[str, Any]
    read: Callable[[Any], Any]
    pieces: Any = None
    room: Optional[Dict[str, Any]] = None


class Pieces:
    """Documents of a stream -> pieces. ``end`` says what was held back, or that the last piece never came."""

    def __init__(self, read: Callable[[Dict[str, Any]], Union[Piece, ChatPiece]]) -> None:
        self._read, self._seen = read, False

    def add(self, document: Dict[str, Any]) -> List[Any]:
        piece = understood(self._read, document)
        done = piece.generated_text if isinstance(piece, Piece) else piece.finish_reason
        self._seen = self._seen or done is not None
        return [piece]

    def end(self) -> List[Any]:
        if not self._seen:
            raise GenerationFailed("the stream ended before the answer did")
        return []


class Tgi:
    """text-generation-inference 0.8 to 3.3, and the embedded server."""

    name = "text-generation-inference"

    def generate(self, inputs: str, parameters: Dict[str, Any], stream: bool) -> Call:
        """``parameters`` is always sent: without it, 3.3 samples."""
        spelled(parameters, GENERATE, CHAT)
        body = {"inputs": inputs, "parameters": {"details": True, **given(parameters)}}
        path = "/generate_stream" if stream else "/generate"
        return Call(path, body, replies.generation_of, lambda: Pieces(replies.piece_of))

    def chat(self, messages: Messages, parameters: Dict[str, Any], stream: bool) -> Call:
        return chat_call("tgi", messages, parameters, stream)

    def tokenize(self, inputs: str) -> Call:
        return Call("/tokenize", {"inputs": inputs, "parameters": {}}, replies.places_of)

    def chat_tokenize(self, messages: Messages) -> Call:
        return Call("/chat_tokenize", {"model": "tgi", "messages": messages}, replies.templated_of)


def chat_call(model: str, messages: Messages, parameters: Dict[str, Any], stream: bool) -> Call:
    """The chat route is the same everywhere, but for the model's name."""
    spelled(parameters, CHAT, NOT_CHAT)
    body = {"model": model, "messages": messages, **given(parameters)}
    if stream:
        body.update(stream=True, stream_options={"include_usage": True})
    return Call("/v1/chat/completions", body, replies.chat_of, lambda: Pieces(replies.chat_piece_of))


def spelled(parameters: Dict[str, Any], names: Sequence[str], others: Sequence[str]) -> None:
    """TypeError for a name of the ``others``, those of the other route, and for one that is almost one of ``names``: servers pass
    over what they do not know. What is like none of them may be something that a server has since learnt."""
    for name in parameters:
        if name in names:
            continue
        near = difflib.get_close_matches(name, names, 1, 0.75)
        if near or name in others:
            raise TypeError("no parameter %s here%s (there are %s)" % (
                name, "; did you mean %s?" % near[0] if near else "", ", ".join(names)))  # fmt: skip


def given(parameters: Dict[str, Any]) -> Dict[str, Any]:
    return {name: value for name, value in parameters.items() if value is not None}


def understood(read: Callable[[Any], Any], document: Any) -> Any:
    """``read(document)``; GenerationFailed when the document is of another kind than it should be."""
    try:
        return read(document)
    except (AttributeError, LookupError, TypeError) as error:
        raise GenerationFailed("not an answer of a text generation server: %.200s" % document) from error
