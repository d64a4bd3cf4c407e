"""Bringing a scattered checkpoint to one node over ssh, with and without rsync, and the verb. ssh is tests/fake_ssh.py: the nodes'
run folders have the same path, /proc/self/cwd/out, which means another folder in every process, as on real nodes."""

import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import pipedock
from pipeline_train import arrival, checkpoint, gather_ssh, manifest
from pipeline_train.errors import UserError
from tests.free_port import free_port
from tests.thread_nodes import Cluster, at_once

ROOT = Path(__file__).resolve().parents[2]
SAME_PATH = "/proc/self/cwd/out"
WAYS = ["ssh"] + (["rsync"] if shutil.which("rsync") else [])  # ci/test.sh installs none


@pytest.fixture
def cluster(monkeypatch, capfd, tmp_path):
    """Two nodes, a has layers 0 and 1, b has 2, 3 and 4; each one's hosts and tools in ``env``."""
    found = Cluster(monkeypatch, tmp_path)
    found.save([4])
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "ssh").write_text('#!/bin/sh\nexec %s %s "$@"\n' % (shlex.quote(sys.executable), ROOT / "tests" / "fake_ssh.py"))
    (tools / "ssh").chmod(0o755)
    for name in ("sh", "cat"):
        (tools / name).symlink_to(shutil.which(name))
    (tmp_path / "hostfile").write_text("a slots=1\nb slots=1\n")
    found.tools, found.log, found.patch, found.said = tools, tmp_path / "log", monkeypatch, capfd
    found.hosts = {name: str(tmp_path / name) for name in found.names}
    return found


def fetched(cluster, way, *more, node=0, hostfile="hostfile"):
    """``pipedock gather`` on a node -> (exit code, its document, what it said)."""
    if way == "rsync" and not (cluster.tools / "rsync").exists():
        (cluster.tools / "rsync").symlink_to(shutil.which("rsync"))
    arguments = ["gather", "--json", "--input", SAME_PATH, "--hostfile", str(cluster.root / hostfile)] + list(more)
    with cluster.patch.context() as patched:
        patched.setenv("PATH", str(cluster.tools))
        patched.setenv("FAKE_HOSTS", json.dumps(cluster.hosts))
        patched.setenv("FAKE_LOG", str(cluster.log))
        patched.setenv("PDSH_SSH_ARGS_APPEND", "-p 2222 -i 'a key'")
        patched.chdir(cluster.root / cluster.names[node])
        code = pipedock.main(arguments)
    said = cluster.said.readouterr()
    return code, json.loads(said.out), said.err


def calls(cluster):
    return [json.loads(line) for line in cluster.log.read_text().splitlines()]


def lacking(cluster, node):
    folder = checkpoint.folder(cluster.outs[node], 4)
    manifest.check_hashes(folder)
    assert [path.name for path in folder.iterdir() if path.name.startswith(".")] == []
    return arrival.lacking(folder, manifest.parse(folder))


@pytest.mark.parametrize("way", WAYS)
def test_what_is_missing_comes_from_the_nodes_that_have_it(cluster, way):
    code, document, said = fetched(cluster, way, node=1, hostfile="hostfile")
    assert code == 0 and lacking(cluster, 1) == [] and len(lacking(cluster, 0)) == 6
    size = sum((checkpoint.folder(cluster.outs[0], 4) / name).stat().st_size for name in layers(0, 1))
    assert (document["files"], document["bytes"], document["step"]) == (4, size, 4)
    assert document["checkpoint"] == SAME_PATH + "/checkpoints/step_000004"
    assert "step_000004: 4 files, 0." in said and "layer_000.safetensors: 0.00 MiB from node 0 (a)" in said
    options = ["-p", "2222", "-i", "a key", "-o", "BatchMode=yes"]
    assert all(call[:6] == options and "a" in call for call in calls(cluster))
    assert len(calls(cluster)) == (1 if way == "rsync" else 4)
    code, document, said = fetched(cluster, way, node=1)
    assert (code, document["files"], said) == (0, 0, "")


def layers(*numbers):
    return [manifest.layer_file(n) for n in numbers] + [manifest.optim_file(n) for n in numbers]


