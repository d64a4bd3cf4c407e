"""``pipedock ask --chat`` as somebody types it, in a pseudo terminal and through pipes, against a server that plays answers."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("httpx", reason="the clients need Python 3.10")
from tests import terminal  # noqa: E402
from tests.contract import recorded  # noqa: E402
from tests.contract.recorded import Stub, cut, whole  # noqa: E402
from tests.unit.test_client_time import gone  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
READY, DONE = b"you> ", b"after "


def answer(*texts):
    """The events of a streamed chat answer."""
    choices = [[{"index": 0, "delta": {"role": "assistant", "content": text}, "finish_reason": None}] for text in texts]
    choices[-1][0]["finish_reason"] = "stop"
    usage = {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": len(texts)}}
    documents = [json.dumps(one).encode() for one in [{"choices": choice, "usage": None} for choice in choices] + [usage]]
    return [b"data: %s\n\n" % document for document in documents] + [b"data: [DONE]\n\n"]


def plays(*answers):
    return Stub(*[one if isinstance(one, tuple) else (200, one, 0.01) for one in answers])


def command(stub, *more):
    return [sys.executable, str(ROOT / "pipedock.py"), "ask", "--url", stub.url, "--chat", *more]


def talk(stub, *typed, **more):
    return terminal.run(command(stub), typed=typed, timeout=20, **more)


def piped(stub, lines, *more):
    environment = dict(os.environ, PYTHONPATH=str(ROOT))
    return subprocess.run(command(stub, *more), input=lines, capture_output=True, text=True, env=environment, timeout=60)


def asked(stub):
    """The messages of each request, as "role: content" lines."""
    return [["%s: %s" % (one["role"], one["content"]) for one in body["messages"]] for _, body, _ in stub.seen]


def test_a_conversation_with_its_history():
    with plays(answer("Hel", "lo"), answer("again"), answer("new")) as stub:
        ended = talk(
            stub, (READY, b"hi\r"), (DONE, b""), (READY, b"\x1b[A there\r"), (DONE, b"/undo\r"),
            (READY, b"three\r"), (DONE, b"/reset\r"),
            (READY, b"four\r"), (DONE, b"/quit\r"),
        )  # fmt: skip
        assert asked(stub) == [
            ["user: hi"],
            ["user: hi", "assistant: Hello", "user: hi there"],  # the arrow brought the last question back
            ["user: hi", "assistant: Hello", "user: three"],
            ["user: four"],
        ]
    assert ended.code == 0
    shown = [line for line in ended.screen if line.startswith("(2 tokens")]
    assert "Hello" in ended.screen and " tokens/s, the first after " in shown[0]


def test_ctrl_c_stops_the_answer_and_keeps_the_conversation():
    endless = (200, answer(*["word "] * 400), 0.05)
    with plays(endless, answer("fine")) as stub:
        ended = talk(stub, (READY, b"tell\r"), (b"word word ", b"\x03"), (READY, b"thanks\r"), (DONE, b""), (READY, b"\x04"))
        first, second = asked(stub)
        assert first == ["user: tell"] and second[0] == "user: tell" and second[2] == "user: thanks"
        assert second[1].startswith("assistant: word word ") and len(second[1]) < 200
        assert gone(stub)  # the connection was closed, so the server stops, too
    assert ended.code == 0 and any("[stopped]" in line for line in ended.screen) and "fine" in ended.screen


def test_ctrl_c_before_an_answer_takes_the_question_back():
    def chat(body):
        return (200, [b":\n\n"] * 100, 0.1) if body["messages"][-1]["content"] == "tell" else (200, answer("fine"), 0)

    with Stub(whole(b""), routes={"/v1/chat/completions": chat}) as stub:
        ended = talk(stub, (READY, b"tell\r"), (b"tell\r\n", b"\x03"), (READY, b"thanks\r"), (DONE, b"/quit\r"))
        assert asked(stub)[-1] == ["user: thanks"]
    assert ended.code == 0


def test_ctrl_c_at_the_prompt_drops_the_line_and_twice_ends():
    with plays(answer("fine")) as stub:
        ended = talk(
            stub, (READY, b"never"), (b"never", b"\x03"), (READY, b"hi\r"), (DONE, b""), (READY, b"\x03"), (READY, b"\x03")
        )
        assert asked(stub) == [["user: hi"]]
    assert ended.code == 0 and any("/quit ends" in line for line in ended.screen)


def test_an_error_ends_the_answer_only():
    too_long = whole(b'{"error":"Input validation error: too long","error_type":"validation"}', 422)
    begun = (200, answer("half", "x")[:1] + [b'data: {"error":{"message":"Incomplete generation stream"}}\n\n'], 0)
    with plays(too_long, begun, answer("fine")) as stub:
        typed = [
            (READY, b"one\r"),
            (b"too long", b""),
            (READY, b"two\r"),
            (b"Incomplete", b""),
            (READY, b"three\r"),
            (DONE, b"/quit\r"),
        ]
        ended = talk(stub, *typed)
        assert asked(stub)[-1] == ["user: three"]
    assert ended.code == 0 and "Input validation error: too long" in ended.screen and "fine" in ended.screen


def test_an_answer_cannot_play_with_the_terminal():
    with plays(answer("a\x1b]0;title\x07b", "\x1b[2J\u009bc\td\ne")) as stub:
        ended = talk(stub, (READY, b"hi\r"), (DONE, b"/quit\r"))
    assert b"\x1b]0;" not in ended.written and b"\x1b[2J" not in ended.written and "\u009b".encode() not in ended.written
    assert "e" in ended.screen and any(line.startswith("a]0;titleb[2Jc") for line in ended.screen)


def test_commands_are_helped_with_and_not_sent():
    with plays(answer("fine")) as stub:
        ended = talk(
            stub,
            (READY, b"/rest\r"),
            (b"as Ctrl-D does", b""),
            (READY, b"/etc/hosts is what?\r"),
            (DONE, b"/exit\r"),
            (READY, b"/quit\r"),
        )
        assert asked(stub) == [["user: /etc/hosts is what?"]]
    assert ended.code == 0 and any(line.startswith("/undo") for line in ended.screen)


def test_through_pipes_stdout_has_the_answers_alone():
    with plays(answer("one", "\x07"), answer("two")) as stub:
        done = piped(stub, "first\\\nline\n\nsecond\n", "--system", "be kind")
        assert (done.returncode, done.stdout) == (0, "one\x07\ntwo\n")
        system = "system: be kind"
        assert asked(stub) == [
            [system, "user: first\nline"],
            [system, "user: first\nline", "assistant: one\x07", "user: second"],
        ]
        assert done.stderr.startswith("(2 tokens, ") and "you>" not in done.stderr
    refusal = whole(b'{"error":"Input validation error: no","error_type":"validation"}', 422)
    with plays(refusal) as stub:
        done = piped(stub, "first\nsecond\n")
        assert done.returncode == 2 and "Input validation error: no" in done.stderr and len(stub.seen) == 1


def test_the_server_is_named_once_when_it_is_vllm():
    routes = {"/v1/models": whole(recorded.VLLM_MODELS), "/version": whole(recorded.VLLM_VERSION)}

    def chat(body):
        known = body["model"] == "my-model"
        return cut(recorded.VLLM_CHAT) if known else whole(recorded.VLLM_NO_MODEL, 404)

    with Stub(whole(b"", 404), routes={**routes, "/v1/chat/completions": chat}) as stub:
        done = piped(stub, "one\ntwo\n")
        assert (done.returncode, done.stdout) == (0, "Hi\nHi\n") and done.stderr.count("vLLM 0.11.0") == 1
    completion = {"/v1/completions": cut(recorded.VLLM_STREAM), "/tokenize": whole(recorded.VLLM_TOKENS)}
    with Stub(whole(b"", 404), routes={**routes, **completion}) as stub:
        plain = [part for part in command(stub) if part != "--chat"]
        done = subprocess.run(plain + ["hello", "--stream"], capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stdout) == (0, "你 so\n")
        assert done.stderr == stub.url + ": vLLM 0.11.0, which has no /generate; asked through its /v1 routes\n"
