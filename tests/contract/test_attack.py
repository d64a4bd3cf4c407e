"""Whatever is sent: never a 5xx, never a failed generation, never a dead server, and the others' answers stay what they are."""

import json
import socket
import sys
import threading

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from serve.client import Client
from serve.embedded import openapi, params
from tests.contract.conftest import Served

REFUSALS = (400, 413, 415, 422)
POSTS = [post[0] for post in openapi.POSTS]
OFTEN = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}
NUMBERS = [
    *(
        "0",
        "-0.0",
        "-1",
        "1",
        "0.5",
        "1e-400",
        "1e-300",
        "5e-324",
        "1e38",
        "4e38",
        "1e300",
        "1e400",
        "NaN",
        "Infinity",
        "-Infinity",
    ),
    *("2147483648", "4294967295", "18446744073709551615", "18446744073709551616", "9" * 400, "9" * 5000, "1E5", "01", "1.", "+1"),
]
TEXTS = [
    "",
    "\x00",
    "\u0001\u001b[2J",
    "\u202e\ufeff\uffff",
    "\U0010ffff",
    "e\u0301" * 50,
    "<s></s><|im_end|>",
    "{{ 1/0 }}",
    "a" * 1000,
]
SPELLED = st.sampled_from(
    NUMBERS + [json.dumps(text) for text in TEXTS] + ['"\\ud800"', '"\\udc00\\ud800"', "null", "true", "[]", "{}"]
)


@pytest.fixture(scope="module")
def attacked(model, tmp_path_factory):
    """A server of short answers, and somebody with a stream who must not notice anything."""
    flags = ["--max-total-tokens", "96", "--max-input-tokens", "64", "--max-client-batch-size", "4"]
    served = Served(model.path, tmp_path_factory.mktemp("log") / "attacked.log", *flags).wait()
    wrong, over = [], threading.Event()

    def neighbour():
        with Client(served.url, timeout=60) as client:
            while not over.is_set():
                made = client.generate("Hello", max_new_tokens=20).text
                if made != model.text("Hello", 20):
                    wrong.append(made)

    thread = threading.Thread(target=neighbour)
    thread.start()
    yield served
    over.set()
    thread.join(60)
    assert wrong == [] and not thread.is_alive() and served.process.poll() is None
    with Client(served.url) as client:
        assert client.health() and client.generate("Hello", max_new_tokens=20).text == model.text("Hello", 20)
    assert served.stop() == 0
    assert "Traceback" not in served.log.read_text()


def post(served, path, body, kind="application/json"):
    """One request on a connection of its own -> (status, body)."""
    import http.client

    connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=60)
    try:
        connection.request("POST", path, body, {"Content-Type": kind})
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def fine(status, body):
    assert status in (200, *REFUSALS), (status, body[:300])
    assert b'"generation"' not in body and b"Incomplete generation" not in body and b"Server error" not in body, body[:300]


@pytest.mark.skipif(sys.version_info < (3, 11), reason="schemathesis 4.32 needs Python 3.11")
@pytest.mark.parametrize("path", POSTS)
def test_bodies_made_from_our_own_openapi(attacked, path):
    """Half of them follow the document, half do not."""
    schemathesis = pytest.importorskip("schemathesis")
    operation = schemathesis.openapi.from_dict(openapi.document())[path]["POST"]

    @settings(max_examples=15, **OFTEN)
    @given(st.one_of([operation.as_strategy(generation_mode=mode) for mode in schemathesis.GenerationMode]))
    def check(case):
        answer = case.call(base_url=attacked.url, timeout=60)
        if answer.status_code != 405:  # another method is one of its ideas
            fine(answer.status_code, answer.content)

    check()


@settings(max_examples=100, **OFTEN)
@given(
    st.dictionaries(st.sampled_from(sorted(params.PARAMETERS)), SPELLED, min_size=1, max_size=4),
    st.sampled_from(["/", "/generate", "/generate_stream"]),
)
def test_extreme_parameters(attacked, chosen, path):
    inner = ",".join("%s:%s" % (json.dumps(name), value) for name, value in {"max_new_tokens": "3", **chosen}.items())
    fine(*post(attacked, path, '{"inputs":"x","parameters":{%s}}' % inner))