@pytest.mark.parametrize("way", WAYS)
def test_a_file_that_was_damaged_is_refused_and_the_rest_stays(cluster, way):
    path = checkpoint.folder(cluster.outs[1], 4) / manifest.layer_file(3)
    good = path.read_bytes()
    path.write_bytes(good[:-1] + b"?")
    code, document, said = fetched(cluster, way)
    words = "/step_000004/layer_003.safetensors: what came from node 1 (b) is not what was saved (its size or sha256 is not that of"
    assert code == 1 and words in document["error"]
    assert manifest.layer_file(2) not in lacking(cluster, 0) and manifest.layer_file(3) in lacking(cluster, 0)
    path.write_bytes(good)
    assert fetched(cluster, way)[0] == 0 and lacking(cluster, 0) == []


@pytest.mark.parametrize("way", WAYS)
def test_files_that_are_gone_there_are_named(cluster, way):
    (checkpoint.folder(cluster.outs[1], 4) / manifest.layer_file(3)).unlink()
    code, document, _ = fetched(cluster, way)
    assert code == 1 and "does not come from node 1 (b): " in document["error"] and "No such file" in document["error"]
    assert manifest.layer_file(2) not in lacking(cluster, 0)


@pytest.mark.parametrize("way", WAYS)
def test_a_host_that_is_not_reached_is_named(cluster, way):
    del cluster.hosts["b"]
    code, document, _ = fetched(cluster, way)
    assert code == 1 and document["error"] == (
        "node 1 (b) cannot be reached by ssh: ssh: connect to host b port 22: Connection refused. Set its port and key in "
        "PDSH_SSH_ARGS_APPEND or ~/.ssh/config"
    )


@pytest.mark.parametrize("way", WAYS)
def test_the_next_node_that_wrote_a_file_gives_it_when_the_first_does_not(monkeypatch, tmp_path, cluster, way):
    three = Cluster(monkeypatch, tmp_path / "three", pipe=1, data=3, nodes=3)
    three.save([4])
    three.tools, three.log, three.patch, three.said = cluster.tools, cluster.log, cluster.patch, cluster.said
    three.hosts = {name: str(three.root / name) for name in "ac"}  # b is away
    (three.root / "hostfile").write_text("a slots=1\nb slots=1\nc slots=1\n")
    for name in layers(2, 3):
        (checkpoint.folder(three.outs[0], 4) / name).unlink()
    assert fetched(three, way, "--input", SAME_PATH + "/checkpoints/step_000004")[0] == 0 and lacking(three, 0) == []


@pytest.mark.skipif("rsync" not in WAYS, reason="no rsync on this machine")
def test_where_the_other_end_has_no_rsync_ssh_alone_brings_it(cluster):
    (cluster.tools / "ssh").write_text(
        (cluster.tools / "ssh").read_text().replace("exec", "PATH=%s exec" % (cluster.root / "bare"))
    )
    (cluster.root / "bare").mkdir()
    (cluster.root / "bare" / "cat").symlink_to(shutil.which("cat"))
    code, document, _ = fetched(cluster, "rsync")
    assert code == 0 and lacking(cluster, 0) == [] and len(calls(cluster)) == 7


@pytest.mark.skipif("rsync" not in WAYS, reason="no rsync on this machine")
def test_what_rsync_had_when_it_was_cut_short_is_not_sent_again(cluster):
    there, here = (checkpoint.folder(cluster.outs[node], 4) for node in (1, 0))
    (here / ".gather-rsync").mkdir()
    name = manifest.layer_file(2)
    (here / ".gather-rsync" / name).write_bytes((there / name).read_bytes()[:-100])
    assert fetched(cluster, "rsync")[0] == 0 and lacking(cluster, 0) == []


def test_without_the_optimizer(cluster):
    code, document, _ = fetched(cluster, "ssh", "--without-optimizer")
    assert (code, document["files"]) == (0, 3) and lacking(cluster, 0) == [manifest.optim_file(n) for n in (2, 3, 4)]


