"""Our clients and vLLM: they notice, say so once, and give the same types from its OpenAI routes."""

import pytest

pytest.importorskip("httpx", reason="the async client needs Python 3.10")
from serve import client as library  # noqa: E402
from serve.client import Client  # noqa: E402
from tests.contract import recorded  # noqa: E402
from tests.contract.recorded import Stub, cut, whole  # noqa: E402
from tests.unit.test_client import both  # noqa: E402

USER = [{"role": "user", "content": "x"}]


def vllm(completion, chat=None, **more):
    """A stub with vLLM's routes; ``completion`` answers /v1/completions."""
    routes = {
        "/v1/models": whole(recorded.VLLM_MODELS),
        "/version": whole(recorded.VLLM_VERSION),
        "/tokenize": whole(recorded.VLLM_TOKENS),
        "/v1/completions": completion,
    }
    if chat:
        routes["/v1/chat/completions"] = lambda body: chat if body["model"] == "my-model" else whole(recorded.VLLM_NO_MODEL, 404)
    return Stub(whole(recorded.VLLM_NO_ROUTE, 404), routes={**routes, **more})


def bodies(stub, path):
    return [body for seen, body, _ in stub.seen if seen == path]


@both
def test_a_whole_answer(kind):
    said = []
    with vllm(whole(recorded.VLLM_WHOLE)) as stub:
        client = kind(stub.url, say=said.append)
        made = client.call("generate", "x", max_new_tokens=5, stop=[" b"], top_n_tokens=1, decoder_input_details=True)
        assert (made.text, made.finish_reason, made.generated_tokens, made.seed) == ("a b", "stop_sequence", 2, None)
        assert made.tokens == (library.Token(3, "a", -1.5), library.Token(4, " b", 0.0))
        assert made.top_tokens == ((library.Token(-1, "a", -1.5),), (library.Token(-1, " b", 0.0),))
        assert made.prefill == (library.Token(1, "", None), library.Token(5, "x", -0.25))
        assert said == [stub.url + ": vLLM 0.11.0, which has no /generate; asked through its /v1 routes"]
        assert [path for path, *_ in stub.seen] == ["/generate", "/v1/models", "/version", "/v1/completions"]
        assert stub.seen[-1][1] == {
            "model": "my-model", "prompt": "x", "max_tokens": 5, "temperature": 0, "stop": [" b"],
            "include_stop_str_in_output": True, "logprobs": 1, "return_token_ids": True, "prompt_logprobs": 0,
        }  # fmt: skip
    with vllm(whole(recorded.VLLM_OLD_WHOLE)) as stub:
        made = kind(stub.url + "/v1").call("generate", "x", max_new_tokens=1, details=False, return_full_text=True)
        assert (made.text, made.finish_reason, made.generated_tokens, made.tokens) == ("xa", "length", 1, ())
        assert "logprobs" not in stub.seen[-1][1]


@both
@pytest.mark.parametrize("size", [7, 5000])
def test_a_stream(kind, size):
    with vllm(cut(recorded.VLLM_STREAM, size)) as stub:
        pieces = kind(stub.url).call("generate_stream", "x", max_new_tokens=5)
        assert [piece.text for piece in pieces] == ["你", " so", ""]
        assert [piece.token.id for piece in pieces] == [6, -1, 2] and pieces[0].token.logprob == -0.5
        last = pieces[-1]
        assert (last.generated_text, last.finish_reason, last.generated_tokens, last.input_length) == ("你 so", "eos_token", 4, 2)
        assert stub.seen[-1][1]["stream"] is True and stub.seen[-1][1]["stream_options"] == {"include_usage": True}
    with vllm(cut(recorded.VLLM_STREAM[: recorded.VLLM_STREAM.index(b'"stop"') - 200])) as stub:
        with pytest.raises(library.GenerationFailed, match="the stream ended before the answer did"):
            kind(stub.url).call("generate_stream", "x", max_new_tokens=5)


@both
def test_without_a_limit_the_answer_may_fill_the_context(kind):
    """vLLM would stop after 16 tokens; its /tokenize says how many the prompt leaves."""
    with vllm(whole(recorded.VLLM_OLD_WHOLE)) as stub:
        kind(stub.url).call("generate", "x")
        assert bodies(stub, "/tokenize") == [{"model": "my-model", "prompt": "x"}] and stub.seen[-1][1]["max_tokens"] == 96
    with vllm(whole(recorded.VLLM_OLD_WHOLE), **{"/tokenize": whole(recorded.VLLM_NO_ROUTE, 404)}) as stub:
        kind(stub.url).call("generate", "x")
        assert "max_tokens" not in stub.seen[-1][1]


@both
def test_chat(kind):
    """The route is the same, the model's name is not."""
    answer = b'{"choices":[{"index":0,"message":{"role":"assistant","content":"Hi"},"finish_reason":"stop"}],"model":"my-model"}'
    with vllm(whole(b""), chat=whole(answer)) as stub:
        assert kind(stub.url).call("chat", USER, max_tokens=3).content == "Hi"
        assert stub.seen[-1][1] == {"model": "my-model", "messages": USER, "max_tokens": 3}
    with vllm(whole(b""), chat=cut(recorded.VLLM_CHAT)) as stub:
        pieces = kind(stub.url).call("chat_stream", USER)
        assert "".join(piece.text for piece in pieces) == "Hi" and pieces[-1].completion_tokens == 2


