"""What /api-doc/openapi.json and /docs show: the routes of this server, each a part of the original's document."""

import html
from typing import Any, Dict, Tuple

from .schemas import array, ref, schemas

TAG = "Text Generation Inference"

POSTS: Tuple[Tuple[str, str, str, str, bool], ...] = (  # path, operation, request, answer, also as a stream
    ("/", "compat_generate", "CompatGenerateRequest", "[GenerateResponse]", True),
    ("/generate", "generate", "GenerateRequest", "GenerateResponse", False),
    ("/generate_stream", "generate_stream", "GenerateRequest", "StreamResponse", True),
    ("/v1/chat/completions", "chat_completions", "ChatRequest", "ChatCompletion", True),
    ("/v1/completions", "completions", "CompletionRequest", "CompletionFinal", True),
    ("/invocations", "sagemaker_compatibility", "SagemakerRequest", "SagemakerResponse", True),
    ("/tokenize", "tokenize", "GenerateRequest", "TokenizeResponse", False),
    ("/chat_tokenize", "get_chat_tokenize", "ChatRequest", "ChatTokenizeResponse", False),
)
GETS = (
    ("/health", "health", ""),
    ("/info", "get_model_info", "Info"),
    ("/metrics", "metrics", ""),
    ("/v1/models", "openai_get_model_info", "ModelInfo"),
)
STREAMS = {"sagemaker_compatibility": "SagemakerStreamResponse", "chat_completions": "ChatCompletionChunk", "completions": "Chunk"}

ERRORS = {
    "422": "Input validation error",
    "424": "Generation Error",
    "429": "Model is overloaded",
    "500": "Incomplete generation",
}


def document() -> Dict[str, Any]:
    """The OpenAPI 3 document."""
    paths: Dict[str, Any] = {post[0]: {"post": _post(*post[1:])} for post in POSTS}
    for path, operation, answer in GETS:
        content = {"application/json": {"schema": ref(answer)}} if answer else {"text/plain": {"schema": {"type": "string"}}}
        ok: Dict[str, Any] = {"description": "OK"}
        if path != "/health":
            ok["content"] = content
        paths[path] = {"get": {"tags": [TAG], "operationId": operation, "responses": {"200": ok}}}
    return {
        "openapi": "3.0.3",
        "info": {"title": TAG, "description": "Text Generation Webserver, embedded engine of pipedock", "version": "3.3.6-dev0"},
        "paths": paths,
        "components": {"schemas": schemas()},
        "tags": [{"name": TAG}],
    }


def _post(operation: str, request: str, answer: str, stream: bool) -> Dict[str, Any]:
    content: Dict[str, Any] = {}
    if operation != "generate_stream":
        schema = array(ref(answer.strip("[]"))) if answer.startswith("[") else ref(answer)
        content["application/json"] = {"schema": schema}
    if stream:
        content["text/event-stream"] = {"schema": ref(STREAMS.get(operation, "StreamResponse"))}
    responses: Dict[str, Any] = {"200": {"description": "OK", "content": content}}
    if "tokenize" not in operation:
        kind = "text/event-stream" if operation == "generate_stream" else "application/json"
        for code, text in ERRORS.items():
            responses[code] = {"description": text, "content": {kind: {"schema": ref("ErrorResponse")}}}
    body = {"content": {"application/json": {"schema": ref(request)}}, "required": True}
    return {"tags": [TAG], "operationId": operation, "requestBody": body, "responses": responses}


def page() -> str:
    """A page that needs no network: routes, request keys, answers."""
    found = document()
    rows = []
    for path, methods in found["paths"].items():
        for method, operation in methods.items():
            body = operation.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema", {}).get("$ref", "")
            keys = found["components"]["schemas"].get(body.rsplit("/", 1)[-1], {}).get("properties", {})
            rows.append(
                "<tr><td>%s</td><td><code>%s</code></td><td>%s</td></tr>"
                % (method.upper(), html.escape(path), ", ".join(sorted(keys)))
            )
    keys = ", ".join(sorted(found["components"]["schemas"]["GenerateParameters"]["properties"]))
    style = "body{font:16px sans-serif;margin:2em}td{padding:.2em 1em;vertical-align:top}"
    return (
        "<!doctype html><meta charset=utf-8><title>%s</title><style>%s</style><h1>%s</h1>"
        "<table><tr><th>method<th>path<th>keys of the body</tr>%s</table><p>Keys of <code>parameters</code>: %s."
        '<p>The whole description: <a href="/api-doc/openapi.json">openapi.json</a>' % (TAG, style, TAG, "".join(rows), keys)
    )
