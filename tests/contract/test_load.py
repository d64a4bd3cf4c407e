"""Many at once: nobody's answer changes, nobody waits for somebody who has gone or does not read, too many are told so."""

import asyncio
import itertools
import json
import re
import socket
import subprocess
import threading
import time

import pytest

from serve.client import AsyncClient, Client, Overloaded

KEY = ["-H", "Authorization: Bearer S3cret"]


def gauge(server, name="tgi_batch_current_size", *args):
    found = re.search(rb"^%s (\S+)$" % re.escape(name).encode(), server.curl("/metrics", *args)[2], re.M)
    return float(found.group(1)) if found else 0.0


def until(condition, seconds=20):
    """True as soon as it is; the time it took is not the subject unless a test measures it."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def test_sixteen_streams_say_what_each_says_alone(server, model):
    """Prompts of different lengths, answers of different lengths, some sampled: greedy ones also equal transformers'."""
    asked = [("request %d " % k * (1 + k % 5), {"max_new_tokens": 10 + 7 * (k % 4)}) for k in range(16)]
    for k in range(3, 16, 4):
        asked[k][1].update(temperature=0.8, seed=k, top_k=30)

    async def stream(client, text, how):
        pieces = [piece async for piece in client.generate_stream(text, **how)]
        if not any(piece.token.special for piece in pieces):
            assert "".join(piece.text for piece in pieces) == pieces[-1].generated_text
        return [piece.token for piece in pieces], pieces[-1].generated_text

    async def run():
        async with AsyncClient(server.url, timeout=60) as client:
            alone = [await stream(client, text, how) for text, how in asked]
            together = await asyncio.gather(*[stream(client, text, how) for text, how in asked])
            return alone, together

    alone, together = asyncio.run(run())
    assert together == alone
    for (text, how), (tokens, _) in zip(asked, together):
        if "seed" not in how:
            assert [token.id for token in tokens] == model.tokens(text, how["max_new_tokens"])


def test_requests_of_every_kind_at_once_are_not_mixed(server, model):
    messages = [{"role": "user", "content": "hi"}]
    prompt = model.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

    async def run():
        async with AsyncClient(server.url, timeout=60) as client:
            asked = []
            for k in range(10):
                asked.append(client.generate("kind %d" % k, max_new_tokens=12))
                asked.append(client.chat(messages, max_tokens=12, temperature=0.0))
            return await asyncio.gather(*asked)

    answers = asyncio.run(run())
    assert [one.text for one in answers[::2]] == [model.text("kind %d" % k, 12) for k in range(10)]
    assert {one.content for one in answers[1::2]} == {model.text(prompt, 12, special=False)}


def test_sixty_four_clients_at_once(server, model):
    """Each asks twice. benchmarks/serve_load.py has the same for a minute."""
    asked = ["client %d" % k for k in range(16)]
    expected = [model.text(text, 9) for text in asked]

    async def one(client, number):
        first = await client.generate(asked[number % 16], max_new_tokens=9)
        pieces = [piece async for piece in client.generate_stream(asked[(number + 5) % 16], max_new_tokens=9)]
        return [first.text, pieces[-1].generated_text] == [expected[number % 16], expected[(number + 5) % 16]]

    async def run():
        async with AsyncClient(server.url, timeout=120) as client:
            return await asyncio.gather(*[one(client, number) for number in range(64)])

    assert asyncio.run(run()) == [True] * 64


def test_our_clients_see_the_servers_tokens(server, model):
    """/tokenize and /chat_tokenize through both clients: the ids of transformers' tokenizer, and where they stand in the text."""
    messages = [{"role": "user", "content": "hi there"}]
    rendered = model.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

    async def run():
        async with AsyncClient(server.url) as client:
            return await client.tokenize("Hello there"), await client.chat_tokenize(messages)

    with Client(server.url) as client:
        plain, chat = client.tokenize("Hello there"), client.chat_tokenize(messages)
    assert asyncio.run(run()) == (plain, chat)
    assert [place.id for place in plain] == model.tokenizer("Hello there")["input_ids"]
    assert all("Hello there"[place.start : place.stop] == place.text for place in plain)
    assert (
        chat.text == rendered
        and [place.id for place in chat.tokens] == model.tokenizer(rendered, add_special_tokens=False)["input_ids"]
    )


@pytest.mark.parametrize("path", ["/generate_stream", "/generate", "/v1/completions"])
def test_a_client_that_goes_frees_its_row(server, model, path):
    """Its 4000 tokens are not generated (test_serve_batching has: not two more)."""
    steps = 'tgi_batch_inference_count{method="decode"}'
    assert until(lambda: gauge(server) == 0)
    before = gauge(server, steps)
    body = {"inputs": model.endless, "parameters": {"max_new_tokens": 4000}}
    if path.startswith("/v1"):
        body = {"prompt": model.endless, "max_tokens": 4000, "stream": True, "temperature": 0}
    command = ["curl", "-sS", "-N", server.url + path, "-H", "Content-Type: application/json", "-d", json.dumps(body)]
    curl = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    assert until(lambda: gauge(server) == 1)
    curl.kill()
    curl.wait()
    assert until(lambda: gauge(server) == 0)
    assert gauge(server, steps) - before < 3000
    assert until(lambda: gauge(server, 'tgi_request_failure{err="dropped"}') > 0)  # counted when the row is free


