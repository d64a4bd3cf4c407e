"""Bringing a scattered checkpoint together through the control channel: real connections, every node a thread of this process."""

import errno
import json
import os
import shutil

import pytest

from pipeline_train import arrival, checkpoint, gather, manifest, run_folder, scattered
from pipeline_train.errors import RunFailed, UserError
from tests.thread_nodes import Cluster, joined


@pytest.fixture
def cluster(monkeypatch, tmp_path):
    """Two nodes, a has layers 0 and 1, b has 2, 3 and 4."""
    found = Cluster(monkeypatch, tmp_path)
    found.save([2, 4])
    return found


def brought(cluster, what="", said=None, **options):
    """bring() on all nodes; ``what``: below the run's folder. -> its documents, or exceptions."""
    lines = [] if said is None else said

    def work(channel):
        return gather.bring(channel, cluster.outs[channel.node] / what, lines.append, **options)

    return joined(cluster.names, work)


def whole(cluster, node, step, optimizer=True):
    folder = checkpoint.folder(cluster.outs[node], step)
    document = manifest.read(folder)
    manifest.check_hashes(folder, document)
    return not arrival.lacking(folder, document, optimizer) and not [p for p in folder.iterdir() if p.name.startswith(".gather")]


def stream(monkeypatch, change):
    """``change``: of what a node sends, (name, data) -> data, or an exception."""
    send = gather.Channel.send

    def call(self, node, document, payload=b""):
        if "left" in document:
            payload = change(document["name"], payload)
        send(self, node, document, payload)

    monkeypatch.setattr(gather.Channel, "send", call)


@pytest.mark.parametrize("what", ["", "checkpoints", "checkpoints/step_000004"])
def test_to_node_0_or_everywhere(cluster, what):
    said = []
    here, there = brought(cluster, what, said)
    folder = checkpoint.folder(cluster.outs[0], 4)
    size = sum((checkpoint.folder(cluster.outs[1], 4) / name).stat().st_size for name in names_of([2, 3, 4]))
    assert {k: v for k, v in here.items() if k != "seconds"} == {
        "checkpoint": str(folder), "step": 4, "files": 6, "bytes": size,
    }  # fmt: skip
    assert (there["files"], there["step"]) == (0, 4) and here["seconds"] >= 0
    assert said[0].startswith("%s: 0." % (folder / "layer_002.safetensors")) and said[0].endswith(" MiB from node 1 (b)")
    assert len(said) == 6 and whole(cluster, 0, 4) and not whole(cluster, 1, 4) and not whole(cluster, 0, 2)
    here, there = brought(cluster, what, everywhere=True)
    assert (here["files"], there["files"]) == (0, 4) and whole(cluster, 0, 4) and whole(cluster, 1, 4)
    assert [document["files"] for document in brought(cluster, what, everywhere=True)] == [0, 0]
    for node in (0, 1):
        scattered.check_layout(checkpoint.folder(cluster.outs[node], 4), [0, 1, 2, 3, 4])


def names_of(layers):
    return [manifest.layer_file(n) for n in layers] + [manifest.optim_file(n) for n in layers]


def test_without_the_optimizer(cluster):
    here, _ = brought(cluster, optimizer=False)
    assert here["files"] == 3 and whole(cluster, 0, 4, optimizer=False) and not whole(cluster, 0, 4)
    assert brought(cluster)[0]["files"] == 3 and whole(cluster, 0, 4)


def test_three_nodes_and_files_of_several_parts(monkeypatch, tmp_path):
    monkeypatch.setattr(gather, "PART", 100)
    cluster = Cluster(monkeypatch, tmp_path, pipe=3, nodes=3)
    cluster.save([1])
    assert [document["files"] for document in brought(cluster, everywhere=True)] == [8, 6, 6]
    assert all(whole(cluster, node, 1) for node in range(3))


@pytest.mark.parametrize("lost", [0, 1])
def test_a_folder_that_a_node_has_lost_comes_back(monkeypatch, tmp_path, lost):
    """Replicas: each node has everything."""
    cluster = Cluster(monkeypatch, tmp_path, pipe=1, data=2)
    cluster.save([4])
    shutil.rmtree(str(cluster.outs[lost] / "checkpoints"))
    documents = brought(cluster, everywhere=True)
    assert documents[lost]["files"] == 11 and documents[1 - lost]["files"] == 0
    assert whole(cluster, lost, 4) and cluster.names_of(lost) == ["step_000004"]
    assert scattered.agreed([run_folder.whole_steps(out) for out in cluster.outs]) == [4]


