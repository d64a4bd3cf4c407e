"""Servers in containers while they run: found again, watched, left alone, stopped; Docker is a fake here."""

import json
import socket

import pytest
import requests

docker = pytest.importorskip("docker", reason="the Docker SDK is in the serve extra, for Python 3.10 and newer")
from pipeline_train.errors import RunFailed, UserError  # noqa: E402
from serve import launch  # noqa: E402
from serve.containers import found, start  # noqa: E402
from tests.docker_fixtures import TGI, cli, engine_fixture, fails, folder_fixture, labelled, run, surroundings  # noqa: E402, F401
from tests.fake_docker import Engine, Handle, refused  # noqa: E402
from tests.free_port import free_port  # noqa: E402


def test_found_again_by_its_labels_and_stopped(folder, engine, capfd):
    port = free_port()
    engine.log, engine.end_code = b'api_key: Some(\n    "k",\n)\nConnected\n', 143
    command = ["--engine", "tgi", "--model", str(folder), "--port", str(port), "--detach"]
    code, out, _ = cli(capfd, *command)
    assert code == 0 and out.startswith(
        "%s at http://127.0.0.1:%d (tgi 3.3.7, container pipedock-serve-%d)\n" % (folder, port, port)
    )
    assert "/generate " in out and "stop it: pipedock serve --stop --port %d" % port in out
    code, out, _ = cli(capfd, *command)
    assert code == 0 and out.startswith("already running: %s at" % folder) and len(engine.created) == 1
    code, _, err = cli(capfd, *command, "--max-total-tokens", "99")
    assert code == 2 and "port %d: already served (%s, container pipedock-serve-%d); stop it with" % (port, folder, port) in err
    code, out, _ = cli(capfd, "--status", "--port", str(port), "--json")
    status = json.loads(out)
    assert status["running"] and status["healthy"] and status["image"] == TGI and status["engine"] == "tgi"
    code, out, _ = cli(capfd, "--logs", "--port", str(port))
    assert code == 0 and "Connected" in out and '"k"' not in out and "***" in out
    [handle] = engine.handles
    code, out, err = cli(capfd, "--stop", "--port", str(port))
    assert err == "stopping; requests under way are finished first\n"
    assert (code, out) == (0, "stopped %s (tgi 3.3.7, container pipedock-serve-%d)\n" % (folder, port))
    assert engine.handles == [] and handle.stopped[0] >= 90
    assert "Connected" in cli(capfd, "--logs", "--port", str(port))[1]  # kept
    assert cli(capfd, "--stop", "--port", str(port))[1] == "nothing to stop on port %d\n" % port


def test_strangers_are_left_alone(folder, engine):
    port = free_port()
    stranger = Handle(engine, "pipedock-serve-%d" % port, {"pipedock.stack": "serve"})
    engine.handles.append(stranger)
    engine.handles.append(Handle(engine, "other", {"pipedock.port": str(port)}))
    assert launch.find(port) is None
    text = fails(UserError, folder, port=port)
    assert text.startswith("a container named pipedock-serve-%d is there that pipedock did not start: rename it" % port)
    assert engine.handles[0] is stranger and len(engine.handles) == 2 and not any(one.stopped for one in engine.handles)


def test_one_that_has_ended_is_said_and_replaced(folder, engine, capfd):
    port = free_port()
    server, _ = run(folder, port=port)
    [first] = engine.handles
    first.become("exited", 3)
    code, out, _ = cli(capfd, "--status", "--port", str(port))
    assert code == 0 and out.startswith(
        "%s on port %d has ended with code 3: see pipedock serve --logs --port %d" % (folder, port, port)
    )
    run(folder, port=port)
    assert len(engine.handles) == 1 and engine.handles[0] is not first


def test_two_at_once_on_one_port(folder, engine):
    """The name is Docker's to give away: the second is told, and touches nothing."""
    port = free_port()
    other = Handle(engine, "pipedock-serve-%d" % port, {"pipedock.port": str(port)})
    create_container = engine.create_container

    def meanwhile(*args, **options):
        engine.handles.append(other)
        return create_container(*args, **options)

    engine.create_container = meanwhile
    assert "port %d: pipedock serve is starting a server there already" % port in fails(UserError, folder, port=port)
    assert engine.handles == [other]
    engine.handles.clear()
    engine.create_container = create_container
    engine.create_error = refused("Conflict", 409)
    assert "port %d: another pipedock serve has just begun or ended there; try again" % port in fails(UserError, folder, port=port)


def test_a_port_in_use_is_known_before_anything_is_created(folder, engine):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert "cannot listen on 127.0.0.1 port %d: Address already in use" % port in fails(UserError, folder, port=port)
    assert engine.created == []


