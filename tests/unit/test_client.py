"""Our clients against byte streams written from the contract: 0.8 and 3.3, retries, deadlines, broken answers, every error kind."""

import asyncio
import json
import re
import threading

import pytest

pytest.importorskip("httpx", reason="the async client needs Python 3.10")
from serve import client as library  # noqa: E402
from serve import replies  # noqa: E402
from serve.client import AsyncClient, Client  # noqa: E402
from tests.contract.recorded import CHAT_33, OVERLOADED, STREAM_08, STREAM_33, WHOLE, Stub, cut, whole  # noqa: E402
from tests.free_port import free_port  # noqa: E402


class Sync:
    """One face for both clients: lists instead of iterators."""

    def __init__(self, url, **settings):
        self.made = (url, {"backoff": 0.01, "timeout": 10, **settings})

    def call(self, name, *args, **more):
        url, settings = self.made
        with Client(url, **settings) as client:
            found = getattr(client, name)(*args, **more)
            return list(found) if name.endswith("_stream") else found


class Async(Sync):
    def call(self, name, *args, **more):
        async def work():
            url, settings = self.made
            async with AsyncClient(url, **settings) as client:
                found = getattr(client, name)(*args, **more)
                return [one async for one in found] if name.endswith("_stream") else await found

        return asyncio.run(work())


both = pytest.mark.parametrize("kind", [Sync, Async])


@both
@pytest.mark.parametrize("stream, length", [(STREAM_33, 4), (STREAM_08, None)], ids=["3.3", "0.8"])
def test_streams_of_both_ages_in_pieces_of_any_size(kind, stream, length):
    with Stub(cut(stream), cut(stream, 1000)) as stub:
        pieces = kind(stub.url).call("generate_stream", "hello", max_new_tokens=3, stop=None)
        assert [piece.text for piece in pieces] == ["", "你", ""]
        last = pieces[-1]
        assert (last.generated_text, last.finish_reason, last.generated_tokens, last.seed) == ("你", "eos_token", 3, 7)
        assert last.input_length == length and pieces[1].token.logprob is None
        assert stub.seen[0] == ("/generate_stream", {"inputs": "hello", "parameters": {"details": True, "max_new_tokens": 3}}, None)
        assert kind(stub.url).call("generate_stream", "hello") == pieces


@both
def test_whole_answers_as_object_and_as_list(kind):
    with Stub(whole(WHOLE), whole(b"[" + WHOLE + b"]"), whole(b'{"generated_text":"x"}')) as stub:
        client = kind(stub.url, api_key="secret")
        made = client.call("generate", "hello")
        assert (made.text, made.finish_reason, made.generated_tokens, made.seed) == ("ab", "length", 2, 9)
        assert made.tokens[0] == library.Token(3, "a", -1.5) and made.prefill[0].logprob is None
        assert made.others[0].text == "cd"
        assert client.call("generate", "hello") == made
        assert client.call("generate", "hello").text == "x"
        assert stub.seen[0][2] == "Bearer secret"


@both
def test_chat_and_its_stream(kind):
    answer = {"model": "m", "choices": [{"index": 0, "message": {"role": "assistant", "content": "Hi"}, "finish_reason": "stop"}]}
    with Stub(whole(json.dumps(answer).encode()), cut(CHAT_33)) as stub:
        client = kind(stub.url)
        chat = client.call("chat", [{"role": "user", "content": "x"}], max_tokens=4)
        assert (chat.content, chat.finish_reason) == ("Hi", "stop")
        pieces = client.call("chat_stream", [{"role": "user", "content": "x"}])
        assert "".join(piece.text for piece in pieces) == "Hi" and pieces[-1].completion_tokens == 2
        assert stub.seen[0][1] == {"model": "tgi", "messages": [{"role": "user", "content": "x"}], "max_tokens": 4}
        assert stub.seen[1][1]["stream_options"] == {"include_usage": True}


