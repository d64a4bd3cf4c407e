"""The wire as curl sees it, byte by byte."""

import json

import pytest

BASE = {"max_new_tokens": 4}


def spelled(logprob):
    return json.dumps(logprob)


def test_generate_is_one_object(server, model):
    status, kind, body = server.curl("/generate", body={"inputs": "Hello", "parameters": BASE})
    assert (status, kind) == (200, "application/json")
    assert body == json.dumps({"generated_text": model.text("Hello", 4)}, ensure_ascii=False, separators=(",", ":")).encode()


def test_the_compatible_route_is_a_list_of_one_and_can_stream(server, model):
    _, _, body = server.curl("/", body={"inputs": "Hello", "parameters": BASE})
    assert json.loads(body) == [{"generated_text": model.text("Hello", 4)}]
    _, kind, stream = server.curl("/", body={"inputs": "Hello", "parameters": BASE, "stream": True})
    assert (
        kind == "text/event-stream" and stream == server.curl("/generate_stream", body={"inputs": "Hello", "parameters": BASE})[2]
    )
    _, kind, _ = server.curl("/generate", body={"inputs": "Hello", "parameters": BASE, "stream": True})
    assert kind == "application/json"  # there the key is ignored


def test_stream_bytes(server, model):
    status, kind, body = server.curl("/generate_stream", body={"inputs": "Where it ends", "parameters": {"details": True}})
    assert (status, kind) == (200, "text/event-stream")
    ids = model.tokens("Where it ends", 7)
    expected, texts = b"", []
    for index, (one, event) in enumerate(zip(ids, body.split(b"\n\n")), start=1):
        assert event.startswith(b"data: {")
        token = json.loads(event[6:])["token"]
        texts.append(token["text"])
        end = index == len(ids)
        details = '{"finish_reason":"eos_token","generated_tokens":7,"seed":null,"input_length":%d}'
        expected += (
            'data: {"index":%d,"token":{"id":%d,"text":%s,"logprob":%s,"special":false},"generated_text":%s,"details":%s}\n\n'
            % (
                index,
                one,
                json.dumps(token["text"], ensure_ascii=False),
                spelled(token["logprob"]),
                json.dumps(model.text("Where it ends", 7), ensure_ascii=False) if end else "null",
                details % len(model.tokenizer("Where it ends")["input_ids"]) if end else "null",
            )
        ).encode()
    assert body == expected
    assert "".join(texts) == model.text("Where it ends", 7)


def test_headers(server):
    answer = server.curl("/generate", "-i", body={"inputs": "Hello", "parameters": BASE})[2].decode().lower()
    head = answer.split("\r\n\r\n")[0]
    names = [line.split(":")[0] for line in head.split("\r\n")[1:]]
    for name in (
        "x-compute-type x-compute-time x-compute-characters x-total-time x-validation-time x-queue-time x-inference-time"
        " x-time-per-token x-prompt-tokens x-generated-tokens"
    ).split():
        assert name in names
    assert "x-compute-characters: 5" in head and "x-generated-tokens: 4" in head and "server" not in names
    stream = server.curl("/generate_stream", "-i", body={"inputs": "Hello", "parameters": BASE})[2].decode().lower()
    assert "cache-control: no-cache\r\n" in stream and "x-accel-buffering: no\r\n" in stream and "x-compute-characters: 5" in stream


@pytest.mark.parametrize(
    "path, args, status, kind, text",
    [
        ("/generate", ["-d", "{}", "-H", "Content-Type: application/json"], 422, "text/plain; charset=utf-8",
         "Failed to deserialize the JSON body into the target type: missing field `inputs` at line 1 column 2"),
        ("/generate_stream", ["-d", '{"inputs"', "-H", "Content-Type: application/json"], 400, "text/plain; charset=utf-8",
         "Failed to parse the request body as JSON: EOF while parsing an object at line 1 column 9"),
        ("/generate", ["-d", '{"inputs":"a"}'], 415, "text/plain; charset=utf-8",
         "Expected request with `Content-Type: application/json`"),
        ("/generate", ["-d", '{"inputs":"a"}', "-H", "Content-Type: application/x+json", "-G"], 405, "", ""),
        ("/nowhere", [], 404, "", ""),
        ("/generate/", ["-d", "{}"], 404, "", ""),
        ("/info", ["-X", "POST"], 405, "", ""),
        ("/health", [], 200, "", ""),
        ("/ping", [], 200, "", ""),
        ("/", [], 200, "", ""),
    ],
)  # fmt: skip
def test_codes_and_plain_texts(server, path, args, status, kind, text):
    assert server.curl(path, *args) == (status, kind, text.encode())


