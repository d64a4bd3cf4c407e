"""Checkpoints of nodes without a shared disk: what each node's folder holds, that they are whole on all nodes or on none, and which
one the nodes agree to go on from. Nodes are threads here; tests/integration/test_scattered.py has real ranks."""

import errno
import json
import os
import shutil
import threading

import pytest

from pipeline_train import checkpoint, checkpoint_folder, config, manifest, manifest_where, run_folder, scattered
from pipeline_train.errors import RunFailed, UserError
from pipeline_train.weights import open_source
from tests.thread_nodes import Cluster, at_once, pipe_of, place_of

A_HAS, B_HAS = [0, 1], [2, 3, 4]  # layers, of 5
FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def files_of(layers):
    return sorted([manifest.layer_file(n) for n in layers] + [manifest.optim_file(n) for n in layers]
                  + ["config.json", "manifest.json"])  # fmt: skip


def fails_on(monkeypatch, owner, name, out, error=FULL):
    """Calls of owner.name that have a path below ``out`` as their first argument fail."""
    original = getattr(owner, name)

    def call(path, *arguments):
        if str(path).startswith(str(out)):
            raise error
        return original(path, *arguments)

    monkeypatch.setattr(owner, name, call)


@pytest.mark.parametrize("behind", [True, False])
def test_each_node_has_the_files_its_ranks_wrote_and_the_same_manifest(monkeypatch, tmp_path, behind):
    cluster, shared = Cluster(monkeypatch, tmp_path), Cluster(monkeypatch, tmp_path / "s", shared=True)
    monkeypatch.setattr(checkpoint, "Place", cluster.together)
    monkeypatch.setattr(checkpoint, "dist", cluster.together)
    said = cluster.save([3], async_save=behind)
    assert [[(f["step"], f["path"], f["asynchronous"]) for f in one] for one in said] == [
        [(3, "checkpoints/step_000003", behind)]
    ] * 2
    assert cluster.files(0, 3) == sorted(files_of(A_HAS) + ["node"]) and cluster.files(1, 3) == sorted(files_of(B_HAS) + ["node"])
    monkeypatch.setattr(checkpoint, "Place", shared.together)
    monkeypatch.setattr(checkpoint, "dist", shared.together)
    shared.save([3])
    assert shared.files(0, 3) == files_of(A_HAS + B_HAS)
    together, documents = checkpoint.folder(shared.outs[0], 3), []
    for node, layers in ((0, A_HAS), (1, B_HAS)):
        folder = checkpoint.folder(cluster.outs[node], 3)
        run_folder.check_whole(folder)
        documents.append(manifest.read(folder))
        assert manifest_where.node_of(folder, documents[-1]) == node and (folder.parent / "latest").read_text() == "step_000003\n"
        for name in files_of(layers):
            if name != manifest.NAME:
                assert (folder / name).read_bytes() == (together / name).read_bytes()
    assert documents[0] == documents[1]
    where = documents[0].pop("where")
    assert documents[0] == manifest.read(together)
    assert where["nodes"] == ["a", "b"] and where["files"][manifest.layer_file(1)] == [0]
    assert where["files"][manifest.optim_file(4)] == [1] and where["files"]["config.json"] == [0, 1]


def test_what_a_node_knows_of_itself_does_not_part_the_manifests(monkeypatch, tmp_path):
    """Each node has prepared for itself."""
    cluster = Cluster(monkeypatch, tmp_path)
    monkeypatch.setattr(cluster, "facts", lambda rank: {"data": "d", "now": "2024-05-01T10:00:0%d" % rank})
    cluster.save([2])
    texts = [(checkpoint.folder(out, 2) / manifest.NAME).read_bytes() for out in cluster.outs]
    assert texts[0] == texts[1] and b"10:00:00" in texts[0]


def test_replicas_on_several_nodes_write_their_stage_on_each(monkeypatch, tmp_path):
    cluster = Cluster(monkeypatch, tmp_path, axes=("data", "pipe"), pipe=2, data=2)
    writing = []
    original = checkpoint.write_file
    monkeypatch.setattr(checkpoint, "write_file", lambda path, tensors: writing.append(path.name) or original(path, tensors))
    cluster.save([2], async_save=False)
    for node in (0, 1):
        assert cluster.files(node, 2) == sorted(files_of(A_HAS + B_HAS) + ["node"])
        document = manifest.read(checkpoint.folder(cluster.outs[node], 2))
        assert set(map(tuple, document["where"]["files"].values())) == {(0, 1)}
    assert sorted(writing) == sorted([name for name in files_of(A_HAS + B_HAS) if name[0] in "lo"] * 2)