@both
def test_tokens_of_a_prompt_and_of_a_conversation(kind):
    """The fallback tokenizer of 3.3 tells ids only; a server that answers something else is not believed."""
    listed = b'[{"id":1,"text":"<s>","start":0,"stop":0},{"id":9,"text":"hello","start":0,"stop":5}]'
    asked = [{"role": "user", "content": "hello"}]
    with Stub(whole(listed), whole(b'{"tokenize_response":%s,"templated_text":"<s>hello"}' % listed)) as stub:
        client = kind(stub.url)
        found = client.call("tokenize", "hello")
        assert found == (library.Place(1, "<s>", 0, 0), library.Place(9, "hello", 0, 5))
        assert client.call("chat_tokenize", asked) == library.Templated("<s>hello", found)
        assert stub.seen[0][:2] == ("/tokenize", {"inputs": "hello", "parameters": {}})
        assert stub.seen[1][:2] == ("/chat_tokenize", {"model": "tgi", "messages": asked})
    with Stub(whole(b'{"x":1}')) as stub:
        with pytest.raises(library.GenerationFailed, match="not a list of tokens"):
            kind(stub.url).call("tokenize", "hello")
        with pytest.raises(library.GenerationFailed, match="not a tokenized conversation"):
            kind(stub.url).call("chat_tokenize", asked)


@both
@pytest.mark.parametrize(
    "first",
    [
        whole(OVERLOADED, 429),
        whole(b'{"error":"unhealthy","error_type":"healthcheck"}', 503),
        whole(b"data: " + OVERLOADED + b"\n\n"),
    ],
    ids=["429", "503", "in the stream"],
)
def test_what_passes_is_tried_again(kind, first):
    with Stub(first, first, cut(STREAM_33)) as stub:
        assert kind(stub.url).call("generate_stream", "x")[-1].generated_text == "你"
        assert len(stub.seen) == 3
    with Stub(first) as stub:
        with pytest.raises((library.Overloaded, library.Unavailable)):
            kind(stub.url, retries=2).call("generate_stream", "x")
        assert len(stub.seen) == 3


@both
def test_a_server_that_is_not_there_yet(kind):
    port = free_port()
    made = []
    timer = threading.Timer(0.3, lambda: made.append(Stub(whole(WHOLE), port=port)))
    timer.start()
    try:
        assert kind("http://127.0.0.1:%d" % port, backoff=0.1).call("generate", "x").text == "ab"
    finally:
        timer.join()
        made[0].__exit__()
    with pytest.raises(library.Unreachable) as error:
        url = "http://127.0.0.1:%d" % free_port()
        kind(url, retries=0).call("generate", "x")
    assert str(error.value) == url + ": Connection refused"  # not the libraries' chain of exceptions


@both
def test_a_host_that_nobody_knows_and_a_server_without_tls_are_called_so(kind):
    """Their errors have numbers of their own, which the system has other words for."""
    with pytest.raises(library.Unreachable) as error:
        kind("http://nowhere.invalid:80", retries=0).call("generate", "x")
    assert re.match("http://nowhere.invalid:80: .*(not known|No address|[Nn]ame resolution)", str(error.value))
    with Stub(whole(WHOLE)) as stub, pytest.raises(library.Unreachable) as error:
        kind(stub.url.replace("http:", "https:"), retries=0).call("generate", "x")
    assert "SSL" in str(error.value) or "TLS" in str(error.value)


def test_a_web_page_is_not_shown():
    error = replies.error_of(501, b"<!DOCTYPE HTML>\n<html>...")
    assert str(error) == "an HTML page with code 501; is this another server's port?"


@both
@pytest.mark.parametrize(
    "status, body, error, text",
    [
        (422, b'{"error":"Input validation error: x","error_type":"validation"}', library.Invalid, "Input validation error: x"),
        (422, b'{"error":"Template error: x","error_type":"template_error"}', library.Invalid, "Template error: x"),
        (422, b"Failed to deserialize", library.Invalid, "Failed to deserialize"),
        (400, b"Failed to parse", library.Invalid, "Failed to parse"),
        (415, b"Expected request", library.Invalid, "Expected request"),
        (424, b'{"error":"Request failed","error_type":"generation"}', library.GenerationFailed, "Request failed"),
        (500, b'{"error":"Incomplete generation","error_type":"incomplete_generation"}', library.GenerationFailed, "Incomplete"),
        (401, b"", library.Unauthorized, "the server answered 401 without a text"),
        (404, b"", library.NotFound, "404"),
        (500, b"oops", library.ClientError, "oops"),
        (404, b"<html>not here", library.NotFound, "an HTML page with code 404; is this another server's port?"),
        (200, b"<html>", library.GenerationFailed, "the answer is no JSON: <html>"),
        (200, b'{"x":1}', library.GenerationFailed, "not an answer of a text generation server"),
        (200, b"[]", library.GenerationFailed, "not an answer of a text generation server"),
    ],
)
def test_errors_keep_the_servers_words(kind, status, body, error, text):
    with Stub(whole(body, status)) as stub:
        with pytest.raises(error) as caught:
            kind(stub.url).call("generate", "x")
        # a route that is not there: looked at once, whether it is a server with other routes
        looks = ["/v1/models", "/version"] if status == 404 else []
        assert text in str(caught.value) and [path for path, *_ in stub.seen] == ["/generate"] + looks
        assert type(caught.value) is error and caught.value.status in (status, None)


