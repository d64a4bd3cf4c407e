"""The bodies of all routes as OpenAPI schemas. Those of requests are made from the tables that the server itself reads."""

from typing import Any, Dict

from . import params
from .serde import Field, boolean, i32, number, string, u32, u64, usize

NUMBER: Dict[str, Any] = {"type": "number", "format": "float"}
TYPES: Dict[Any, Dict[str, Any]] = {
    boolean: {"type": "boolean"},
    string: {"type": "string"},
    number: NUMBER,
    i32: {"type": "integer", "format": "int32"},
    u32: {"type": "integer", "format": "int32", "minimum": 0},
    u64: {"type": "integer", "format": "int64", "minimum": 0},
    usize: {"type": "integer", "minimum": 0},
    params.strings: {"type": "array", "items": {"type": "string"}},
}
COUNTS = (  # of /info
    "max_concurrent_requests max_best_of max_stop_sequences max_input_tokens max_total_tokens"
    " validation_workers max_client_batch_size"
)
UINT = TYPES[u32]
LONG = TYPES[u64]
TEXT = TYPES[string]


def ref(name: str) -> Dict[str, Any]:
    return {"$ref": "#/components/schemas/" + name}


def _nullable(schema: Dict[str, Any]) -> Dict[str, Any]:
    return dict({"allOf": [schema]} if "$ref" in schema else schema, nullable=True)


def array(schema: Dict[str, Any]) -> Dict[str, Any]:
    return {"type": "array", "items": schema}


def _object(required: str = "", **properties: Dict[str, Any]) -> Dict[str, Any]:
    schema: Dict[str, Any] = {"type": "object", "properties": properties}
    return dict(schema, required=required.split()) if required else schema


def _request(fields: Dict[str, Field], **others: Dict[str, Any]) -> Dict[str, Any]:
    """From the table the server itself reads; fields of other types are given, the rest is what it accepts and does not use."""
    properties = {}
    for name, field in fields.items():
        schema = TYPES.get(field.check) or others.get(name)
        if schema:
            properties[name] = _nullable(schema) if field.nullable else schema
    return _object(" ".join(name for name, field in fields.items() if field.required), **properties)


def _chat(head: Dict[str, Any]) -> Dict[str, Any]:
    """Answers of the chat route."""
    logprobs = _nullable(ref("ChatCompletionLogprobs"))
    likely = {"token": TEXT, "logprob": NUMBER}
    return {
        "ChatCompletion": _object(
            "id created model system_fingerprint choices usage",
            choices=array(ref("ChatCompletionComplete")),
            usage=ref("Usage"),
            **head,
        ),
        "ChatCompletionComplete": _object(
            "index message finish_reason", index=UINT, message=ref("OutputMessage"), logprobs=logprobs, finish_reason=TEXT
        ),
        "OutputMessage": {"oneOf": [ref("TextMessage")]},
        "TextMessage": _object("role content", role=TEXT, content=TEXT),
        "ChatCompletionChunk": _object(
            "id created model system_fingerprint choices",
            choices=array(ref("ChatCompletionChoice")),
            usage=_nullable(ref("Usage")),
            **head,
        ),
        "ChatCompletionChoice": _object(
            "index delta", index=UINT, delta=ref("ChatCompletionDelta"), logprobs=logprobs, finish_reason=_nullable(TEXT)
        ),
        "ChatCompletionDelta": {"oneOf": [ref("TextMessage")]},
        "ChatCompletionLogprobs": _object("content", content=array(ref("ChatCompletionLogprob"))),
        "ChatCompletionLogprob": _object(
            "token logprob top_logprobs", top_logprobs=array(ref("ChatCompletionTopLogprob")), **likely
        ),
        "ChatCompletionTopLogprob": _object("token logprob", **likely),
        "SagemakerRequest": {"oneOf": [ref("CompatGenerateRequest"), ref("ChatRequest"), ref("CompletionRequest")]},
        "SagemakerResponse": {"oneOf": [ref("GenerateResponse"), ref("ChatCompletion"), ref("CompletionFinal")]},
        "SagemakerStreamResponse": {"oneOf": [ref("StreamResponse"), ref("ChatCompletionChunk"), ref("Chunk")]},
    }