def test_json_errors_and_their_place(server):
    wrong = {"inputs": "Hello", "parameters": {"temperature": 0}}
    document = b'{"error":"Input validation error: `temperature` must be strictly positive","error_type":"validation"}'
    assert server.curl("/generate", body=wrong) == (422, "application/json", document)
    assert server.curl("/", body=wrong) == (422, "application/json", document)
    assert server.curl("/generate_stream", body=wrong) == (200, "text/event-stream", b"data: " + document + b"\n\n")
    assert server.curl("/", body={**wrong, "stream": True}) == (200, "text/event-stream", b"data: " + document + b"\n\n")


@pytest.mark.parametrize(
    "parameters, text",
    [
        ({"best_of": 3, "do_sample": True}, "`best_of` must be > 0 and <= 2. Given: 3"),
        ({"best_of": 2}, "you must use sampling when `best_of` is > 1"),
        ({"truncate": 4096}, "`truncate` must be strictly positive and less than 4095. Given: 4096"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "`stop` supports up to 4 stop sequences. Given: 5"),
        ({"top_n_tokens": 6}, "`top_n_tokens` must be >= 0 and <= 5. Given: 6"),
        ({"watermark": True}, "watermark is not supported"),
        ({"grammar": {"type": "json", "value": {"properties": {}}}}, "grammar is not supported"),
        ({"adapter_id": "x"}, "adapter_id is not supported"),
    ],
)
def test_refused_parameters(server, parameters, text):
    status, _, body = server.curl("/generate", body={"inputs": "Hello", "parameters": parameters})
    assert status == 422 and json.loads(body) == {"error": "Input validation error: " + text, "error_type": "validation"}


def test_refused_in_streams(server):
    for parameters, text in [
        ({"best_of": 2}, "`best_of` != 1"),
        ({"decoder_input_details": True}, "`decoder_input_details` == true"),
    ]:
        _, _, body = server.curl("/generate_stream", body={"inputs": "Hello", "parameters": parameters})
        assert json.loads(body[6:])["error"] == "Input validation error: %s is not supported when streaming tokens" % text


def test_details_and_their_order(server, model):
    parameters = {**BASE, "details": True, "decoder_input_details": True, "top_n_tokens": 2}
    body = json.loads(server.curl("/generate", body={"inputs": "Hello", "parameters": parameters})[2])
    details = body["details"]
    assert list(body) == ["generated_text", "details"]
    assert list(details) == ["finish_reason", "generated_tokens", "seed", "prefill", "tokens", "top_tokens"]
    assert [one["id"] for one in details["tokens"]] == model.tokens("Hello", 4) and details["seed"] is None
    assert [one["id"] for one in details["prefill"]] == model.tokenizer("Hello")["input_ids"]
    assert details["prefill"][0]["logprob"] is None and all(one["logprob"] < 0 for one in details["prefill"][1:])
    assert list(details["tokens"][0]) == ["id", "text", "logprob", "special"] and list(details["prefill"][0]) == [
        "id",
        "text",
        "logprob",
    ]
    assert [len(top) for top in details["top_tokens"]] == [2] * 4
    assert [top[0]["id"] for top in details["top_tokens"]] == model.tokens("Hello", 4)


def test_sampling_without_parameters_and_greedy_with_an_empty_object(server, model):
    greedy = [server.curl("/", body={"inputs": "Where it ends", "parameters": {}})[2] for _ in range(2)]
    assert json.loads(greedy[0])[0]["generated_text"] == model.text("Where it ends", 7) and greedy[0] == greedy[1]
    sampled = {server.curl("/", body={"inputs": "Where it ends"})[2] for _ in range(2)}
    assert len(sampled) == 2


def test_all_parameters_together(server):
    parameters = {"max_new_tokens": 10, "repetition_penalty": 1.2, "return_full_text": True, "stop": ["test"], "temperature": 0.5,
                  "top_p": 0.9, "top_k": 10, "truncate": 5, "typical_p": 0.9, "seed": 0, "details": True,
                  "decoder_input_details": True, "frequency_penalty": 0.1}  # fmt: skip
    asked = {"inputs": "A prompt of more than five tokens", "parameters": parameters}
    first, second = (json.loads(server.curl("/generate", body=asked)[2]) for _ in range(2))
    assert first == second and first["generated_text"].startswith("A prompt of more than five tokens")
    assert len(first["details"]["prefill"]) == 5 and first["details"]["seed"] == 0