def test_what_is_nowhere_is_said_and_an_older_one_is_taken_of_a_run(cluster):
    for out in cluster.outs:
        (checkpoint.folder(out, 4) / manifest.layer_file(3)).unlink(missing_ok=True)
    (checkpoint.folder(cluster.outs[1], 4) / manifest.optim_file(2)).unlink()
    for error in brought(cluster, "checkpoints/step_000004"):
        assert isinstance(error, UserError)
        assert str(error).endswith("checkpoints/step_000004: layer_003.safetensors and 1 more on none of the 2 nodes")
    said = []
    assert brought(cluster, said=said)[0]["step"] == 2 and whole(cluster, 0, 2)
    parents = [out / "checkpoints" for out in cluster.outs]
    for parent in parents:
        assert "passed over: %s/step_000004: layer_003.safetensors and 1 more on none of the 2 nodes" % parent in said
        assert "the newest that can be whole is %s/step_000002: name that one to to-hf, verify and a resume" % parent in said


def test_parts_of_different_saves_are_not_mixed(cluster):
    folder = checkpoint.folder(cluster.outs[1], 4)
    manifest.write(folder, dict(manifest.parse(folder), run_name="another"))
    for error in brought(cluster, "checkpoints/step_000004"):
        assert isinstance(error, UserError) and "step_000004: layer_002.safetensors and 5 more on none of the 2 nodes" in str(error)
    brought(cluster, "checkpoints/step_000002")
    manifest.write(checkpoint.folder(cluster.outs[1], 2), dict(manifest.parse(checkpoint.folder(cluster.outs[1], 2)), run_name="b"))
    for error in brought(cluster, "checkpoints/step_000002", everywhere=True):
        assert str(error).endswith("step_000002: on node 1 (b) it comes from another save than on node 0 (a); move it away there")


def test_nothing_is_there(cluster):
    for error in brought(cluster, "elsewhere"):
        assert isinstance(error, UserError) and str(error).endswith("checkpoints: no checkpoint there on any of the 2 nodes")


def test_a_file_that_was_damaged_is_refused_and_the_rest_stays(cluster, monkeypatch):
    path = checkpoint.folder(cluster.outs[1], 4) / manifest.layer_file(4)
    good = path.read_bytes()
    path.write_bytes(good[:-1] + b"?")
    here, there = brought(cluster)
    wanted = "%s: what came from node 1 (b) is not what was saved (its size or sha256 is not that of manifest.json); is its disk " \
             "or the network damaged? If it stays so, name an older checkpoint" % (
                 checkpoint.folder(cluster.outs[0], 4) / manifest.layer_file(4))  # fmt: skip
    assert isinstance(here, RunFailed) and str(here) == wanted and str(there) == "node 0 (a): " + wanted
    left = sorted(p.name for p in checkpoint.folder(cluster.outs[0], 4).iterdir())
    assert manifest.layer_file(3) in left and manifest.layer_file(4) not in left and not [n for n in left if n.startswith(".")]
    path.write_bytes(good)
    here, there = brought(cluster)  # goes on
    assert here["files"] == 4 and whole(cluster, 0, 4)


@pytest.mark.parametrize("change", [lambda data: data[:-1], lambda data: data + b"x", lambda data: b"", lambda data: data[::-1]])
def test_what_the_network_has_changed_is_refused(cluster, monkeypatch, change):
    stream(monkeypatch, lambda name, data: change(data) if name == manifest.optim_file(2) else data)
    here, _ = brought(cluster)
    assert isinstance(here, RunFailed) and "optim_002.safetensors: what came from node 1 (b) is not what was saved" in str(here)
    assert not (checkpoint.folder(cluster.outs[0], 4) / manifest.optim_file(2)).exists()