@pytest.mark.parametrize("axes, nodes", [(("pipe", "data"), 2), (("pipe", "data"), 1), (("data", "pipe"), 1)])
def test_replicas_on_one_node_write_each_file_once(monkeypatch, tmp_path, axes, nodes):
    cluster = Cluster(monkeypatch, tmp_path, axes=axes, pipe=2, data=2, nodes=nodes, shared=False)
    writing, writers = [], set()
    original = checkpoint.write_file

    def write(path, tensors):
        writing.append(path.name)
        writers.add(threading.current_thread())  # kept: the number of one that has ended is given again
        return original(path, tensors)

    monkeypatch.setattr(checkpoint, "write_file", write)
    cluster.save([2])
    assert sorted(writing) == [name for name in files_of(A_HAS + B_HAS) if name[0] in "lo"] and len(writers) == 4
    assert ("node" in cluster.files(0, 2)) == (nodes == 2)  # one node: as ever
    assert ("where" in manifest.read(checkpoint.folder(cluster.outs[0], 2))) == (nodes == 2)


@pytest.mark.parametrize("behind", [True, False])
@pytest.mark.parametrize("owner, name, path", [
    ("checkpoint", "write_file", "step_000004/layer_002.safetensors"), ("folder", "copy", "step_000004"),
    ("manifest", "write", "step_000004"), ("folder", "publish", "step_000004"),
])  # fmt: skip
def test_a_node_that_cannot_write_is_named_by_all_and_nothing_new_is_left(monkeypatch, tmp_path, behind, owner, name, path):
    cluster = Cluster(monkeypatch, tmp_path)
    cluster.save([2])
    module = {"checkpoint": checkpoint, "folder": checkpoint_folder, "manifest": manifest}[owner]
    if name == "copy":
        monkeypatch.setattr(checkpoint_folder, "copy", full_on(cluster.outs[1]))
    else:
        fails_on(monkeypatch, module, name, cluster.outs[1])
    failed = cluster.save([4], async_save=behind, keep=1)
    assert all(isinstance(error, RunFailed) for error in failed) and str(failed[0]) == str(failed[1])
    assert str(failed[0]).startswith("node 1 (b): %s" % (cluster.outs[1] / "checkpoints"))
    assert path in str(failed[0]).replace(".tmp-", "")
    assert str(failed[0]).endswith(": cannot be written: No space left on device. The last checkpoint is whole.")
    for node in (0, 1):
        assert cluster.names_of(node) == ["latest", "step_000002"]
        run_folder.check_whole(checkpoint.folder(cluster.outs[node], 2))


def full_on(out):
    original = checkpoint_folder.copy

    def call(source, target):
        if str(target).startswith(str(out)):
            raise FULL
        return original(source, target)

    return call


def test_a_disk_that_fails_when_all_is_whole_takes_nothing_back(monkeypatch, tmp_path):
    cluster = Cluster(monkeypatch, tmp_path)
    cluster.save([2])
    fails_on(monkeypatch, checkpoint_folder, "settle", cluster.outs[1])
    assert "node 1 (b): " in str(cluster.save([4], keep=1)[0])
    assert cluster.files(0, 4) and cluster.files(1, 4)
    assert scattered.agreed([run_folder.whole_steps(out) for out in cluster.outs]) == [4]


def test_what_was_to_be_replaced_comes_back(monkeypatch, tmp_path):
    cluster = Cluster(monkeypatch, tmp_path)
    cluster.save([2])
    before = [(checkpoint.folder(out, 2) / manifest.NAME).stat().st_ino for out in cluster.outs]
    fails_on(monkeypatch, checkpoint_folder, "publish", cluster.outs[1])
    assert isinstance(cluster.save([2])[0], RunFailed)
    assert [(checkpoint.folder(out, 2) / manifest.NAME).stat().st_ino for out in cluster.outs] == before
    assert [cluster.names_of(node) for node in (0, 1)] == [["latest", "step_000002"]] * 2


