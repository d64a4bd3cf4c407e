"""compose/road.py, what the services run inside their containers, without containers."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROAD = Path(__file__).resolve().parents[2] / "compose" / "road.py"
RUN = "run: {out: %s}\nmodel: {path: %s}\ndata: {train: data/x.jsonl}\nparallel: {pipe: 2}\n"


@pytest.fixture
def road():
    spec = importlib.util.spec_from_file_location("road", ROAD)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def workspace(tmp_path, monkeypatch):
    for name in ("data", "models", "runs", "exports"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def started(road, monkeypatch):
    """The commands that ``train`` starts, all of which end well."""
    ran, usual = [], road.subprocess.Popen

    class Child:
        def wait(self):
            return 0

    def popen(command, *more, **named):
        if command[0] != "pipedock":  # what makes the example
            return usual(command, *more, **named)
        assert named["start_new_session"], "Ctrl-C in a terminal would reach it twice"
        ran.append(command)
        return Child()

    monkeypatch.setattr(road.subprocess, "Popen", popen)
    monkeypatch.setattr(road.signal, "signal", lambda number, handler: None)
    return ran


@pytest.mark.parametrize("action", ["train", "export"])
@pytest.mark.parametrize(
    "text, message",
    [
        (RUN % ("/tmp/elsewhere", "m"), "run.yaml: run.out: /tmp/elsewhere would be lost with the container; put it under runs/"),
        (RUN % ("out", "m"), "run.yaml: run.out: out would be lost with the container; put it under runs/"),
        (
            RUN % ("runs/a", "m") + "export: {dir: elsewhere}\n",
            "run.yaml: export.dir: elsewhere would be lost with the container; put it under exports/",
        ),
        (RUN % ("runs/a", "m") + "exports: {}\n", 'exports: unknown key. Did you mean "export"?'),
    ],
)
def test_what_would_be_lost_with_the_container_is_refused(road, workspace, capsys, action, text, message):
    (workspace / "run.yaml").write_text(text, encoding="utf-8")
    assert road.main(action, "run.yaml") == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and message in said[0]


def test_a_run_config_that_docker_made_a_folder_of(road, workspace, capsys):
    (workspace / "run.yaml").mkdir()
    assert road.main("train", "run.yaml") == 2
    assert capsys.readouterr().err == ("train: run.yaml: a folder here, so RUN_CONFIG names no file; it is relative to the "
                                       "repository's folder, RUN_CONFIG=my/run.yaml\n")  # fmt: skip


def test_the_example_is_made_once(road, workspace, monkeypatch, started):
    """Real records and a real tokenizer, and no second making over what the user may have changed."""
    compose = ROAD.parent / "run.yaml"
    assert road.main("train", str(compose)) == 0
    assert started == [["pipedock", "train", "--config", str(compose), "--resume", "auto"]]
    records = [json.loads(line) for line in Path(road.EXAMPLE_DATA).read_text(encoding="utf-8").splitlines()]
    assert len(records) == 80 and {r["type"] for r in records} == {"conversation"}
    assert json.loads(Path(road.EXAMPLE_MODEL, "config.json").read_text())["model_type"] == "bloom"
    Path(road.EXAMPLE_DATA).write_text("mine\n", encoding="utf-8")
    assert road.main("train", str(compose)) == 0
    assert Path(road.EXAMPLE_DATA).read_text() == "mine\n"


def test_a_run_of_the_users_own_makes_no_example(road, workspace, started):
    (workspace / "run.yaml").write_text(RUN % ("runs/a", "models/mine"), encoding="utf-8")
    assert road.main("train", "run.yaml") == 0
    assert os.listdir("data") == [] and os.listdir("models") == []


@pytest.mark.parametrize(
    "env, flags",
    [
        ({}, []),
        ({"NODES": "", "NODE_RANK": "", "HOSTFILE": ""}, []),
        ({"NODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "a"}, ["--nodes", "2", "--node-rank", "1", "--master-addr", "a"]),
        (
            {"NODES": "2", "NODE_RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": "7"},
            ["--nodes", "2", "--node-rank", "0", "--master-addr", "a", "--master-port", "7"],
        ),
        ({"HOSTFILE": "cluster/hostfile"}, ["--hostfile", "cluster/hostfile"]),
        ({"HOSTFILE": "cluster/hostfile", "MASTER_PORT": "7"}, ["--hostfile", "cluster/hostfile", "--master-port", "7"]),
        ({"MASTER_PORT": "7"}, []),
    ],
)
def test_several_nodes_by_the_environment(road, workspace, monkeypatch, started, env, flags):
    (workspace / "cluster").mkdir()
    (workspace / "cluster/hostfile").write_text("a slots=1\n")
    (workspace / "run.yaml").write_text(RUN % ("runs/a", "models/mine"), encoding="utf-8")
    for name in ("NODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT", "HOSTFILE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    assert road.main("train", "run.yaml") == 0
    assert started == [["pipedock", "train", "--config", "run.yaml", "--resume", "auto", *flags]]


@pytest.mark.parametrize(
    "env, message",
    [
        ({"NODES": "2"}, "NODES: set NODE_RANK and MASTER_ADDR too, on every node"),
        ({"NODE_RANK": "1"}, "NODE_RANK: set NODES and MASTER_ADDR too, on every node"),
        ({"HOSTFILE": "h", "NODES": "2"}, "HOSTFILE and NODES are two ways to name the nodes; unset one"),
        ({"HOSTFILE": "h"}, "HOSTFILE=h: no such file in the container; put it into cluster/, HOSTFILE=cluster/hostfile"),
    ],
)
def test_nodes_that_are_named_by_half(road, workspace, monkeypatch, capsys, env, message):
    (workspace / "run.yaml").write_text(RUN % ("runs/a", "models/mine"), encoding="utf-8")
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    assert road.main("train", "run.yaml") == 2
    assert capsys.readouterr().err == "train: %s\n" % message


def test_current_follows_the_last_export(road, workspace, monkeypatch):
    commands = []

    def run(command):
        commands.append(command)
        Path(command[command.index("--output") + 1] if "--output" in command else "exports").mkdir(exist_ok=True)
        return road.subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(road.subprocess, "run", run)
    for name in ("a", "b"):
        (workspace / "run.yaml").write_text(RUN % ("runs/" + name, "m"), encoding="utf-8")
        assert road.main("export", "run.yaml") == 0
        assert os.readlink("exports/current") == name, "a relative link, for containers that mount exports/ elsewhere"
    assert commands[0] == ["pipedock", "to-hf", "--input", "runs/a", "--output", "exports/a", "--target", "hf", "--overwrite"]
    assert commands[1] == ["pipedock", "verify", "--checkpoint", "runs/a", "--export", "exports/a"]


@pytest.mark.parametrize("stack, section, target", [
    ("cuda", "", "tgi-3"), ("cu116", "", "tgi-0.8"), ("cpu", "", "hf"),
    ("cuda", "export: {dir: exports/x, target: vllm}\n", "vllm"),
])  # fmt: skip
def test_an_export_is_for_the_server_of_the_stack_or_as_run_yaml_says(road, workspace, monkeypatch, stack, section, target):
    commands = []
    monkeypatch.setattr(
        road.subprocess, "run", lambda command: commands.append(command) or road.subprocess.CompletedProcess(command, 0)
    )
    monkeypatch.setenv("STACK", stack)
    (workspace / "run.yaml").write_text(RUN % ("runs/x", "m") + section, encoding="utf-8")
    assert road.main("export", "run.yaml") == 0
    assert commands[0][commands[0].index("--target") + 1] == target


PIPEDOCK = """#!%s
import pathlib, signal, sys, time
signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(1))
pathlib.Path("exports/x").mkdir()
if "slow" in open("run.yaml").read():
    pathlib.Path("started").touch()
    time.sleep(60)