def test_a_manifest_that_the_network_has_changed_is_refused(monkeypatch, tmp_path):
    cluster = Cluster(monkeypatch, tmp_path, pipe=1, data=2)
    cluster.save([4])
    shutil.rmtree(str(cluster.outs[0] / "checkpoints"))
    with monkeypatch.context() as patched:
        stream(patched, lambda name, data: data.replace(b"llama", b"bloom") if name == manifest.NAME else data)
        here, _ = brought(cluster, everywhere=True)
    assert isinstance(here, RunFailed) and "manifest.json: what came from node 1 (b) is not what was saved" in str(here)
    assert run_folder.checkpoints(cluster.outs[0] / "checkpoints") == []
    brought(cluster, everywhere=True)
    assert whole(cluster, 0, 4)


def test_a_node_that_dies_meanwhile_is_named_and_the_same_command_goes_on(cluster, monkeypatch):
    def gone(name, data):
        if name == manifest.optim_file(4):
            raise KeyboardInterrupt
        return data

    with monkeypatch.context() as patched:
        stream(patched, gone)
        here, there = brought(cluster)
    assert isinstance(there, KeyboardInterrupt) and str(here) == "node 1 (b): interrupted"
    assert [p.name for p in checkpoint.folder(cluster.outs[0], 4).iterdir() if p.name.startswith(".")] == []
    for name in (".gather-" + manifest.layer_file(4), ".gather-" + manifest.layer_file(0), ".gather-rsync/x"):  # left by kills
        path = checkpoint.folder(cluster.outs[0], 4) / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"left")
    assert 0 < brought(cluster)[0]["files"] < 6 and whole(cluster, 0, 4)  # of 6, and four may have been on their way


def test_a_full_disk_is_named(cluster, monkeypatch):
    usage, here = shutil.disk_usage, str(cluster.outs[0])
    full = lambda path: shutil._ntuple_diskusage(9, 9, 3 * 2**10) if str(path).startswith(here) else usage(path)  # noqa: E731
    with monkeypatch.context() as patched:
        patched.setattr(arrival.shutil, "disk_usage", full)
        errors = brought(cluster)
    assert "step_000004: the missing files need 0." in str(errors[0]) and "MiB, only 0.00 MiB are free on that disk" in str(
        errors[0]
    )
    assert str(errors[1]) == "node 0 (a): %s" % errors[0]

    def no_space(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(arrival.os, "fsync", no_space)
    assert "layer_002.safetensors: cannot be written: No space left on device" in str(brought(cluster)[0])
    assert not (checkpoint.folder(cluster.outs[0], 4) / manifest.layer_file(2)).exists()


@pytest.mark.parametrize("name", ["../../../escaped", "/tmp/escaped", ".", "node", "manifest.json"])
def test_a_manifest_that_names_files_elsewhere_is_not_followed(cluster, name):
    """Node 1's is what node 0, which has lost its folder, would take."""
    folder = checkpoint.folder(cluster.outs[1], 4)
    document = json.loads((folder / manifest.NAME).read_text())
    document["files"][name] = document["files"][manifest.layer_file(4)]
    document["where"]["files"][name] = [1]
    (folder / manifest.NAME).write_text(json.dumps(document))
    shutil.rmtree(str(cluster.outs[0]))
    found = brought(cluster, "checkpoints/step_000004", everywhere=True)
    assert all(isinstance(error, UserError) and "no checkpoint there on any" in str(error) for error in found)


def test_a_node_gives_nothing_that_is_not_in_its_manifest(cluster, monkeypatch):
    """Whatever another node says is lacking."""
    (cluster.outs[1] / "secret").write_text("secret")
    choose = gather.choose

    def asking(*arguments):
        source, passed = choose(*arguments)
        return source._replace(lacks={0: ["../../secret"], 1: []}, lists=["../../secret"]), passed

    monkeypatch.setattr(gather, "choose", asking)
    here, there = brought(cluster)
    words = "step_000004/../../secret: manifest.json lists no such file, though another node has named it"
    assert words in str(here) and words in str(there)
    assert not [path for path in cluster.root.rglob("*secret*") if path.parent != cluster.outs[1]]


def test_a_folder_that_cannot_be_read_is_said(cluster, monkeypatch):
    parse = manifest.parse

    def stale(folder):
        if str(folder).startswith(str(cluster.outs[1])):
            raise manifest.Unreadable(folder, OSError(errno.ESTALE, os.strerror(errno.ESTALE)))
        return parse(folder)

    monkeypatch.setattr(manifest, "parse", stale)
    here, there = brought(cluster)
    assert "Stale file handle" in str(there) and str(here) == "node 1 (b): %s" % there
