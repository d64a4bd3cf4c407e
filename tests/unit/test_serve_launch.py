"""What ``pipedock serve`` refuses before it starts anything, and what it remembers about a server."""

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading

import pytest

pytest.importorskip("starlette", reason="the embedded server needs Python 3.10")
import pipedock  # noqa: E402
from pipeline_train import proof  # noqa: E402
from pipeline_train.errors import RunFailed, UserError  # noqa: E402
from serve import launch, reach, state  # noqa: E402
from serve.embedded.__main__ import main  # noqa: E402
from serve.embedded_process import Server  # noqa: E402
from serve.proved import check_proof  # noqa: E402
from serve.settings import Settings  # noqa: E402
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
        settings = Settings(str(folder), **{"port": free_port(), **more})
        launch.check(settings)
        launch.check_port(settings)
    return str(caught.value)


def test_a_complete_folder_passes(folder):
    launch.check(Settings(str(folder), port=free_port()))


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


def prove(folder, **changes):
    """A proof of the folder's files as they are."""
    (folder / "proof.json").write_text(json.dumps({"holds": True, "files": proof.files(folder), **changes}))


def mark(folder):
    """The weights as pipedock writes them: only their header tells."""
    header = json.dumps({"__metadata__": {"format": "pt", "pipedock": "export"}}).encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)


UNPROVED = {
    "no proof": (lambda x: (x / "proof.json").unlink(), "is an export of pipedock without a proof"),
    "no proof and no page": (
        lambda x: [(x / name).unlink() for name in ("proof.json", "pipedock-export.json")],
        "is an export of pipedock without a proof",
    ),
    "failed": (lambda x: prove(x, holds=False), "does not equal the trained model"),
    "unreadable": (lambda x: (x / "proof.json").write_text("{"), "proof.json: unreadable"),
    "a list": (lambda x: (x / "proof.json").write_text("[]"), "proof.json: unreadable"),
    "nested": (lambda x: (x / "proof.json").write_text("[" * 100000), "proof.json: unreadable"),
    "no files": (lambda x: prove(x, files={}), "proof.json: no file is listed"),
    "no sizes": (lambda x: prove(x, files={"config.json": 1}), "config.json: changed since it was proved"),
    "one byte": (lambda x: (x / "tokenizer.json").write_text("[]"), "tokenizer.json: changed since it was proved"),
    "longer": (lambda x: (x / "config.json").write_text("{ }"), "config.json: changed since it was proved"),
    "gone": (lambda x: (x / "tokenizer.json").unlink(), "tokenizer.json: is gone since it was proved"),
    "weights added": (lambda x: (x / "pytorch_model.bin").write_text(""), "pytorch_model.bin: was added since it was proved"),
}


@pytest.mark.parametrize("change", UNPROVED)
def test_an_export_is_served_with_its_proof_only(folder, change, capfd):
    mark(folder)
    (folder / "pipedock-export.json").write_text("{}")
    prove(folder)
    (folder / "README.md").write_text("of the user")
    check_proof(str(folder), lambda line: None)
    change, text = UNPROVED[change]
    change(folder)
    with pytest.raises(UserError) as caught:
        check_proof(str(folder), lambda line: None)
    assert text in str(caught.value) and "pipedock verify --checkpoint RUN --export %s" % shlex.quote(str(folder)) in str(
        caught.value
    )
    assert str(caught.value).endswith("(--no-proof serves it all the same)")
    check_proof(str(folder), lambda line: None, required=False)
    warned = capfd.readouterr().err
    assert (
        warned.startswith("WARNING: --no-proof: served although nothing proves that this is the trained model: ") and text in warned
    )


def test_a_folder_that_never_was_an_export(folder):
    check_proof(str(folder), lambda line: None)
    (folder / "model.safetensors").write_bytes(b"\xff" * 100)
    check_proof(str(folder), lambda line: None)


def test_the_verb_refuses_and_no_proof_overrides(folder, tmp_path, monkeypatch, capfd):
    mark(folder)
    instead_of_python(monkeypatch, tmp_path, "echo 'serve: it came this far'; exit 2")
    before = signal.getsignal(signal.SIGTERM)
    try:
        code, _, err = cli(capfd, "--model", str(folder), "--port", str(free_port()))
        assert code == 2 and "is an export of pipedock without a proof" in err and err.count("\n") == 1
        code, _, err = cli(capfd, "--model", str(folder), "--port", str(free_port()), "--no-proof")
        assert code == 2 and "WARNING: --no-proof" in err and "it came this far" in err
    finally:
        signal.signal(signal.SIGTERM, before)