def test_no_room_on_one_node_stops_the_save_on_all(monkeypatch, tmp_path):
    cluster = Cluster(monkeypatch, tmp_path)
    usage = shutil.disk_usage

    def full(path):
        return shutil._ntuple_diskusage(9, 9, 3 * 2**19) if str(path).startswith(str(cluster.outs[1])) else usage(path)

    monkeypatch.setattr(checkpoint_folder.shutil, "disk_usage", full)
    assert "node 1" not in str(cluster.save([1])[0])  # its part is less than 1.5 MiB
    monkeypatch.setattr(checkpoint_folder, "SLACK", 2**21)
    failed = cluster.save([2])
    assert str(failed[0]) == str(failed[1])
    assert "node 1 (b): %s: a checkpoint needs 2." % checkpoint.folder(cluster.outs[1], 2) in str(failed[0])
    assert "MiB, only 1.50 MiB are free on that disk; make room or lower train.keep. The last" in str(failed[0])
    assert [cluster.names_of(node) for node in (0, 1)] == [["latest", "step_000001"]] * 2


def test_a_node_needs_room_for_its_part_only(monkeypatch, tmp_path):
    needed = []
    begin = checkpoint_folder.begin
    monkeypatch.setattr(checkpoint_folder, "begin", lambda final, size: needed.append((final, size)) or begin(final, size))
    cluster = Cluster(monkeypatch, tmp_path)
    cluster.save([1])
    dims = pipe_of(0, ("pipe", "data"), 1, 1).dims
    parts = [checkpoint_folder.nbytes(dims, "adamw", layers) for layers in (A_HAS, B_HAS)]
    assert sorted(size for _, size in needed) == sorted(parts) and max(parts) < checkpoint_folder.nbytes(dims, "adamw")
    for final, size in needed:
        assert sum(path.stat().st_size for path in final.iterdir()) <= size


@pytest.mark.parametrize("first", ["{ }", None])
def test_model_folders_that_differ_are_found_before_the_work(monkeypatch, tmp_path, first):
    cluster = Cluster(monkeypatch, tmp_path)
    for out, text in zip(cluster.outs, (first, "{}")):
        if text is not None:
            (out / "resolved" / "model" / "tokenizer.json").write_text(text)
    for error, out in zip(cluster.save([]), cluster.outs):
        path = out / "resolved" / "model" / "tokenizer.json"
        assert str(error) == "node 1 (b): %s is not what node 0 (a) has; make the models of all nodes the same" % path


def test_copies_of_a_file_that_differ_are_no_checkpoint(monkeypatch, tmp_path):
    """Two replicas, and one has counted wrong."""
    cluster = Cluster(monkeypatch, tmp_path, pipe=1, data=2)
    original = checkpoint.write_file

    def write(path, tensors):
        if str(path).startswith(str(cluster.outs[1])) and path.name == manifest.layer_file(3):
            next(iter(tensors.values())).view(-1)[0] += 1e-6
        return original(path, tensors)

    monkeypatch.setattr(checkpoint, "write_file", write)
    failed = cluster.save([2])
    assert "step_000002/layer_003.safetensors is not what node 0 (a) has; make the models" in str(failed[0])
    assert cluster.names_of(0) == cluster.names_of(1) == []


def test_old_ones_go_on_every_node_only_when_the_new_one_is_whole_on_all(monkeypatch, tmp_path):
    cluster = Cluster(monkeypatch, tmp_path)
    seen, lock = [], threading.Lock()
    prune = checkpoint_folder.prune

    def look(final, keep):
        with lock:
            seen.append([cluster.files(node, 4) is not None for node in (0, 1)])
        prune(final, keep)

    monkeypatch.setattr(checkpoint_folder, "prune", look)
    cluster.save([2, 4], keep=1)
    assert [cluster.names_of(node) for node in (0, 1)] == [["latest", "step_000004"]] * 2
    assert seen[2:] == [[True, True]] * 2