@both
def test_errors_inside_streams(kind):
    begun = STREAM_33[: STREAM_33.index(b":\n\n")]
    failure = b'data: {"error":"Incomplete generation stream","error_type":"incomplete_generation_stream"}\n\n'
    openai = b'data: {"error":{"message":"Input validation error: y","http_status_code":422}}\n\ndata: [DONE]\n\n'
    with Stub(cut(begun + failure), cut(begun), cut(openai), cut(b"data: [1]\n\n")) as stub:
        client = kind(stub.url)
        with pytest.raises(library.GenerationFailed, match="Incomplete generation stream"):
            client.call("generate_stream", "x")
        with pytest.raises(library.GenerationFailed, match="the stream ended before the answer did"):
            client.call("generate_stream", "x")
        with pytest.raises(library.Invalid, match="Input validation error: y"):
            client.call("chat_stream", [])
        with pytest.raises(library.GenerationFailed, match="no JSON object"):
            client.call("generate_stream", "x")
        assert len(stub.seen) == 4  # nothing is repeated once a stream has begun, or is refused


@both
def test_events_of_another_kind_are_named(kind):
    for event in (b'{"x":1}', b'{"token":{}}', b'{"token":3}'):
        with Stub(cut(b"data: " + event + b"\n\n")) as stub:
            with pytest.raises(library.GenerationFailed, match="not an answer of a text generation server"):
                kind(stub.url).call("generate_stream", "x")


@both
def test_health_and_info(kind):
    with Stub(whole(b""), whole(b'{"model_id":"m"}'), whole(b"{}", 503)) as stub:
        client = kind(stub.url + "/")
        assert client.call("health") is True and client.call("info") == {"model_id": "m"} and client.call("health") is False
        assert [path for path, _, _ in stub.seen] == ["/health", "/info", "/health"]


def test_results_cannot_be_changed():
    with Stub(whole(WHOLE)) as stub:
        made = Sync(stub.url).call("generate", "x")
    with pytest.raises(AttributeError):
        made.text = "other"


@both
@pytest.mark.parametrize("method, name, text", [
    ("generate", "tempreature", "no parameter tempreature here; did you mean temperature? (there are "),
    ("generate", "max_tokens", "no parameter max_tokens here; did you mean max_new_tokens? (there are "),
    ("chat", "max_new_tokens", "no parameter max_new_tokens here; did you mean max_tokens? (there are "),
    ("chat", "return_full_text", "no parameter return_full_text here (there are "),
])  # fmt: skip
def test_a_parameter_that_the_server_would_pass_over_is_refused(kind, method, name, text):
    prompt = "hello" if method == "generate" else [{"role": "user", "content": "hello"}]
    with pytest.raises(TypeError, match="^" + re.escape(text)):
        kind("http://127.0.0.1:9").call(method, prompt, **{name: 1})


def test_a_parameter_that_is_like_none_is_sent():
    with Stub(whole(WHOLE)) as stub:
        Sync(stub.url).call("generate", "hello", min_p=0.1)
        assert stub.seen[0][1]["parameters"]["min_p"] == 0.1


@pytest.mark.parametrize("client", [Client, AsyncClient])
def test_no_time_at_all_is_refused(client):
    for seconds in (0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="timeout .*: expected seconds, more than 0"):
            client("http://127.0.0.1:9", timeout=seconds)
