"""What ``pipedock serve`` refuses before it starts anything, and what it remembers about a server."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading

import pytest

pytest.importorskip("starlette", reason="the embedded server needs Python 3.10")
import pipedock  # noqa: E402
from pipeline_train.errors import RunFailed, UserError  # noqa: E402
from serve import launch, state  # noqa: E402
from serve.embedded.__main__ import main  # noqa: E402
from tests.free_port import free_port  # noqa: E402
from verbs.serve import follow  # noqa: E402


@pytest.fixture(autouse=True)
def own_state(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "state"))


@pytest.fixture
def folder(tmp_path):
    """A folder with every file the check looks for (empty weights: nothing is loaded here)."""
    path = tmp_path / "model"
    path.mkdir()
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        (path / name).write_text("{}")
    return path


def refused(folder, **more):
    with pytest.raises(UserError) as caught:
        launch.check(str(folder), **{"engine": "embedded", "port": free_port(), "host": "127.0.0.1", **more})
    return str(caught.value)


def test_a_complete_folder_passes(folder):
    launch.check(str(folder), "embedded", free_port(), "127.0.0.1")


@pytest.mark.parametrize(
    "name, text",
    [
        ("config.json", "no config.json"),
        ("tokenizer.json", "no tokenizer (none of tokenizer.json"),
        ("model.safetensors", "no weights"),
    ],
)
def test_each_missing_file_is_named(folder, name, text):
    (folder / name).unlink()
    assert text in refused(folder)


def test_no_folder_and_pipeline_weights(folder, tmp_path):
    assert refused(tmp_path / "absent").endswith("absent: no such folder")
    (folder / "model.safetensors").rename(folder / "layer_000.safetensors")
    (folder / "manifest.json").write_text("{}")
    assert "pipeline weights; export them first: pipedock to-hf" in refused(folder)


def test_a_proof_that_does_not_hold(folder):
    (folder / "proof.json").write_text(json.dumps({"holds": False}))
    assert "does not equal the trained model; not served" in refused(folder)
    (folder / "proof.json").write_text("{")
    assert "unreadable" in refused(folder)
    (folder / "proof.json").write_text(json.dumps({"holds": True}))
    launch.check_model(str(folder))


def test_engines_and_ports(folder):
    assert refused(folder, engine="tgi") == "--engine tgi: this version has the embedded engine only"
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert "cannot listen on 127.0.0.1 port %d: Address already in use" % port in refused(folder, port=port)


def instead_of_python(monkeypatch, tmp_path, script):
    fake = tmp_path / "python"
    fake.write_text("#!/bin/sh\n" + script)
    fake.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(fake))


def test_a_folder_that_does_not_load_is_the_users_mistake(folder, tmp_path, monkeypatch, capsys):
    """The child says what is wrong and ends with 2; that is what the user reads."""
    assert main(["--model-id", str(folder), "--port", "0", "--hostname", "127.0.0.1"]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("serve: %s: no usable tokenizer (" % folder)
    instead_of_python(monkeypatch, tmp_path, "echo loading; echo '%s'; exit 2" % line.replace("'", ""))
    with pytest.raises(UserError, match="model: no usable tokenizer"):
        launch.launch(str(folder), port=free_port())
    assert not list(state.folder().glob("*.json"))


def test_a_server_that_dies_shows_the_end_of_its_log(folder, tmp_path, monkeypatch):
    instead_of_python(monkeypatch, tmp_path, "seq 100; exit 3")
    with pytest.raises(RunFailed) as caught:
        launch.launch(str(folder), port=free_port())
    assert "the server ended with code 3 before it was ready; the end of" in str(caught.value)
    assert str(caught.value).endswith("\n99\n100") and "\n80\n" not in str(caught.value)


def test_a_server_that_never_gets_ready_is_stopped(folder, tmp_path, monkeypatch):
    instead_of_python(monkeypatch, tmp_path, "echo started; exec sleep 60")
    said = []
    with pytest.raises(RunFailed, match=r"not healthy after 1 s; the end of .*:\nstarted"):
        launch.launch(str(folder), port=free_port(), timeout=1.2, progress=said.append)
    assert said and said[0].endswith("... 1 s")


def test_the_end_of_a_server_is_reported(tmp_path, capfd):
    """In the foreground its log is copied, and a bad end is an error."""
    log = tmp_path / "log"
    with open(log, "wb") as out:
        process = subprocess.Popen(["sh", "-c", "echo one; kill -9 $$"], stdout=out)
    server = launch.Server(process, state.Running(process.pid, "", 9997, "u", "m", "embedded", str(log)))
    with pytest.raises(RunFailed, match="the server ended with code -9; the end of .*:\none$"):
        follow(server, threading.Event())
    assert capfd.readouterr().err == "one\n"


def running(port, pid):
    return state.Running(pid, state.birth(pid), port, "http://127.0.0.1:%d" % port, "m", "embedded", "log")


def test_state_of_a_living_a_dead_and_another_process():
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        state.write(running(9999, child.pid))
        assert state.read(9999).pid == child.pid
        assert oct(os.stat(state.folder()).st_mode & 0o777) == "0o700"
        assert state.stop(state.read(9999), 10)
    finally:
        child.kill()
        child.wait()
    assert state.read(9999) is None and not (state.folder() / "9999.json").exists()
    state.write(state.Running(os.getpid(), "1", 9999, "u", "m", "embedded", "log"))  # the pid is somebody else's now
    assert state.read(9999) is None
    (state.folder() / "9998.json").write_text("{")
    assert state.read(9998) is None


def test_a_second_server_on_the_port_is_named(folder):
    port = free_port()
    state.write(running(port, os.getpid()))
    assert "port %d: already served (m, pid %d); stop it with pipedock serve --stop --port %d" % (
        port,
        os.getpid(),
        port,
    ) in refused(folder, port=port)


def cli(capfd, *argv):
    code = pipedock.main(["serve", *argv])
    out, err = capfd.readouterr()
    return code, out, err


def test_stop_and_status_of_nothing(capfd):
    port = str(free_port())
    assert cli(capfd, "--stop", "--port", port) == (0, "nothing to stop on port %s\n" % port, "")
    assert cli(capfd, "--status", "--port", port) == (0, "no server of ours on port %s\n" % port, "")
    code, out, _ = cli(capfd, "--status", "--json", "--port", port)
    assert code == 0 and json.loads(out) == {"running": False, "port": int(port)}


@pytest.mark.parametrize(
    "argv, text",
    [
        ([], "--model DIR is missing"),
        (["--model", "absent"], "--model absent: no such folder"),
        (["--model", "absent", "--port", "0"], "--port 0: expected 1 to 65535"),
        (["--model", "absent", "--api-key-file", "absent.key"], "--api-key-file absent.key: No such file or directory"),
        (["--model", "absent", "--engine", "vllm"], "this version has the embedded engine only"),
    ],
)
def test_one_line_and_exit_2(capfd, tmp_path, monkeypatch, argv, text):
    monkeypatch.chdir(tmp_path)
    before = signal.getsignal(signal.SIGTERM)
    try:
        code, out, err = cli(capfd, *argv)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert code == 2 and out == "" and err.count("\n") == 1 and text in err


def test_an_empty_key_file(capfd, tmp_path):
    (tmp_path / "key").write_text(" \n")
    code, _, err = cli(capfd, "--model", str(tmp_path), "--api-key-file", str(tmp_path / "key"))
    assert code == 2 and "expected one word" in err


def test_urls_that_reach_the_server():
    assert launch.url_of("0.0.0.0", 1) == "http://127.0.0.1:1" and launch.url_of("::1", 1) == "http://[::1]:1"
    assert "Authorization: Bearer KEY" in launch.curl_lines("u", True)[0] and "Authorization" not in launch.curl_lines("u")[0]