def test_best_of(server):
    asked = {"inputs": "Hello", "parameters": {**BASE, "best_of": 2, "do_sample": True, "details": True}}
    details = json.loads(server.curl("/generate", body=asked)[2])["details"]
    (other,) = details["best_of_sequences"]
    assert details["seed"] != other["seed"] and list(details)[5] == "best_of_sequences"
    assert list(other) == ["generated_text", "finish_reason", "generated_tokens", "seed", "prefill", "tokens"]
    mean = [sum(token["logprob"] for token in one["tokens"]) / 4 for one in (details, other)]
    assert mean[0] >= mean[1]


def test_stop_text_is_kept(server, model):
    asked = {"inputs": model.endless, "parameters": {"details": True, "max_new_tokens": 40}}
    tokens = json.loads(server.curl("/generate", body=asked)[2])["details"]["tokens"]
    place = next(number for number, token in enumerate(tokens) if number > 5 and len(token["text"]) > 1)
    asked["parameters"]["stop"] = ["never", "".join(token["text"] for token in tokens[: place + 1])[-3:]]
    found = json.loads(server.curl("/generate", body=asked)[2])
    assert found["details"]["finish_reason"] == "stop_sequence" and found["generated_text"].endswith(asked["parameters"]["stop"][1])
    assert [one["id"] for one in found["details"]["tokens"]] == [one["id"] for one in tokens][: len(found["details"]["tokens"])]


def test_tokenize(server, model):
    body = json.loads(server.curl("/tokenize", body={"inputs": "Hello 你"})[2])
    assert [one["id"] for one in body] == model.tokenizer("Hello 你")["input_ids"]
    assert body[0] == {"id": model.tokenizer.bos_token_id, "text": "", "start": 0, "stop": 0}
    assert body[-1]["stop"] == 7 and "".join(one["text"] for one in body).startswith("Hello ")


def test_chat_tokenize_has_no_second_bos(server, model):
    messages = [{"role": "user", "content": "hi"}]
    body = json.loads(server.curl("/chat_tokenize", body={"messages": messages})[2])
    assert body["templated_text"] == model.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert [one["id"] for one in body["tokenize_response"]] == model.tokenizer(body["templated_text"], add_special_tokens=False)[
        "input_ids"
    ]


def test_info_models_docs_and_metrics(server, model):
    info = json.loads(server.curl("/info")[2])
    keys = "model_id model_sha model_pipeline_tag max_concurrent_requests max_best_of max_stop_sequences max_input_tokens"
    keys += " max_total_tokens validation_workers max_client_batch_size router version sha docker_label"
    assert list(info)[:14] == keys.split()
    assert info["model_id"] == model.path and info["max_input_tokens"] == info["max_input_length"] == 4095
    assert info["model_dtype"] == "torch.float32" and info["model_device_type"] in ("cpu", "cuda")
    models = json.loads(server.curl("/v1/models")[2])
    assert models == {"object": "list", "data": [{"id": model.path, "object": "model", "created": 0, "owned_by": model.path}]}
    status, kind, page = server.curl("/docs")
    assert (status, kind) == (200, "text/html; charset=utf-8") and b"/generate_stream" in page and b"://" not in page
    server.curl("/generate", body={"inputs": "Hello", "parameters": BASE})
    status, kind, text = server.curl("/metrics")
    assert (status, kind) == (200, "text/plain; charset=utf-8")
    for name in (
        b"\ntgi_request_count ", b"\ntgi_request_success ", b'\ntgi_batch_inference_count{method="decode"} ',
        b'\ntgi_request_duration_bucket{le="0.00015"} ', b'\ntgi_batch_next_size_bucket{le="1024.0"} ', b"\ntgi_queue_size ",
        b"\n# TYPE tgi_request_count counter", b"\n# TYPE tgi_request_generated_tokens histogram",
    ):  # fmt: skip
        assert name in text, name
    assert b"_created" not in text and b"count_total" not in text


def test_invocations_takes_all_three_bodies(server):
    for body, key in [
        ({"inputs": "Hello", "parameters": BASE}, "generated_text"),
        ({"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}, "choices"),
        ({"prompt": "hi", "max_tokens": 2}, "choices"),
    ]:
        found = json.loads(server.curl("/invocations", body=body)[2])
        assert key in (found[0] if isinstance(found, list) else found)
    status, _, text = server.curl("/invocations", body={"x": 1})
    assert status == 422 and b"did not match any variant of untagged enum SagemakerRequest" in text