def test_a_reader_that_does_not_read_blocks_nobody(server, model):
    body = json.dumps({"inputs": model.endless, "parameters": {"max_new_tokens": 3000}}).encode()
    with socket.create_connection(("127.0.0.1", server.port)) as lazy:
        lazy.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        lazy.sendall(
            b"POST /generate_stream HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s"
            % (len(body), body)
        )
        with Client(server.url, timeout=30) as client:
            assert client.generate("Hello", max_new_tokens=20).text == model.text("Hello", 20)
            assert client.health()
    assert until(lambda: gauge(server) == 0)


def test_too_many_are_told_so_and_the_others_go_on(small_server, model):
    """Three places. The fourth gets 429 (in a stream: an event) quickly, before its parameters are looked at."""
    started, told, results = threading.Barrier(4), threading.Event(), []

    def long(started):
        """Of 2900 tokens, seconds: it runs until the others have been told. What has been said comes again, so no end does."""
        with Client(small_server.url, api_key="S3cret", timeout=60) as client:
            stream = client.generate_stream(model.endless, max_new_tokens=2900, repetition_penalty=0.01)
            pieces = [next(stream)]
            started()
            pieces += itertools.islice(stream, 399)
            assert told.wait(60)
            stream.close()
            results.append([piece.token.id for piece in pieces])

    threads = [threading.Thread(target=long, args=[lambda: started.wait(60)]) for _ in range(3)]
    for thread in threads:
        thread.start()
    started.wait(60)
    document = b'{"error":"Model is overloaded","error_type":"overloaded"}'
    refused = {"inputs": "x", "parameters": {"temperature": -1}}
    assert small_server.curl("/generate", *KEY, body=refused) == (429, "application/json", document)
    assert small_server.curl("/generate_stream", *KEY, body=refused) == (200, "text/event-stream", b"data: " + document + b"\n\n")
    chat = {"messages": [{"role": "user", "content": "x"}], "stream": True, "max_tokens": 1}
    event = b'data: {"error":{"message":"Model is overloaded","http_status_code":422}}\n\ndata: [DONE]\n\n'
    assert small_server.curl("/v1/chat/completions", *KEY, body=chat)[2] == event
    with Client(small_server.url, api_key="S3cret", retries=0) as client:
        with pytest.raises(Overloaded):
            client.generate("x", max_new_tokens=1)
    told.set()
    for thread in threads:
        thread.join(60)
    assert until(lambda: gauge(small_server, "tgi_batch_current_size", *KEY) == 0)
    long(lambda: None)
    assert len(results[0]) == 400 and results == [results[0]] * 4  # the last was alone
    with Client(small_server.url, api_key="S3cret") as client:
        assert client.generate("Hello", max_new_tokens=3).text == model.text("Hello", 3)  # places are given back


def test_best_of_needs_as_many_places_and_can_be_off(small_server):
    status, _, body = small_server.curl("/generate", *KEY, body={"inputs": "x", "parameters": {"best_of": 2, "do_sample": True}})
    assert status == 422 and b"`best_of` != 1 is not allowed for this endpoint" in body


GUARDED = ["/", "/generate", "/generate_stream", "/v1/chat/completions", "/v1/completions", "/invocations", "/tokenize"]


@pytest.mark.parametrize("path", GUARDED)
@pytest.mark.parametrize("args", [[], ["-H", "Authorization: Bearer wrong"], ["-H", "Authorization: S3cret"]])
def test_without_the_key(small_server, path, args):
    assert small_server.curl(path, *args, body={}) == (401, "", b"")


def test_with_the_key_and_what_is_not_guarded(small_server):
    for key in ("Bearer S3cret", "bearer s3CRET"):  # the original compares without case
        assert (
            small_server.curl(
                "/generate", "-H", "Authorization: " + key, body={"inputs": "x", "parameters": {"max_new_tokens": 1}}
            )[0]
            == 200
        )
    for path in ("/health", "/", "/info", "/metrics", "/v1/models", "/docs", "/api-doc/openapi.json"):
        assert small_server.curl(path)[0] == 200
    assert small_server.curl("/chat_tokenize", body={"messages": [{"role": "user", "content": "x"}]})[0] == 200


def test_bodies_that_are_too_long(small_server, tmp_path):
    (tmp_path / "body").write_text(json.dumps({"inputs": "x" * 20000}))
    text = b"Failed to buffer the request body: length limit exceeded"
    for how in ([], ["-H", "Transfer-Encoding: chunked"]):
        args = [*KEY, *how, "-H", "Content-Type: application/json", "--data-binary", "@%s" % (tmp_path / "body")]
        assert small_server.curl("/generate", *args) == (413, "text/plain; charset=utf-8", text)
    status, _, body = small_server.curl("/generate", *KEY, body={"inputs": "word " * 100, "parameters": {"max_new_tokens": 1}})
    assert status == 422 and b"`inputs` must have less than 60 tokens. Given: " in body


def test_browsers_only_from_where_it_was_allowed(server, small_server):
    def allowed(served, origin):
        return (
            b"access-control-allow-origin: %s" % origin.encode() in served.curl("/info", "-i", "-H", "Origin: " + origin)[2].lower()
        )

    assert allowed(small_server, "http://page.example") and not allowed(small_server, "http://other.example")
    assert not allowed(server, "http://page.example")