@both
def test_tokens(kind):
    """Its /tokenize wants another body and refuses ours."""

    def tokenize(body):
        known = body.get("model") == "my-model"
        return whole(recorded.VLLM_TOKENS) if known else whole(b'{"detail":[{"msg":"Field required"}]}', 422)

    with vllm(whole(b""), **{"/tokenize": tokenize}) as stub:
        ids = tuple(library.Place(one) for one in (1, 5, 6, 7))
        assert kind(stub.url).call("tokenize", "x") == ids
        assert stub.seen[-1][1] == {"model": "my-model", "prompt": "x", "add_special_tokens": True}
        assert kind(stub.url).call("chat_tokenize", USER + [{"role": "assistant", "content": "y"}]) == library.Templated("", ids)
        assert (stub.seen[-1][1]["add_generation_prompt"], stub.seen[-1][1]["continue_final_message"]) == (False, True)
    refuses = {"/tokenize": whole(b"Failed to deserialize", 422), "/v1/models": whole(recorded.VLLM_MODELS)}
    with Stub(whole(b"", 404), routes=refuses) as stub:  # 3.3 lists models, too, and is not vLLM
        with pytest.raises(library.Invalid, match="Failed to deserialize"):
            kind(stub.url).call("tokenize", "x")


@both
def test_sampling_means_what_it_means_at_tgi(kind):
    """vLLM takes what is not said from generation_config.json."""
    neutral = {"temperature": 1.0, "top_k": -1, "top_p": 1.0, "repetition_penalty": 1.0}
    for asked, sent in [
        ({}, {"temperature": 0}),
        ({"temperature": 1.0, "seed": 5}, {"temperature": 0, "seed": 5}),
        ({"do_sample": True}, neutral),
        ({"top_p": 0.5, "seed": 5}, {**neutral, "top_p": 0.5, "seed": 5}),
        ({"temperature": 0.5, "repetition_penalty": 1.5, "truncate": 7, "watermark": False, "best_of": 1},
         {**neutral, "temperature": 0.5, "repetition_penalty": 1.5, "truncate_prompt_tokens": 7}),
    ]:  # fmt: skip
        with vllm(whole(recorded.VLLM_OLD_WHOLE)) as stub:
            made = kind(stub.url).call("generate", "x", max_new_tokens=1, details=False, **asked)
            fixed = {"model": "my-model", "prompt": "x", "max_tokens": 1, "include_stop_str_in_output": True}
            assert stub.seen[-1][1] == {**fixed, **sent}
            assert made.seed == (asked.get("seed") if sent["temperature"] else None)


@both
def test_what_it_lacks_is_refused_before_it_is_ignored(kind):
    with vllm(whole(recorded.VLLM_WHOLE)) as stub:
        for name, value in (("typical_p", 0.5), ("best_of", 2), ("watermark", True), ("grammar", {"type": "json", "value": "{}"})):
            with pytest.raises(library.Invalid, match="vLLM has no %s; leave it out" % name):
                kind(stub.url).call("generate", "x", do_sample=True, **{name: value})
        assert not bodies(stub, "/v1/completions")


@both
@pytest.mark.parametrize("body, status", [(recorded.VLLM_TOO_LONG, 400), (recorded.VLLM_OLD_TOO_LONG, 400)])
def test_its_errors(kind, body, status):
    with vllm(whole(body, status)) as stub:
        with pytest.raises(library.Invalid, match="This model's maximum context length is 100 tokens"):
            kind(stub.url).call("generate", "x", max_new_tokens=1)
    with vllm(cut(b"data: " + body + b"\n\ndata: [DONE]\n\n")) as stub:
        with pytest.raises(library.Invalid, match="maximum context length"):
            kind(stub.url).call("generate_stream", "x", max_new_tokens=1)
    with vllm(whole(b'{"error":"Unauthorized"}', 401)) as stub:
        with pytest.raises(library.Unauthorized, match="^Unauthorized$"):
            kind(stub.url).call("generate", "x", max_new_tokens=1)


def test_a_server_that_is_neither():
    with Stub(whole(recorded.VLLM_NO_ROUTE, 404)) as stub:
        with pytest.raises(library.NotFound, match="Not Found"):
            Client(stub.url).generate("x")
        assert [path for path, *_ in stub.seen] == ["/generate", "/v1/models", "/version"]
    with vllm(whole(b"{}", 404)) as stub:  # looked at once, not for ever
        with pytest.raises(library.NotFound):
            Client(stub.url).generate("x", max_new_tokens=1)
        assert len(bodies(stub, "/v1/completions")) == 1


def test_strange_answers_are_named():
    for answer in (b'{"choices":[]}', b'{"choices":[{}]}', b"[]", b"3"):
        with vllm(whole(answer)) as stub:
            with pytest.raises(library.GenerationFailed, match="not an answer of a text generation server"):
                Client(stub.url).generate("x", max_new_tokens=1)
