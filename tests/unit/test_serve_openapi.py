"""The OpenAPI document says nothing that text-generation-inference 3.3's own does not say: its facts, copied here."""

import pytest

pytest.importorskip("starlette", reason="the embedded server needs Python 3.10")
from serve.embedded import openapi  # noqa: E402

ROUTES = {  # path -> method, operationId, codes
    "/": "post compat_generate 200 422 424 429 500",
    "/chat_tokenize": "post get_chat_tokenize 200 404",
    "/generate": "post generate 200 422 424 429 500",
    "/generate_stream": "post generate_stream 200 422 424 429 500",
    "/health": "get health 200 503",
    "/info": "get get_model_info 200",
    "/invocations": "post sagemaker_compatibility 200 422 424 429 500",
    "/metrics": "get metrics 200",
    "/tokenize": "post tokenize 200 404",
    "/v1/chat/completions": "post chat_completions 200 422 424 429 500",
    "/v1/completions": "post completions 200 422 424 429 500",
    "/v1/models": "get openai_get_model_info 200 404",
}

FACTS = {  # schema -> key:type, * required, ? may be null, @ another schema, [] a list
    "BestOfSequence": (
        "*finish_reason:@FinishReason *generated_text:string *generated_tokens:integer/int32 "
        "*prefill:[@PrefillToken] seed:integer/int64? *tokens:[@Token] top_tokens:[[@Token]]"
    ),
    "ChatCompletion": (
        "*choices:[@ChatCompletionComplete] *created:integer/int64 *id:string *model:string "
        "*system_fingerprint:string *usage:@Usage"
    ),
    "ChatCompletionChoice": (
        "*delta:@ChatCompletionDelta finish_reason:string? *index:integer/int32 logprobs:@ChatCompletionLogprobs?"
    ),
    "ChatCompletionChunk": (
        "*choices:[@ChatCompletionChoice] *created:integer/int64 *id:string *model:string *system_fingerprint:string usage:@Usage?"
    ),
    "ChatCompletionComplete": (
        "*finish_reason:string *index:integer/int32 logprobs:@ChatCompletionLogprobs? *message:@OutputMessage"
    ),
    "ChatCompletionLogprob": "*logprob:number/float *token:string *top_logprobs:[@ChatCompletionTopLogprob]",
    "ChatCompletionLogprobs": "*content:[@ChatCompletionLogprob]",
    "ChatCompletionTopLogprob": "*logprob:number/float *token:string",
    "ChatRequest": (
        "frequency_penalty:number/float? logit_bias:[number/float]? logprobs:boolean? "
        "max_tokens:integer/int32? *messages:[@Message] model:string? n:integer/int32? "
        "presence_penalty:number/float? response_format:@GrammarType? seed:integer/int64? stop:[string]? "
        "stream:boolean stream_options:@StreamOptions? temperature:number/float? tool_choice:@ToolChoice? "
        "tool_prompt:string? tools:[@Tool]? top_logprobs:integer/int32? top_p:number/float?"
    ),
    "ChatTokenizeResponse": "*templated_text:string *tokenize_response:@TokenizeResponse",
    "Chunk": ("*choices:[@CompletionComplete] *created:integer/int64 *id:string *model:string *system_fingerprint:string"),
    "CompatGenerateRequest": "*inputs:string parameters:@GenerateParameters stream:boolean",
    "CompletionComplete": "*finish_reason:string *index:integer/int32 logprobs:[number/float]? *text:string",
    "CompletionFinal": (
        "*choices:[@CompletionComplete] *created:integer/int64 *id:string *model:string *system_fingerprint:string *usage:@Usage"
    ),
    "CompletionRequest": (
        "frequency_penalty:number/float? max_tokens:integer/int32? model:string? *prompt:@Prompt "
        "repetition_penalty:number/float? seed:integer/int64? stop:[string]? stream:boolean suffix:string? "
        "temperature:number/float? top_p:number/float?"
    ),
    "Details": (
        "best_of_sequences:[@BestOfSequence]? *finish_reason:@FinishReason *generated_tokens:integer/int32 "
        "*prefill:[@PrefillToken] seed:integer/int64? *tokens:[@Token] top_tokens:[[@Token]]"
    ),
    "ErrorResponse": "*error:string *error_type:string",
    "GenerateParameters": (
        "adapter_id:string? best_of:integer? decoder_input_details:boolean details:boolean do_sample:boolean "
        "frequency_penalty:number/float? grammar:@GrammarType? max_new_tokens:integer/int32? "
        "repetition_penalty:number/float? return_full_text:boolean? seed:integer/int64? stop:[string] "
        "temperature:number/float? top_k:integer/int32? top_n_tokens:integer/int32? top_p:number/float? "
        "truncate:integer? typical_p:number/float? watermark:boolean"
    ),
    "GenerateRequest": "*inputs:string parameters:@GenerateParameters",
    "GenerateResponse": "details:@Details? *generated_text:string",
    "Info": (
        "docker_label:string? *max_best_of:integer *max_client_batch_size:integer "
        "*max_concurrent_requests:integer *max_input_tokens:integer *max_stop_sequences:integer "
        "*max_total_tokens:integer *model_id:string model_pipeline_tag:string? model_sha:string? "
        "*router:string sha:string? *validation_workers:integer *version:string"
    ),
    "ModelInfo": "*created:integer/int64 *id:string *object:string *owned_by:string",
    "PrefillToken": "*id:integer/int32 *logprob:number/float? *text:string",
    "SimpleToken": "*id:integer/int32 *start:integer *stop:integer *text:string",
    "StreamDetails": (
        "*finish_reason:@FinishReason *generated_tokens:integer/int32 *input_length:integer/int32 seed:integer/int64?"
    ),
    "StreamOptions": "include_usage:boolean",
    "StreamResponse": ("details:@StreamDetails? generated_text:string? *index:integer/int32 *token:@Token top_tokens:[@Token]"),
    "TextMessage": "*content:string *role:string tool_call_id:string?",
    "Token": "*id:integer/int32 *logprob:number/float? *special:boolean *text:string",
    "Usage": "*completion_tokens:integer/int32 *prompt_tokens:integer/int32 *total_tokens:integer/int32",
}