def find(cluster, resume, say=None):
    """-> by node: the step found, None, or the message."""
    said = [[] for _ in cluster.outs]
    everyone, barrier = {}, threading.Barrier(len(cluster.outs), timeout=30)

    def node(number):
        def exchange(document):
            everyone[number] = json.loads(json.dumps(document))
            barrier.wait()
            documents = [everyone[n] for n in range(len(cluster.outs))]
            barrier.wait()
            return documents

        try:
            found = scattered.find_together(exchange, cluster.place(number), cluster.outs[number], resume, said[number].append)
        except UserError as error:
            return str(error)
        return found and run_folder.step_of(found)

    results = at_once([lambda number=number: node(number) for number in range(len(cluster.outs))])
    return (results, said) if say else results


def test_the_nodes_go_on_from_the_newest_that_is_whole_on_all(monkeypatch, tmp_path):
    cluster = Cluster(monkeypatch, tmp_path)
    assert find(cluster, None) == find(cluster, "auto") == [None, None]
    assert all("--resume: no checkpoint to continue from" in line for line in find(cluster, "newest"))
    cluster.save([2, 4, 6, 8], keep=4)
    assert find(cluster, "auto") == find(cluster, "newest") == [8, 8]
    shutil.rmtree(str(checkpoint.folder(cluster.outs[1], 8)))  # killed between the renames of the two nodes
    found, said = find(cluster, "auto", True)
    assert found == [6, 6]
    assert said == [["passed over: step_000008: not whole on every node (not on node 1 (b))"]] * 2
    path = checkpoint.folder(cluster.outs[0], 6) / manifest.layer_file(0)  # rotten, of the same size
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    found, said = find(cluster, "auto", True)
    assert found == [4, 4] and "passed over: node 0 (a): %s: its content is not what was written" % path in said[1][1]
    (checkpoint.folder(cluster.outs[1], 4) / manifest.layer_file(2)).write_bytes(b"")
    assert find(cluster, "newest") == [2, 2]


def test_parts_of_different_saves_are_not_taken_for_one(monkeypatch, tmp_path):
    cluster = Cluster(monkeypatch, tmp_path)
    cluster.save([2, 4])
    other = Cluster(monkeypatch, tmp_path / "other")
    other.save([4], async_save=False)
    document = manifest.parse(checkpoint.folder(other.outs[1], 4))
    manifest.write(checkpoint.folder(other.outs[1], 4), dict(document, run_name="another time"))
    shutil.rmtree(str(checkpoint.folder(cluster.outs[1], 4)))
    shutil.copytree(str(checkpoint.folder(other.outs[1], 4)), str(checkpoint.folder(cluster.outs[1], 4)))
    found, said = find(cluster, "auto", True)
    assert found == [2, 2] and "step_000004: not whole on every node (they come from different saves)" in said[0][0]


def test_none_on_every_node_is_refused_with_what_each_has(monkeypatch, tmp_path):
    cluster = Cluster(monkeypatch, tmp_path)
    cluster.save([2, 4])
    shutil.rmtree(str(cluster.outs[1] / "checkpoints"))
    for line in find(cluster, "auto"):
        assert "--resume: no checkpoint is whole on every node: node 0 (a) has steps 4, 2; node 1 (b) has none." in line
        assert "comes back by pipedock gather --input" in line
        assert "--everywhere --nodes N --node-rank R --master-addr A, on every node. Or give run.out another folder." in line


def test_one_that_is_not_whole_anywhere_twice_is_refused(monkeypatch, tmp_path):
    """Whole by its size on every node, rotten on one, and there is no other."""
    cluster = Cluster(monkeypatch, tmp_path)
    cluster.save([2])
    path = checkpoint.folder(cluster.outs[1], 2) / manifest.layer_file(4)
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    assert all("no checkpoint is whole on every node" in line for line in find(cluster, "auto"))


@pytest.mark.parametrize("axes, world, layers", [
    (["pipe", "data"], 4, [[0, 1], [2, 3, 4]]), (["data", "pipe"], 4, [[0, 1, 2, 3, 4]] * 2),
])  # fmt: skip
def test_the_layers_of_a_node(axes, world, layers):
    run = config.parse({
        "run": {"out": "x"}, "model": {"path": "x"}, "data": {"train": "x"},
        "parallel": {"pipe": 2, "data": 2, "axes": axes, "parts": [2, 3]},
    })  # fmt: skip
    assert [scattered.layers_here(run, place_of(node, "ab", world)) for node in (0, 1)] == layers
    assert scattered.layers_here(run, place_of(1, "ab", world, shared=True)) == [0, 1, 2, 3, 4]