def test_an_embedded_server_is_told_of_the_container_on_its_port(folder, engine):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        engine.handles.append(labelled(engine, port))
        assert "port %d: already served (m, container c)" % port in fails(UserError, folder, engine="embedded", port=port)


def test_in_the_foreground_its_log_is_copied_and_it_is_removed(folder, engine, capfd):
    engine.log = b"one\ntwo"
    code, out, err = cli(capfd, "--engine", "tgi", "--model", str(folder), "--port", str(free_port()))
    assert code == 0 and out.startswith(str(folder)) and err.endswith("one\ntwo\n") and engine.handles == []


def test_in_the_foreground_a_bad_end_is_explained(folder, engine, capfd):
    engine.log, engine.end_code = b"torch.cuda.OutOfMemoryError: CUDA out of memory. Tried\n", 1
    code, _, err = cli(capfd, "--engine", "tgi", "--model", str(folder), "--port", str(free_port()))
    assert code == 1 and "the server ended after it was ready: the GPU's memory is too small (torch.cuda.OutOfMemoryError" in err
    assert engine.handles == []


def test_ctrl_c_stops_it(folder, engine, monkeypatch, capfd):
    def interrupted(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(found.Found, "lines", interrupted)
    code, _, err = cli(capfd, "--engine", "tgi", "--model", str(folder), "--port", str(free_port()))
    assert code == 0 and "stopping; requests under way are finished first" in err and engine.handles == []
    engine.end_code = 143  # nothing but the SIGTERM that it was sent
    assert cli(capfd, "--engine", "tgi", "--model", str(folder), "--port", str(free_port()))[0] == 0
    engine.end_code = 137
    code, _, err = cli(capfd, "--engine", "tgi", "--model", str(folder), "--port", str(free_port()))
    assert code == 1 and "asked to stop, the server ended with code 137; its log: " in err


def test_ctrl_c_while_it_is_loading(folder, engine, monkeypatch):
    def interrupted(url):
        raise KeyboardInterrupt

    monkeypatch.setattr(start, "healthy", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(folder)
    assert engine.created and engine.handles == []


def test_one_that_never_answers_is_stopped(folder, engine, monkeypatch):
    monkeypatch.setattr(start, "healthy", lambda url: False)
    engine.log = b"Waiting for shard to be ready\n"
    text = fails(RunFailed, folder, timeout=0)
    assert text.startswith("not healthy after 0 s; the end of ") and text.endswith(".log:\nWaiting for shard to be ready\n")
    assert engine.handles == []


def test_vllm_is_tried_by_its_own_routes(folder, engine):
    server, _ = run(folder, engine="vllm")
    lines = server.state.document()["try"]
    assert len(lines) == 2 and "/v1/completions " in lines[0] and '"model":"my-model"' in lines[0]
    assert not any("/generate" in line for line in lines)


def test_0_8_has_no_chat_route():
    engine = Engine()
    handle = labelled(engine, 1)
    handle.labels["pipedock.version"] = "0.8.2"
    lines = found.Found(engine, handle).document()["try"]
    assert [line.partition(" -X")[0] for line in lines] == ["curl u/generate", "curl -N u/generate_stream"]


def test_a_key_is_in_no_line_of_the_log():
    """TGI prints its settings as it starts, over several lines."""
    engine = Engine()
    handle = labelled(engine, 1)
    handle.log = b'a\r\n    api_key: Some(\n        "secret",\n    ),\n\x1b[2mapi_key: Some("secret")\x1b[0m\nlast "secret" stays'
    shown = found.Found(engine, handle)
    lines = ["a", "    api_key: Some(", '        "***",', "    ),", 'api_key: Some("***")', 'last "secret" stays']
    assert list(shown.lines()) == [line + "\n" for line in lines]
    assert shown.said().splitlines() == lines and engine.timeout == 60


def test_one_that_somebody_else_removes(folder, engine, monkeypatch, capfd):
    """While it is loading, and while its log is followed."""

    def gone(*args, **options):
        raise docker.errors.NotFound("No such container: c")

    server, _ = run(folder, port=free_port())
    monkeypatch.setattr(Handle, "wait", gone)
    assert [*server.lines()] == []
    with pytest.raises(RunFailed, match="the container is gone, somebody else has removed it: No such container: c"):
        server.wait()
    monkeypatch.setattr(Handle, "reload", gone)
    assert fails(RunFailed, folder, port=free_port()).startswith("the container is gone, somebody else has removed it")


def test_an_engine_that_ends_meanwhile(engine):
    def broken(*args, **options):
        raise requests.exceptions.ConnectionError("Connection aborted.")

    one = found.Found(engine, labelled(engine, 1))
    one.handle.logs = broken
    for call in (one.said, lambda: list(one.lines())):
        with pytest.raises(RunFailed, match="Docker's engine refuses, or answers no more: Connection aborted."):
            call()