DOCUMENT = openapi.document()


def signature(schema):
    if "$ref" in schema:
        found = "@" + schema["$ref"].rsplit("/", 1)[-1]
    elif "allOf" in schema:
        found = signature(schema["allOf"][0])
    elif schema.get("type") == "array":
        found = "[%s]" % signature(schema["items"])
    else:
        found = schema["type"] + ("/" + schema["format"] if "format" in schema else "")
    return found + ("?" if schema.get("nullable") else "")


@pytest.mark.parametrize("path", sorted(DOCUMENT["paths"]))
def test_every_route_is_one_of_its(path):
    ((method, operation),) = DOCUMENT["paths"][path].items()
    wanted, name, *codes = ROUTES[path].split()
    assert (method, operation["operationId"]) == (wanted, name) and set(operation["responses"]) <= set(codes)


def test_all_its_routes_are_there():
    assert set(DOCUMENT["paths"]) == set(ROUTES)


@pytest.mark.parametrize(
    "name", sorted(name for name, schema in DOCUMENT["components"]["schemas"].items() if "properties" in schema)
)
def test_every_body_is_a_part_of_its(name):
    schema = DOCUMENT["components"]["schemas"][name]
    facts = dict(fact.split(":") for fact in FACTS[name].split())
    required = {key[1:] for key in facts if key.startswith("*")}
    assert set(schema.get("required", [])) == required
    for key, value in schema["properties"].items():
        assert signature(value) == facts.get(key) or facts["*" + key] == signature(value), key


def test_references_lead_somewhere():
    def references(node):
        if isinstance(node, dict):
            yield from ([node["$ref"].rsplit("/", 1)[-1]] if "$ref" in node else [])
            node = list(node.values())
        for child in node if isinstance(node, list) else []:
            yield from references(child)

    assert set(references(DOCUMENT)) <= set(DOCUMENT["components"]["schemas"])


def test_the_page_lists_every_route():
    page = openapi.page()
    assert all("<code>%s</code>" % path in page for path in DOCUMENT["paths"]) and "repetition_penalty" in page
