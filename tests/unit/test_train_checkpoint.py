"""Which checkpoints are kept, and what a full disk says: no pipeline is started."""

import errno
import os

import pytest

pytest.importorskip("deepspeed")
import torch  # noqa: E402
from safetensors import SafetensorError  # noqa: E402

from pipeline_train import checkpoint, manifest  # noqa: E402
from pipeline_train.errors import RunFailed  # noqa: E402


def make(parent, name, whole=True):
    folder = parent / name
    folder.mkdir(parents=True)
    (folder / manifest.layer_file(0)).write_bytes(b"x")
    files = {manifest.layer_file(0): manifest.file_entry(folder / manifest.layer_file(0))}
    manifest.write(folder, {
        "format": manifest.FORMAT, "kind": "checkpoint", "family": "llama", "run_dtype": "fp32", "layer_dtype": "fp32",
        "tied": True, "layers": 1, "step": int(name[5:11]), "files": files, "versions": {}, "run_name": "",
        "training": {"optimizer": "adamw", "optimizer_steps": 1, "feed": {}, "loss_scaler": {}},
    })  # fmt: skip
    if not whole:
        (folder / manifest.layer_file(0)).write_bytes(b"")
    return folder


def names(parent):
    return sorted(p.name for p in parent.iterdir())


def test_the_newest_whole_ones_are_kept(tmp_path):
    for step in (2, 4, 6):
        make(tmp_path, "step_%06d" % step)
    checkpoint.prune(make(tmp_path, "step_000008"), 2)
    assert names(tmp_path) == ["step_000006", "step_000008"]
    checkpoint.prune(tmp_path / "step_000008", 1)
    assert names(tmp_path) == ["step_000008"]


def test_broken_newer_ones_go_and_the_one_just_written_stays(tmp_path):
    make(tmp_path, "step_000004")
    for step in (8, 12, 16):
        make(tmp_path, "step_%06d" % step, whole=False)  # a resume from 4 passed them over
    (make(tmp_path, "step_000020") / manifest.layer_file(0)).write_bytes(b"y")  # this one too: another hash, the same size
    checkpoint.prune(make(tmp_path, "step_000006"), 2)
    assert names(tmp_path) == ["step_000004", "step_000006"]


def test_broken_older_ones_do_not_count(tmp_path):
    make(tmp_path, "step_000002")
    make(tmp_path, "step_000004", whole=False)
    checkpoint.prune(make(tmp_path, "step_000006"), 2)
    assert names(tmp_path) == ["step_000002", "step_000006"]


def test_other_names_are_left_alone(tmp_path):
    make(tmp_path, "step_000002.bak")
    (tmp_path / "step_000001").write_text("a file")
    (tmp_path / "step_best").mkdir()
    checkpoint.prune(make(tmp_path, "step_000006"), 1)
    assert names(tmp_path) == ["step_000001", "step_000002.bak", "step_000006", "step_best"]


@pytest.mark.parametrize("error", [
    OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
    SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
])  # fmt: skip
def test_a_full_disk_is_one_line(tmp_path, monkeypatch, error):
    def full(*arguments, **options):
        raise error

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(RunFailed) as failed:
        checkpoint.write(tmp_path / "layer_000.safetensors", {"w": torch.zeros(3)})
    message = str(failed.value)
    assert message.startswith("%s: cannot be written: " % (tmp_path / "layer_000.safetensors"))
    assert "No space left on device" in message and message.endswith(". The last checkpoint is whole.")


class Stage:
    """What checkpoint.save asks of a pipeline, with one rank and one layer."""

    layers, tied_weight = {0: torch.nn.Linear(2, 2, bias=False)}, None


class Pipe:
    stage, data_rank, moments, base_optimizer = Stage(), 0, (), None

    class config:
        class parallel:
            data = 1

    def read_whole(self, parameter, moment=None):
        return parameter.detach()


@pytest.fixture
def one_rank(monkeypatch):
    def alone(into, value):
        into[0] = value

    monkeypatch.setattr(checkpoint.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(checkpoint.dist, "get_world_size", lambda: 1)
    monkeypatch.setattr(checkpoint.dist, "barrier", lambda: None)
    monkeypatch.setattr(checkpoint.dist, "all_gather_object", alone)
    monkeypatch.setattr(checkpoint, "_optimizer_steps", lambda pipe: 1)


def test_a_save_that_fails_leaves_nothing_and_touches_no_checkpoint(tmp_path, monkeypatch, one_rank):
    before = make(tmp_path / "checkpoints", "step_000002")

    def full(tensors, path, metadata):
        open(path, "wb").write(b"half")
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(RunFailed, match="layer_000.safetensors: cannot be written: .* The last checkpoint is whole.$"):
        checkpoint.save(Pipe(), tmp_path, 4, {})
    assert names(tmp_path / "checkpoints") == ["step_000002"] and manifest.read(before)


def test_a_disk_that_is_full_at_the_end_of_a_save(tmp_path, monkeypatch, one_rank):
    def full(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoint, "_document", lambda *arguments: {"files": {}})
    monkeypatch.setattr(checkpoint.manifest, "write", full)
    (tmp_path / "resolved" / "model").mkdir(parents=True)
    with pytest.raises(RunFailed, match="step_000004: cannot be written: No space left on device. The last checkpoint is whole.$"):
        checkpoint.save(Pipe(), tmp_path, 4, {})
    assert names(tmp_path / "checkpoints") == []