@pytest.mark.parametrize("text, message", [
    ("a slots=1\n", "does not name node 1 (b) of the checkpoint; add it, or list the hosts of all 2 nodes in their order"),
    ("a slots=1\nx slots=1\ny slots=1\n", "hostfile: does not name node 1 (b) of the checkpoint"),
])  # fmt: skip
def test_a_hostfile_that_does_not_fit(cluster, text, message):
    (cluster.root / "hostfile").write_text(text)
    with pytest.raises(UserError) as refused:
        gather_ssh.fetch(cluster.outs[0], cluster.root / "hostfile", print)
    assert message in str(refused.value)


def test_hosts_by_their_order(cluster):
    """The manifest has the machines' own names, the hostfile has addresses."""
    document = manifest.parse(checkpoint.folder(cluster.outs[0], 4))
    assert gather_ssh.hosts_of(document, ["10.0.0.1", "10.0.0.2"], Path("h"), Path("x")) == ["10.0.0.1", "10.0.0.2"]
    assert gather_ssh.hosts_of(document, ["b", "c", "a"], Path("h"), Path("x")) == ["a", "b"]


def test_a_file_that_no_other_node_has(cluster):
    folder = checkpoint.folder(cluster.outs[0], 4)
    (folder / manifest.layer_file(0)).unlink()
    code, document, _ = fetched(cluster, "ssh", "--input", SAME_PATH + "/checkpoints/step_000004")
    assert code == 1 and document["error"].endswith("layer_000.safetensors: only this node had it; use another checkpoint")
    plain = manifest.parse(folder)
    del plain["where"]
    manifest.write(folder, plain)
    code, document, _ = fetched(cluster, "ssh", "--input", SAME_PATH + "/checkpoints/step_000004")
    assert code == 2 and "layer_000.safetensors: missing, and manifest.json does not say where it is" in document["error"]


@pytest.mark.parametrize("arguments, message", [
    ([], "name the hosts with --hostfile, or run it on every node with --nodes, --node-rank and --master-addr"),
    (["--nodes", "2", "--node-rank", "1"], "--nodes 2: needs --node-rank (0 to 1, another one on every node) and --master-addr"),
    (["--nodes", "2", "--node-rank", "2", "--master-addr", "a"], "--node-rank 2: with --nodes 2 it is one of 0 to 1"),
    (["--nodes", "1", "--node-rank", "0", "--master-addr", "a"], "--nodes 1: one node has nothing to gather from"),
    (["--hostfile", "h", "--nodes", "2"], "--hostfile: fetches over ssh to this node alone; it goes without --nodes and its like"),
    (["--hostfile", "h", "--everywhere"], "--hostfile: fetches over ssh to this node alone; it goes without --nodes and its like"),
    (["--hostfile", "/no/file"], "/no/file: cannot be read: No such file or directory"),
])  # fmt: skip
def test_what_the_verb_refuses(tmp_path, capfd, arguments, message):
    assert pipedock.main(["gather", "--input", str(tmp_path)] + arguments) == 2
    said = capfd.readouterr().err
    assert said.startswith("pipedock gather: " + message) and said.count("\n") == 1


def run_verb(path, *arguments):
    command = [sys.executable, str(ROOT / "pipedock.py"), "gather", "--input", str(path)] + list(arguments)
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_the_verb_on_every_node(cluster):
    port = str(free_port() - 1)
    nodes = [["--nodes", "2", "--node-rank", str(n), "--master-addr", "127.0.0.1", "--master-port", port, "--everywhere"]
             for n in (0, 1)]  # fmt: skip
    here, there = at_once([lambda n=n: run_verb(cluster.outs[n], *nodes[n]) for n in (0, 1)])
    assert here.returncode == there.returncode == 0, (here.stderr, there.stderr)
    assert here.stdout.startswith("%s: 6 files, 0." % checkpoint.folder(cluster.outs[0], 4)) and " came in " in here.stdout
    assert there.stdout.startswith("%s: 4 files, 0." % checkpoint.folder(cluster.outs[1], 4))
    assert lacking(cluster, 0) == lacking(cluster, 1) == []
    here, there = at_once([lambda n=n: run_verb(cluster.outs[n], *nodes[n]) for n in (0, 1)])
    assert here.stdout == "%s: nothing was missing here\n" % checkpoint.folder(cluster.outs[0], 4)
