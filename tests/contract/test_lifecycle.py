"""``pipedock serve`` and ``pipedock ask`` as a user runs them: start, look, ask, stop; and the end of a server under load."""

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest

from bench import servers, shapes
from pipeline_train.errors import RunFailed
from serve import launch, state
from serve.client import Client, ClientError
from tests.contract.conftest import Served
from tests.contract.test_load import gauge, until
from tests.free_port import free_port

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def pipedock(tmp_path):
    """Run the command in an empty folder with a state of its own."""

    def run(*argv, background=False, stdin=None):
        environment = {**os.environ, "XDG_RUNTIME_DIR": str(tmp_path / "state"), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        command = [sys.executable, str(ROOT / "pipedock.py"), *argv]
        if background:
            return subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment, cwd=str(tmp_path), text=True
            )
        return subprocess.run(command, capture_output=True, env=environment, cwd=str(tmp_path), text=True, input=stdin, timeout=120)

    return run


@contextmanager
def answering(pipedock, model, prompt, tokens):
    """A server in the foreground with an answer under way: (the command's process, its document, the rest of the stream)."""
    process = pipedock("serve", "--model", str(model), "--port", str(free_port()), "--json", background=True)
    try:
        document = json.loads(process.stdout.readline())
        with Client(document["url"], timeout=60) as client:
            stream = client.generate_stream(prompt, max_new_tokens=tokens)
            next(stream)
            yield process, document, stream
    finally:
        process.kill()


def refuses(port):
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


def test_detach_ask_status_stop(pipedock, model, tmp_path):
    port = free_port()
    (tmp_path / "key").write_text("no-word-of-a-path\n")
    started = pipedock("serve", "--model", model.path, "--port", str(port), "--detach", "--api-key-file", "key", "--json")
    try:
        assert started.returncode == 0, started.stderr
        document = json.loads(started.stdout)
        url = document["url"]
        assert document["healthy"] and url == "http://127.0.0.1:%d" % port and "Bearer KEY" in document["try"][0]
        assert "no-word-of-a-path" not in Path("/proc/%d/cmdline" % document["pid"]).read_text()
        ask = ["ask", "--url", url, "--api-key-file", "key", "--max-new-tokens", "5"]
        plain = pipedock(*ask, "Hello")
        assert (plain.returncode, plain.stdout) == (0, model.text("Hello", 5) + "\n")
        assert pipedock(*ask, "Hello", "--stream").stdout == plain.stdout
        assert json.loads(pipedock(*ask, "Hello", "--json").stdout)["text"] == model.text("Hello", 5)
        talk = pipedock(*ask, "--chat", stdin="hi\n\nhow\n")
        first = model.tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True)
        assert talk.returncode == 0 and talk.stdout.startswith(model.text(first, 5, special=False)) and "5 tokens" in talk.stderr
        same = pipedock("serve", "--model", model.path, "--port", str(port), "--detach", "--api-key-file", "key", "--json")
        assert same.returncode == 0 and json.loads(same.stdout) == dict(document, already=True)
        again = pipedock("serve", "--model", model.path, "--port", str(port))
        assert again.returncode == 2 and "already served" in again.stderr and again.stderr.count("\n") == 1
        assert json.loads(pipedock("serve", "--status", "--port", str(port), "--json").stdout)["pid"] == document["pid"]
        wrong = pipedock("ask", "--url", url, "Hello")
        assert wrong.returncode == 2 and "the API key is missing or wrong" in wrong.stderr and wrong.stderr.count("\n") == 1
    finally:
        stopped = pipedock("serve", "--stop", "--port", str(port))
    assert stopped.returncode == 0 and stopped.stdout.startswith("stopped %s" % model.path)
    assert refuses(port) and pipedock("serve", "--status", "--port", str(port)).stdout.startswith("no server of ours")
    assert "Peak memory" in Path(document["log"]).read_text() and "Traceback" not in Path(document["log"]).read_text()


def test_in_the_foreground_a_signal_ends_it_after_the_running_request(pipedock, model):
    with answering(pipedock, model.path, model.endless, 300) as (process, document, stream):
        port = int(document["url"].rsplit(":", 1)[1])
        os.kill(process.pid, signal.SIGTERM)
        deadline = time.monotonic() + 20
        while not refuses(port) and time.monotonic() < deadline:  # new ones are refused ...
            time.sleep(0.02)
        assert refuses(port)
        rest = list(stream)  # ... and the one under way is finished
        assert len(rest) == 299 and rest[-1].generated_text == model.text(model.endless, 300)
        assert process.wait(60) == 0
    assert process.stdout.read() == "" and "Traceback" not in process.stderr.read()
    assert not Path("/proc/%d" % document["pid"]).exists()


