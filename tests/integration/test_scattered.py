"""Two real ranks on two nodes without a shared disk, a run folder each; see scatter_rank.py. Everything from one launch."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from export.to_hf import to_hf
from export.verify import verify
from pipeline_train import checkpoint, manifest, run_folder, scattered
from pipeline_train.errors import UserError
from pipeline_train.place import Node, Place
from tests.free_port import free_port
from tests.models import computed, make_hf, tiny_config
from tests.thread_nodes import joined

RANK = Path(__file__).with_name("scatter_rank.py")
NODES = (Node("a", (0,)), Node("b", (1,)))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """FOLDER of scatter_rank.py, when both ranks have ended."""
    root = tmp_path_factory.mktemp("scattered")
    make_hf(root / "model", computed(tiny_config("llama", tie_word_embeddings=True)))
    for name in ("a", "b", "shared"):
        (root / name / "out" / "resolved").mkdir(parents=True)
        shutil.copytree(str(root / "model"), str(root / name / "out" / "resolved" / "model"),
                        ignore=shutil.ignore_patterns("*.safetensors"))  # fmt: skip
    (root / "port").write_text(str(free_port()))
    env = dict(os.environ, WORLD_SIZE="2", LOCAL_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()),
               OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu")  # fmt: skip
    ranks = []
    for rank in range(2):
        place = Place(rank, NODES, shared=False).environment()
        with open(str(root / ("log.%d" % rank)), "w") as log:
            command = [sys.executable, str(RANK), str(root)]
            ranks.append(subprocess.Popen(command, env=dict(env, RANK=str(rank), LOCAL_RANK="0", **place), stdout=log, stderr=log))
    try:
        codes = [rank.wait(timeout=240) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert codes[1] == -signal.SIGKILL and codes[0] != 0, "\n".join((root / ("log.%d" % r)).read_text()[-3000:] for r in (0, 1))
    return root


@pytest.fixture(scope="module")
def said(root):
    return [torch.load(str(root / ("%d.pt" % rank))) for rank in range(2)]


def out(root, node):
    return root / NODES[node].name / "out"


def test_the_parts_are_the_shared_checkpoint_s_files_and_resume_bit_by_bit(root, said):
    shared = checkpoint.folder(root / "shared" / "out", 2)
    names = set(manifest.read(shared)["files"]) | {"manifest.json", "node"}
    assert set(said[0]["had"]) | set(said[1]["had"]) == names
    assert {name for name in set(said[0]["had"]) & set(said[1]["had"]) if name.endswith(".safetensors")} == set()
    for one in said:
        assert one["third"] == one["third again"]
        for before, after in zip(one["after"], one["after again"]):
            assert sorted(before) == sorted(after) and all(torch.equal(before[name], after[name]) for name in before)
    for name in (name for name in names if name.endswith(".safetensors")):
        assert (root / "gathered" / "step_000002" / name).read_bytes() == (shared / name).read_bytes()


def test_another_layout_is_refused_until_gather_has_been_there_then_learns_the_same(root, said):
    assert said[0]["refused"].startswith("%s: layer_00" % checkpoint.folder(out(root, 0), 2))
    assert "more files lie on node 1 (b): bring them with pipedock gather --input" in said[0]["refused"]
    assert "more files lie on node 0 (a): bring them with pipedock gather --input" in said[1]["refused"]
    assert sum(one["gathered"]["files"] for one in said) == 10
    for one in said:
        assert abs(one["other layout"] - one["third"]) <= 1e-5 * abs(one["third"])
        assert len([name for name in one["replica has"] if name.endswith(".safetensors")]) == 10


def test_a_node_that_is_killed_between_two_renames_costs_that_save_only(root):
    """Node a has step 4, node b had not named it yet; step 3, with keep: 1, is still on both."""
    assert checkpoint.folder(out(root, 0), 4).is_dir() and not checkpoint.folder(out(root, 1), 4).exists()
    for node in (0, 1):
        run_folder.take(out(root, node), "run.yaml", print)
    assert sorted(path.name for path in (out(root, 1) / "checkpoints").iterdir()) == ["latest", "step_000003"]
    run_folder.check_whole(checkpoint.folder(out(root, 0), 4))
    found = joined(["a", "b"], lambda channel: scattered.find_together(
        channel.exchange, Place(channel.node, NODES, False), out(root, channel.node), "auto", print))  # fmt: skip
    assert [path.name for path in found] == ["step_000003"] * 2


def test_the_export_is_told_what_is_missing_and_holds_once_it_is_there(root, tmp_path):
    part, gathered, export = root / "part" / "step_000002", root / "gathered" / "step_000002", tmp_path / "export"
    words = "step_000002: layer_00[0-9].safetensors and . more files? lie on node 1 .b.: bring them with pipedock gather --input"
    with pytest.raises(UserError, match=words):
        to_hf(str(part), str(export))
    to_hf(str(gathered), str(export))
    with pytest.raises(UserError, match=words):
        verify(str(part), str(export))
    proof = verify(str(gathered), str(export))
    assert proof["holds"] and proof["step"] == 2