def schemas() -> Dict[str, Any]:
    finish = {"type": "string", "enum": ["length", "eos_token", "stop_sequence"]}
    logprob = {"logprob": _nullable(NUMBER)}
    token = _object("id text logprob special", id=UINT, text=TEXT, special=TYPES[boolean], **logprob)
    sequence = {
        "finish_reason": ref("FinishReason"),
        "generated_tokens": UINT,
        "seed": _nullable(LONG),
        "prefill": array(ref("PrefillToken")),
        "tokens": array(ref("Token")),
        "top_tokens": array(array(ref("Token"))),
    }
    best = _nullable(array(ref("BestOfSequence")))
    head = {"id": TEXT, "created": LONG, "model": TEXT, "system_fingerprint": TEXT}
    message = _object("role", role=TEXT, name=_nullable(TEXT))
    content = {"oneOf": [TEXT, array(ref("MessageChunk"))]}
    return {
        "GenerateParameters": _request(params.PARAMETERS),
        "GenerateRequest": _request(params.GENERATE, parameters=ref("GenerateParameters")),
        "CompatGenerateRequest": _request(params.COMPAT, parameters=ref("GenerateParameters")),
        "ChatRequest": _request(params.CHAT, messages=array(ref("Message")), stream_options=_nullable(ref("StreamOptions"))),
        "CompletionRequest": _request(params.COMPLETION, prompt=ref("Prompt")),
        "Prompt": array(TEXT),
        "Message": {"allOf": [ref("MessageBody"), message]},
        "MessageBody": {"oneOf": [_object("content", content=ref("MessageContent"))]},
        "MessageContent": content,
        "MessageChunk": {"oneOf": [_object("text type", text=TEXT, type={"type": "string", "enum": ["text"]})]},
        "StreamOptions": _object(include_usage=TYPES[boolean]),
        "ErrorResponse": _object("error error_type", error=TEXT, error_type=TEXT),
        "FinishReason": finish,
        "Token": token,
        "PrefillToken": _object("id text logprob", id=UINT, text=TEXT, **logprob),
        "Details": _object("finish_reason generated_tokens prefill tokens", best_of_sequences=best, **sequence),
        "BestOfSequence": _object("generated_text finish_reason generated_tokens prefill tokens", generated_text=TEXT, **sequence),
        "GenerateResponse": _object("generated_text", generated_text=TEXT, details=_nullable(ref("Details"))),
        "StreamDetails": _object(
            "finish_reason generated_tokens input_length",
            finish_reason=ref("FinishReason"),
            generated_tokens=UINT,
            input_length=UINT,
            seed=_nullable(LONG),
        ),
        "StreamResponse": _object(
            "index token",
            index=UINT,
            token=ref("Token"),
            top_tokens=array(ref("Token")),
            generated_text=_nullable(TEXT),
            details=_nullable(ref("StreamDetails")),
        ),
        "SimpleToken": _object("id text start stop", id=UINT, text=TEXT, start=TYPES[usize], stop=TYPES[usize]),
        "TokenizeResponse": array(ref("SimpleToken")),
        "ChatTokenizeResponse": _object(
            "tokenize_response templated_text", tokenize_response=ref("TokenizeResponse"), templated_text=TEXT
        ),
        "Usage": _object(
            "prompt_tokens completion_tokens total_tokens", prompt_tokens=UINT, completion_tokens=UINT, total_tokens=UINT
        ),
        **_chat(head),
        "Chunk": _object("id created choices model system_fingerprint", choices=array(ref("CompletionComplete")), **head),
        "CompletionFinal": _object(
            "id created model system_fingerprint choices usage",
            choices=array(ref("CompletionComplete")),
            usage=ref("Usage"),
            **head,
        ),
        "CompletionComplete": _object(
            "index text finish_reason", index=UINT, text=TEXT, finish_reason=TEXT, logprobs=_nullable(array(NUMBER))
        ),
        "ModelInfo": _object("id object created owned_by", id=TEXT, object=TEXT, created=LONG, owned_by=TEXT),
        "Info": _object(
            "model_id router version " + COUNTS,
            **{name: _nullable(TEXT) for name in ("model_sha", "model_pipeline_tag", "sha", "docker_label")},
            **dict.fromkeys(("model_id", "router", "version"), TEXT),
            **dict.fromkeys(COUNTS.split(), TYPES[usize]),
        ),
    }