pathlib.Path("exports/x/config.json").touch()
"""


@pytest.fixture
def on_path(workspace, monkeypatch):
    """A command named pipedock that exports, or waits for a signal."""
    (workspace / "bin").mkdir()
    command = workspace / "bin/pipedock"
    command.write_text(PIPEDOCK % sys.executable)
    command.chmod(0o755)
    monkeypatch.setenv("PATH", "%s:%s" % (command.parent, os.environ["PATH"]))


def environment():
    return dict(os.environ, PYTHONPATH=str(ROAD.parents[1]))


def test_what_a_training_exports_is_current(workspace, on_path):
    (workspace / "run.yaml").write_text(RUN % ("runs/x", "m") + "export: {dir: exports/x}\n", encoding="utf-8")
    done = subprocess.run([sys.executable, str(ROAD), "train", "run.yaml"], env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert os.readlink("exports/current") == "x" and "exports/current -> exports/x" in done.stderr


def test_a_stopped_training_is_told_and_serves_nothing(workspace, on_path):
    (workspace / "run.yaml").write_text(RUN % ("runs/slow", "m") + "export: {dir: exports/x}\n", encoding="utf-8")
    process = subprocess.Popen([sys.executable, str(ROAD), "train", "run.yaml"], env=environment())
    while not Path("started").exists():
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 1 and not os.path.lexists("exports/current")


def test_a_proof_that_fails_is_not_served(road, workspace, monkeypatch):
    def run(command):
        return road.subprocess.CompletedProcess(command, 1 if "verify" in command else 0)

    monkeypatch.setattr(road.subprocess, "run", run)
    (workspace / "run.yaml").write_text(RUN % ("runs/a", "m"), encoding="utf-8")
    with pytest.raises(SystemExit) as stopped:
        road.main("export", "run.yaml")
    assert stopped.value.code == 1 and not os.path.lexists("exports/current")