def test_the_server_itself_refuses_too_however_it_is_started(folder, monkeypatch, capfd):
    from serve.embedded import build

    def far(options):
        raise UserError("it came this far")

    monkeypatch.setattr(build, "build", far)
    monkeypatch.delenv("NO_PROOF", raising=False)
    command = ["--model-id", str(folder), "--port", str(free_port())]
    assert main(command) == 2 and "it came this far" in capfd.readouterr().err  # never was an export
    mark(folder)
    assert main(command) == 2
    err = capfd.readouterr().err
    assert "serve: %s: is an export of pipedock without a proof" % folder in err and err.endswith("all the same)\n")
    assert main(command + ["--no-proof"]) == 2
    err = capfd.readouterr().err
    assert "WARNING: --no-proof: served although nothing proves" in err and "it came this far" in err
    monkeypatch.setenv("NO_PROOF", "true")
    assert main(command) == 2 and "it came this far" in capfd.readouterr().err
    monkeypatch.delenv("NO_PROOF")
    assert main(command + ["--proof-checked"]) == 2  # pipedock serve has done it
    err = capfd.readouterr().err
    assert "it came this far" in err and "WARNING" not in err


def test_the_verb_tells_the_server_that_the_proof_was_compared(folder, tmp_path, monkeypatch, capfd):
    instead_of_python(monkeypatch, tmp_path, 'echo "serve: $*"; exit 2')
    before = signal.getsignal(signal.SIGTERM)
    try:
        code, _, err = cli(capfd, "--model", str(folder), "--port", str(free_port()))
    finally:
        signal.signal(signal.SIGTERM, before)
    assert code == 2 and "--proof-checked" in err


def test_engines_and_ports(folder):
    assert refused(folder, engine="sglang") == "--engine sglang: expected one of embedded, tgi, vllm"
    assert refused(folder, shards=2).startswith("--num-shard goes with --engine tgi and vllm; the embedded engine is one process")
    assert refused(folder, shm_size="1g").startswith("--shm-size goes with --engine tgi and vllm")
    assert refused(folder, shards=0) == "--num-shard 0: at least 1"
    assert refused(folder, max_input_tokens=9, max_total_tokens=9) == "--max-input-tokens 9: must be less than --max-total-tokens 9"
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
    server = Server(process, state.Running(process.pid, "", 9997, "u", "m", "embedded", str(log)))
    with pytest.raises(RunFailed, match="the server was killed by signal 9 .by the system, where .*; the end of .*:\none$"):
        follow(server, threading.Event())
    assert capfd.readouterr().err == "one\n"


def running(port, pid):
    return state.Running(pid, state.birth(pid), port, "http://127.0.0.1:%d" % port, "m", "embedded", "log")


def test_a_state_folder_that_cannot_be_made(tmp_path, monkeypatch, capfd):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "file"))
    assert pipedock.main(["serve", "--status"]) == 2
    assert capfd.readouterr().err.splitlines() == [
        "pipedock serve: %s/file/pipedock/serve: cannot be made: Not a directory. What serve has started is noted there; name a "
        "folder of yours with XDG_RUNTIME_DIR" % tmp_path
    ]


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
    state.write(running(9998, os.getpid()))
    state.write(state.Running(os.getpid(), "1", 9997, "u", "m", "embedded", "log"))  # has ended
    text = "no server of ours on port %s (of ours there is one on port 9998, for --port)\n" % port
    assert cli(capfd, "--status", "--port", port) == (0, text, "")


@pytest.mark.parametrize(
    "argv, text",
    [
        ([], "--model DIR is missing"),
        (["--model", "absent"], "--model absent: no such folder"),
        (["--model", "absent", "--port", "0"], "--port 0: expected 1 to 65535"),
        (["--model", "absent", "--api-key-file", "absent.key"], "--api-key-file absent.key: No such file or directory"),
        (["--model", "absent", "--engine", "vllm"], "--model absent: no such folder"),
        (["--model", "absent", "--engine", "none"], "--engine none: expected one of embedded, tgi, vllm"),
        (["--logs"], "no server of ours has been there, so there is no log"),
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
    assert reach.url_of("0.0.0.0", 1) == "http://127.0.0.1:1" and reach.url_of("::1", 1) == "http://[::1]:1"
    assert "Authorization: Bearer KEY" in reach.curl_lines("u", True)[0] and "Authorization" not in reach.curl_lines("u")[0]
