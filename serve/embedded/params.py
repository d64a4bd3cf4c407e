"""The bodies of all routes as tables: which keys, which types, which defaults. Unknown keys are ignored, as in the original.

The tables are also what the OpenAPI document is made of. The numbers' ranges are not here: see validation.py.
"""

from dataclasses import dataclass, field
from typing import Any, Dict, List, Optional

from .serde import Field, Mismatch, Path, anything, boolean, i32, number, one_of, sequence, string, struct, u32, u64, usize

strings = sequence(string)


def _grammar(value: Any, path: Path) -> Any:
    tag = struct("GrammarType", {"type": Field(string, required=True), "value": Field(anything, required=True)})(value, path)
    if tag["type"] not in ("json", "json_object", "json_schema", "regex"):
        raise Mismatch(path, "unknown variant `%s`, expected one of `json`, `regex`, `json_schema`" % tag["type"])
    return value


PARAMETERS: Dict[str, Field] = {
    "best_of": Field(usize, nullable=True),
    "temperature": Field(number, nullable=True),
    "repetition_penalty": Field(number, nullable=True),
    "frequency_penalty": Field(number, nullable=True),
    "top_k": Field(i32, nullable=True),
    "top_p": Field(number, nullable=True),
    "typical_p": Field(number, nullable=True),
    "do_sample": Field(boolean, default=False),
    "max_new_tokens": Field(u32, nullable=True),
    "return_full_text": Field(boolean, nullable=True),
    "stop": Field(strings, default=()),
    "truncate": Field(usize, nullable=True),
    "watermark": Field(boolean, default=False),
    "details": Field(boolean, default=False),
    "decoder_input_details": Field(boolean, default=False),
    "seed": Field(u64, nullable=True),
    "top_n_tokens": Field(u32, nullable=True),
    "grammar": Field(_grammar, nullable=True),
    "adapter_id": Field(string, nullable=True),
}


@dataclass(frozen=True)
class Parameters:
    """What a request asks for. ``do_sample`` is True when a request has no ``parameters`` at all, as in the original."""

    best_of: Optional[int] = None
    temperature: Optional[float] = None
    repetition_penalty: Optional[float] = None
    frequency_penalty: Optional[float] = None
    top_k: Optional[int] = None
    top_p: Optional[float] = None
    typical_p: Optional[float] = None
    do_sample: bool = True
    max_new_tokens: Optional[int] = None
    return_full_text: Optional[bool] = None
    stop: List[str] = field(default_factory=list)
    truncate: Optional[int] = None
    watermark: bool = False
    details: bool = False
    decoder_input_details: bool = False
    seed: Optional[int] = None
    top_n_tokens: Optional[int] = None
    grammar: Any = None
    adapter_id: Optional[str] = None


@dataclass(frozen=True)
class Request:
    """One prompt and what to do with it. ``special``: add the tokenizer's special tokens (BOS); chat prompts bring their own."""

    inputs: str
    parameters: Parameters
    stream: bool = False
    special: bool = True


def _parameters(value: Any, path: Path) -> Parameters:
    return Parameters(**struct("GenerateParameters", PARAMETERS)(value, path))


GENERATE = {"inputs": Field(string, required=True), "parameters": Field(_parameters, default=Parameters())}
COMPAT = dict(GENERATE, stream=Field(boolean, default=False))


def generate_request(value: Any, path: Path = ()) -> Request:
    """Body of /generate, /generate_stream and /tokenize."""
    return Request(**struct("GenerateRequest", GENERATE)(value, path))


def compat_request(value: Any, path: Path = ()) -> Request:
    """Body of POST / : the same with ``stream``."""
    return Request(**struct("CompatGenerateRequest", COMPAT)(value, path))


def _chunk(value: Any, path: Path) -> Dict[str, Any]:
    if isinstance(value, dict) and value.get("type") == "text":
        return struct("MessageChunk", {"type": Field(string), "text": Field(string, required=True)})(value, path)
    url = struct("Url", {"url": Field(string, required=True)})
    return struct("MessageChunk", {"type": Field(string, required=True), "image_url": Field(url, required=True)})(value, path)


CONTENT = one_of("MessageContent", string, sequence(_chunk))
WITH_CONTENT = struct("TextMessage", {"content": Field(CONTENT, required=True)})
WITH_CALLS = struct("ToolCallMessage", {"tool_calls": Field(sequence(anything), required=True)})
MESSAGE_BODY = one_of("MessageBody", WITH_CONTENT, WITH_CALLS)
MESSAGE_HEAD = struct("Message", {"role": Field(string, required=True), "name": Field(string, nullable=True)})


def _message(value: Any, path: Path) -> Dict[str, Any]:
    return {**MESSAGE_HEAD(value, path), **MESSAGE_BODY(value, path)}


STREAM_OPTIONS = struct("StreamOptions", {"include_usage": Field(boolean, default=False)})

CHAT: Dict[str, Field] = {
    "messages": Field(sequence(_message), required=True),
    "model": Field(string, nullable=True),
    "max_tokens": Field(u32, nullable=True, alias="max_completion_tokens"),
    "temperature": Field(number, nullable=True),
    "top_p": Field(number, nullable=True),
    "seed": Field(u64, nullable=True),
    "stop": Field(strings, nullable=True),
    "frequency_penalty": Field(number, nullable=True),
    "presence_penalty": Field(number, nullable=True),
    "logprobs": Field(boolean, nullable=True),
    "top_logprobs": Field(u32, nullable=True),
    "stream": Field(boolean, default=False),
    "stream_options": Field(STREAM_OPTIONS),
    "tools": Field(sequence(anything), nullable=True),
    "tool_choice": Field(anything, nullable=True),
    "tool_prompt": Field(string, nullable=True),
    "response_format": Field(_grammar, nullable=True),
    "n": Field(u32, nullable=True),
    "logit_bias": Field(sequence(number), nullable=True),
}
chat_request = struct("ChatRequest", CHAT)


def _prompt(value: Any, path: Path) -> List[str]:
    if isinstance(value, str):
        return [string(value, path)]
    prompts = one_of("Prompt", strings)(value, path)
    if not prompts:
        raise Mismatch(path, "Empty array detected. Do not use an empty array for the prompt.")
    return prompts


COMPLETION: Dict[str, Field] = {
    "prompt": Field(_prompt, required=True),
    "model": Field(string, nullable=True),
    "max_tokens": Field(u32, nullable=True),
    "temperature": Field(number, nullable=True),
    "top_p": Field(number, nullable=True),
    "stream": Field(boolean, default=False),
    "seed": Field(u64, nullable=True),
    "suffix": Field(string, nullable=True),
    "repetition_penalty": Field(number, nullable=True),
    "frequency_penalty": Field(number, nullable=True),
    "stop": Field(strings, nullable=True),
}
completion_request = struct("CompletionRequest", COMPLETION)