@pytest.mark.parametrize(
    "argv, code, text",
    [
        (["Hello"], 2, "no server there (Connection refused); start one with pipedock serve"),
        ([], 2, "give a prompt, or --chat for a conversation"),
        (["Hello", "--system", "x"], 2, "--system goes with --chat"),
        (["--chat", "--json"], 2, "a conversation has no JSON document"),
    ],
)
def test_ask_without_a_server(pipedock, argv, code, text):
    done = pipedock("ask", "--url", "http://127.0.0.1:%d" % free_port(), *argv)
    assert done.returncode == code and text in done.stderr and done.stderr.count("\n") == 1


def test_ask_refused_by_the_server(pipedock, server):
    done = pipedock("ask", "--url", server.url, "")
    assert done.returncode == 2 and "`inputs` cannot be empty" in done.stderr and done.stderr.count("\n") == 1
    done = pipedock("ask", "--url", server.url + "/nowhere", "Hello")
    assert done.returncode == 2 and "no such route here" in done.stderr
    assert "expected http://HOST:PORT" in pipedock("ask", "--url", "localhost:1", "Hello").stderr


def test_what_is_not_done_when_the_server_must_stop_is_cut_in_one_line(tmp_path):
    servers.random_model(tmp_path / "model", shapes.SHAPES["llama-tiny"])  # it ends no answer by itself
    served = Served(tmp_path / "model", tmp_path / "log", "-g", "1").wait()
    body = json.dumps({"inputs": "one", "parameters": {"max_new_tokens": 4000}}).encode()
    seen = {}

    def ask(path):
        request = urllib.request.Request(served.url + path, body, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                seen[path] = answer.status, answer.read()
        except urllib.error.HTTPError as error:
            seen[path] = error.code, error.read()
        except (OSError, http.client.HTTPException) as error:
            seen[path] = type(error).__name__

    threads = [threading.Thread(target=ask, args=(path,)) for path in ("/generate", "/generate_stream")]
    for thread in threads:
        thread.start()
    assert until(lambda: gauge(served) == 2)
    assert served.stop() == 0
    for thread in threads:
        thread.join(30)
    said = (tmp_path / "log").read_text()
    assert seen["/generate"] == (503, b"the server is stopping") and seen["/generate_stream"] == "IncompleteRead", (seen, said)
    for path in seen:
        assert "%s was cut: it was not done when the server had to stop" % path in said
    assert "Traceback" not in said


def test_a_second_interrupt_ends_the_server_at_once(pipedock, tmp_path):
    servers.random_model(tmp_path / "model", shapes.SHAPES["llama-tiny"])
    with answering(pipedock, tmp_path / "model", "one", 4000) as (process, document, stream):
        for _ in range(2):  # to the command alone, as a supervisor sends it
            os.kill(process.pid, signal.SIGINT)
            time.sleep(1)
        process.wait(60)
        with pytest.raises(ClientError):
            list(stream)
    said = process.stderr.read() + Path(document["log"]).read_text()
    assert not Path("/proc/%d" % document["pid"]).exists() and "was cut" in said and "Traceback" not in said, said


def test_a_killed_command_takes_its_server_with_it(pipedock, model):
    """In the foreground; SIGKILL leaves the command no time to stop it. Running requests are finished."""
    with answering(pipedock, model.path, model.endless, 300) as (process, document, stream):
        process.kill()
        assert list(stream)[-1].generated_text == model.text(model.endless, 300)
        deadline = time.monotonic() + 30
        while Path("/proc/%d" % document["pid"]).exists() and time.monotonic() < deadline:
            time.sleep(0.1)
    assert not Path("/proc/%d" % document["pid"]).exists() and "Stopped" in Path(document["log"]).read_text()


def test_a_server_that_is_stopping_is_waited_for(pipedock, tmp_path):
    servers.random_model(tmp_path / "model", shapes.SHAPES["llama-tiny"])
    port = str(free_port())
    start = ["serve", "--model", str(tmp_path / "model"), "--port", port, "--detach", "--json"]
    try:
        first = json.loads(pipedock(*start).stdout)
        with Client(first["url"], timeout=60) as client:
            stream = client.generate_stream("one", max_new_tokens=1500)
            next(stream)
            os.kill(first["pid"], signal.SIGTERM)
            threading.Thread(target=list, args=(stream,), daemon=True).start()
            again = pipedock(*start)
        second = json.loads(again.stdout)
        assert second["healthy"] and second["pid"] != first["pid"] and "already" not in second
        assert "waiting for the server on port %s (pid %d), which is loading or stopping" % (port, first["pid"]) in again.stderr
    finally:
        pipedock("serve", "--stop", "--port", port)


def test_a_server_that_neither_answers_nor_ends_is_not_waited_for_for_ever(monkeypatch):
    silent = state.Running(7, "", 8082, "http://127.0.0.1:9", "m", "embedded", "log")
    monkeypatch.setattr(launch, "running", lambda settings: silent)
    with pytest.raises(RunFailed, match="^port 8082: the server there .pid 7. neither answers nor ends: see pipedock serve --logs"):
        launch.settled(None, lambda line: None, 0.6)