def test_another_layout_is_told_which_files_lie_where(monkeypatch, tmp_path):
    cluster = Cluster(monkeypatch, tmp_path)
    cluster.save([400])
    folder = checkpoint.folder(cluster.outs[0], 400)
    scattered.check_layout(folder, A_HAS)
    with pytest.raises(UserError) as refused:
        scattered.check_layout(folder, [1, 2, 3])
    assert str(refused.value) == (
        "%s: layer_002.safetensors and 3 more files lie on node 1 (b): bring them with pipedock gather --input %s --hostfile F; "
        "without ssh, on every node, with --nodes N --node-rank R --master-addr A --everywhere" % (folder, folder)
    )
    other = checkpoint.folder(cluster.outs[1], 400)
    names = [manifest.layer_file(1), manifest.layer_file(4)]
    with pytest.raises(UserError, match="step_000400: layer_001.safetensors lies on node 0 .a.: bring it with .*--master-addr A$"):
        manifest_where.require(other, manifest.read(other), names)
    with pytest.raises(UserError, match="step_000400: layer_000.safetensors and 1 more file lie on node 0 .a.: bring them with"):
        manifest_where.require(other, manifest.read(other), names + [manifest.layer_file(0)])


def test_an_export_is_told_too(monkeypatch, tmp_path):
    cluster = Cluster(monkeypatch, tmp_path)
    cluster.save([400])
    with pytest.raises(UserError, match="step_000400: layer_002.safetensors and 2 more files lie on node 1 .b.: bring them with"):
        open_source(str(cluster.outs[0]))
    here, there = (checkpoint.folder(out, 400) for out in cluster.outs)
    for name in map(manifest.layer_file, B_HAS):
        shutil.copy(str(there / name), str(here / name))
    manifest.check_hashes(open_source(str(cluster.outs[0])).folder, optimizer=False)


@pytest.mark.parametrize("changes, message", [
    ({"where": 5}, "where.nodes: missing or not names of nodes (None)"),
    ({"where": {"nodes": [], "files": {}}}, "where.nodes: missing or not names of nodes (a list)"),
    ({"where": {"nodes": ["a", 5], "files": {}}}, "where.nodes: missing or not names of nodes (a list)"),
    ({"where": {"nodes": ["a"], "files": {}}}, "where.files: does not name the files that it lists"),
    ({"number": [2]}, "where.files: 'config.json': not numbers of its 2 nodes"),
    ({"number": []}, "where.files: 'config.json': not numbers of its 2 nodes"),
    ({"number": [True]}, "where.files: 'config.json': not numbers of its 2 nodes"),
    ({"node": "2"}, "node: '2' is not the number of one of the 2 nodes in manifest.json; use another checkpoint"),
    ({"node": "../a\n\n"}, "node: '../a' is not the number of one of the 2 nodes"),
])  # fmt: skip
def test_what_a_manifest_says_of_nodes_is_judged(monkeypatch, tmp_path, changes, message):
    cluster = Cluster(monkeypatch, tmp_path)
    cluster.save([1])
    folder = checkpoint.folder(cluster.outs[0], 1)
    document = json.loads((folder / manifest.NAME).read_text())
    if "number" in changes:
        document["where"]["files"]["config.json"] = changes["number"]
    document.update({key: value for key, value in changes.items() if key == "where"})
    (folder / manifest.NAME).write_text(json.dumps(document))
    (folder / "node").write_text(changes.get("node", "0"))
    with pytest.raises(UserError) as refused:
        manifest.read(folder)
    assert message in str(refused.value) and str(folder) in str(refused.value) and "\n" not in str(refused.value)


def test_without_the_nodes_number_the_folder_must_hold_everything(monkeypatch, tmp_path):
    cluster = Cluster(monkeypatch, tmp_path)
    cluster.save([1])
    folder = checkpoint.folder(cluster.outs[0], 1)
    (folder / "node").unlink()
    with pytest.raises(UserError, match="layer_002.safetensors: missing, although manifest.json lists it"):
        manifest.read(folder)
    (folder / "node").write_text("0\n")
    (folder / manifest.layer_file(0)).unlink()
    with pytest.raises(UserError, match="layer_000.safetensors: missing, although manifest.json lists it"):
        manifest.read(folder)