@settings(max_examples=100, **OFTEN)
@given(
    st.dictionaries(st.sampled_from(sorted(set(params.CHAT) | set(params.COMPLETION) | {"inputs"})), SPELLED, max_size=5),
    st.sampled_from(TEXTS),
    st.sampled_from(["/v1/chat/completions", "/v1/completions", "/invocations", "/chat_tokenize", "/tokenize"]),
)
def test_extreme_openai_bodies(attacked, chosen, text, path):
    usual = {
        "messages": json.dumps([{"role": text, "content": text}]),
        "prompt": json.dumps([text, "x"]),
        "inputs": json.dumps(text),
    }
    usual["max_tokens"] = "3"
    fine(*post(attacked, path, "{%s}" % ",".join("%s:%s" % (json.dumps(key), value) for key, value in {**usual, **chosen}.items())))


@settings(max_examples=60, **OFTEN)
@given(
    st.binary(max_size=200), st.sampled_from(POSTS), st.sampled_from(["application/json", "text/plain", "", "application/ü+json"])
)
def test_any_bytes(attacked, body, path, kind):
    fine(*post(attacked, path, body, kind.encode("latin-1")))


def test_long_prompts_deep_documents_and_many_messages(attacked):
    for text in ("a" * 1000000, "a " * 100000, "é" * 100000):
        for more in ({}, {"truncate": 5}):
            status, body = post(
                attacked,
                "/generate",
                json.dumps({"inputs": text, "parameters": {"max_new_tokens": 2, **more}}, ensure_ascii=False).encode(),
            )
            assert status == (200 if more else 422), body[:200]
    for depth in (100, 900, 100000):
        for opened, closed in (("[", "]"), ('{"a":', "}")):
            deep = opened * depth + ("1" if closed == "}" else "") + closed * depth
            fine(*post(attacked, "/generate", '{"inputs":%s}' % deep))
            fine(*post(attacked, "/chat_tokenize", '{"messages":[{"role":"user","tool_calls":[%s]}]}' % deep))
    many = [{"role": ("user", "assistant")[k % 2], "content": "x"} for k in range(20001)]
    fine(*post(attacked, "/v1/chat/completions", json.dumps({"messages": many, "max_tokens": 3})))


@pytest.mark.parametrize(
    "sent",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc",
        b"GET\r\n\r\n",
        b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n",
        b'POST /generate HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 50\r\n\r\n{"inputs"',
        b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"GET /health HTTP/1.1\r\nHost: x\r\nX: " + b"y" * 300000 + b"\r\n\r\n",
        b"GET /" + b"%ff" * 5000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
        b"\x00" * 5000,
    ],
    ids=["tls", "no path", "negative length", "half a body", "no chunk", "long header", "long path", "zeros"],
)
def test_what_is_no_http(attacked, sent):
    """Sent, half of it read, and left; the fixture looks whether the server still serves."""
    with socket.create_connection(("127.0.0.1", attacked.port), timeout=10) as connection:
        try:
            connection.sendall(sent)
            connection.settimeout(0.3)
            answer = connection.recv(100)
        except (ConnectionError, socket.timeout):
            answer = b""
        assert not answer.startswith(b"HTTP/1.1 5")
    with Client(attacked.url) as client:
        assert client.health()


def test_other_methods_and_paths(attacked):
    import http.client

    for method in ("GET", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE", "HEAD", "post", "BREW"):
        for path in ("/generate", "/generate/", "//generate", "/v1", "/%67enerate", "/docs", "/../etc/passwd", "/?x=%00", "*"):
            connection = http.client.HTTPConnection("127.0.0.1", attacked.port, timeout=30)
            connection.request(method, path)
            status = connection.getresponse().status
            connection.close()
            assert status in (200, 400, 404, 405, 415), (method, path, status)
