"""``pipedock preflight`` as a user runs it: alone, as two nodes on the loopback interface, and when all is not well."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any, Dict, List

import pytest

import pipedock
from tests.free_port import free_port
from tests.unit.test_preflight_nodes import make_run

ROOT = Path(__file__).resolve().parents[2]
TWO = ["--nodes", "2", "--master-addr", "127.0.0.1"]


@pytest.fixture
def env(tmp_path: Path) -> Dict[str, str]:
    clean = {name: value for name, value in os.environ.items() if not name.endswith("_SOCKET_IFNAME")}
    return dict(clean, DS_ACCELERATOR="cpu", XDG_CACHE_HOME=str(tmp_path / "cache"), OMP_NUM_THREADS="1")


def start(env: Dict[str, str], *arguments: str) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / "pipedock.py"), "preflight"] + list(arguments)
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)


def ended(process: subprocess.Popen) -> List[Any]:
    """[exit code, stdout, stderr]"""
    try:
        out, err = process.communicate(timeout=120)
    finally:
        process.kill()
    return [process.returncode, out, err]


def config_file(root: Path, **changed: str) -> str:
    run = make_run(root, **changed)
    text = "run: {out: %s}\nmodel: {path: %s}\ndata: {train: %s}\nparallel: {pipe: 2}\n"
    (root / "run.yaml").write_text(text % (run.run.out, run.model.path, run.data.train))
    return str(root / "run.yaml")


def test_one_machine(env: Dict[str, str], tmp_path: Path) -> None:
    code, out, err = ended(start(env, "--config", config_file(tmp_path)))
    assert code == 0 and out.endswith("ready\n"), out + err
    for word in (
        "versions",
        "/dev/shm",
        "ulimits",
        "disk",
        "memory",
        "DS_ACCELERATOR=cpu: training runs on the CPU",
        "gloo, 2 ranks",
    ):
        assert word in out


def test_two_nodes(env: Dict[str, str], tmp_path: Path) -> None:
    """Two processes with files of their own: real sockets, real ranks of gloo."""
    port = str(free_port())
    nodes = [start(env, "--json", "--config", config_file(tmp_path / rank), "--node-rank", rank, "--master-port", port, *TWO)
             for rank in "01"]  # fmt: skip
    documents = []
    for code, out, err in map(ended, nodes):
        assert code == 0, out + err
        documents.append(json.loads(out))
    first, second = documents
    assert first == second and first["ok"] and len(first["names"]) == 2
    assert (
        first["bandwidth"]["ranks"] == [1, 1]
        and first["bandwidth"]["neighbours"][0][0] > 0
        and first["bandwidth"]["all_reduce"] > 0
    )
    said = {row["check"]: row["said"] for row in first["findings"]}
    assert "GLOO_SOCKET_IFNAME=lo" in said["network"] and "weights" in said["same everywhere"] and "2 ranks" in said["bandwidth"]


def test_two_nodes_that_differ_and_a_blocked_port(env: Dict[str, str], tmp_path: Path) -> None:
    """Every node says all of it and ends with 2."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        nodes = [start(env, "--config", config_file(tmp_path / rank, data=rank), "--node-rank", rank, "--master-port", port, *TWO)
                 for rank in "01"]  # fmt: skip
        for code, out, err in map(ended, nodes):
            assert code == 2 and out.endswith("not ready\n") and "bandwidth" not in out, out + err
            assert "FAIL  same everywhere  data differs between the nodes: train:" in out
            assert "FAIL  ports            port %s cannot be used: Address already in use" % port in out
            assert "fix: end what uses it (sudo ss -ltnp 'sport = :%s')" % port in out
            [line] = err.strip().splitlines()[-1:]
            assert line.startswith("pipedock preflight: 2 checks failed: same everywhere: data differs") and "Traceback" not in err


def hostfile(tmp_path: Path, env: Dict[str, str], pdsh: str) -> List[str]:
    """Two names of this machine, and a pdsh that does this with the command for the other one."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("pdsh", "ssh"):
        (tools / name).write_text("#!/bin/sh\nfor last; do :; done\n%s\n" % pdsh)
        (tools / name).chmod(0o755)
    env["PATH"] = str(tools) + os.pathsep + env["PATH"]
    (tmp_path / "hosts").write_text("127.0.0.1 slots=1\nlocalhost slots=1\n")
    return ["--hostfile", str(tmp_path / "hosts"), "--master-port", str(free_port())]


def test_a_hostfile_starts_the_others(env: Dict[str, str], tmp_path: Path) -> None:
    arguments = hostfile(tmp_path, env, 'exec sh -c "$last"')
    code, out, err = ended(start(env, "--no-bandwidth", "--json", "--config", config_file(tmp_path), *arguments))
    assert code == 0, out + err
    assert json.loads(out)["names"] == ["127.0.0.1", "localhost"] and "started on localhost by pdsh" in err


def test_a_host_that_cannot_be_logged_in_to(env: Dict[str, str], tmp_path: Path) -> None:
    arguments = hostfile(tmp_path, env, "echo 'Permission denied (publickey).' >&2; exit 255")
    code, out, err = ended(start(env, "--no-bandwidth", *arguments))
    assert code == 2 and "node 1 (localhost) cannot be logged in to: Permission denied" in err, out + err


def test_a_machine_that_is_not_ready_is_one_json_document(env: Dict[str, str], tmp_path: Path) -> None:
    path = config_file(tmp_path)
    (tmp_path / "train.jsonl").unlink()
    code, out, err = ended(start(env, "--json", "--config", path))
    document = json.loads(out)
    assert code == 2 and document["ok"] is False and document["bandwidth"] is None
    [failed] = [row for row in document["findings"] if row["level"] == "failure"]
    assert failed["check"] == "files" and "train.jsonl is not here" in failed["said"] and "rsync -a" in failed["fix"]
    assert document["error"].startswith("1 check failed: node 0 (")


@pytest.mark.parametrize("arguments, message", [
    (["--nodes", "2"], "--nodes 2: needs --node-rank"),
    (["--node-rank", "1"], "--node-rank: goes with --nodes"),
    (["--nodes", "2", "--node-rank", "2", "--master-addr", "a"], "--node-rank 2: with --nodes 2 it is one of 0 to 1"),
    (["--master-port", "5"], "--master-port: goes with --nodes"),
    (["--nodes", "2", "--node-rank", "0", "--master-addr", "a", "--master-port", "65535"], "must be one of 1 to 65534"),
    (["--set", "a.b=1"], "--set: overrides keys of run.yaml; name one with --config"),
])  # fmt: skip
def test_wrong_words(arguments: List[str], message: str, capfd: Any) -> None:
    assert pipedock.main(["preflight"] + arguments) == 2
    err = capfd.readouterr().err
    assert message in err and len(err.strip().splitlines()) == 1, err


def test_the_table_on_a_terminal() -> None:
    """rich's, as wide as the terminal: the fix stands below its cause."""
    from verbs import preflight

    rows = [{"check": "ports", "level": "failure", "said": "port 1 is shut", "fix": "open it", "node": 0},
            {"check": "clock", "level": "ok", "said": "0.1 s apart", "fix": "", "node": None}]  # fmt: skip

    class Terminal:
        def isatty(self) -> bool:
            return True

    shown = preflight._shown({"ok": False, "names": ["a"], "findings": rows}, Terminal())
    assert "node 0 (a)" in shown and "together" in shown and "fix: open it" in shown and "\x1b[" in shown
