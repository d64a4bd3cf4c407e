"""The folders of checkpoints: how they appear, which are kept, what a full disk says. No torch, no pipeline."""

import errno
import json
import logging
import os
import shutil
from types import SimpleNamespace

import pytest

from pipeline_train import checkpoint_folder, families, manifest, run_folder
from pipeline_train.errors import RunFailed, UserError
from tests.models import tiny_config

CONFIG = tiny_config("llama", num_hidden_layers=1)

DOCUMENT = {
    "format": manifest.FORMAT, "kind": "checkpoint", "family": "llama", "run_dtype": "fp32", "layer_dtype": "fp32",
    "tied": families.dims_of(CONFIG).tied, "layers": 3, "versions": {}, "run_name": "",
    "training": {"optimizer": "adamw", "optimizer_steps": 1, "feed": {}, "loss_scaler": {}},
}  # fmt: skip


def fill(folder, content=b"x"):
    for layer in range(3):
        (folder / manifest.layer_file(layer)).write_bytes(content)
        (folder / manifest.optim_file(layer)).write_bytes(content)


def make(parent, name, whole=True):
    folder = parent / name
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    fill(folder)
    files = {path.name: manifest.file_entry(path) for path in folder.iterdir()}
    manifest.write(folder, dict(DOCUMENT, step=int(name[5:11]), files=files))
    if not whole:
        (folder / manifest.layer_file(0)).write_bytes(b"")
    return folder


def names(parent):
    return sorted(p.name for p in parent.iterdir())


def test_the_newest_whole_ones_are_kept(tmp_path):
    for step in (2, 4, 6):
        make(tmp_path, "step_%06d" % step)
    checkpoint_folder.prune(make(tmp_path, "step_000008"), 2)
    assert names(tmp_path) == ["step_000006", "step_000008"]
    checkpoint_folder.prune(tmp_path / "step_000008", 1)
    assert names(tmp_path) == ["step_000008"]


def test_broken_newer_ones_go_and_the_one_just_written_stays(tmp_path):
    make(tmp_path, "step_000004")
    for step in (8, 12, 16):
        make(tmp_path, "step_%06d" % step, whole=False)  # a resume from 4 passed them over
    (make(tmp_path, "step_000020") / manifest.layer_file(0)).write_bytes(b"y")  # this one too: another hash, the same size
    checkpoint_folder.prune(make(tmp_path, "step_000006"), 2)
    assert names(tmp_path) == ["step_000004", "step_000006"]


def test_a_whole_newer_one_is_kept_under_another_name(tmp_path, caplog):
    make(tmp_path, "step_000008")
    (tmp_path / "kept-step_000008-1").mkdir()  # from an earlier time
    with caplog.at_level(logging.WARNING, "pipedock"):
        checkpoint_folder.prune(make(tmp_path, "step_000006"), 1)
    assert names(tmp_path) == ["kept-step_000008-1", "kept-step_000008-2", "step_000006"]
    manifest.check_hashes(tmp_path / "kept-step_000008-2")
    assert "step_000008: is whole and newer than step 6, which this run has saved: kept as kept-step_000008-2" in caplog.text
    assert [path.name for path in run_folder.checkpoints(tmp_path)] == ["step_000006"]
    assert manifest.find_checkpoint(make(tmp_path / "run" / "checkpoints", "step_000006").parent).name == "step_000006"


def test_what_cannot_be_read_is_not_deleted(tmp_path, monkeypatch, caplog):
    for step in (2, 4, 8):
        make(tmp_path, "step_%06d" % step)
    read = manifest.read

    def stale(folder):
        if folder.name in ("step_000004", "step_000008"):
            raise manifest.Unreadable(folder, OSError(errno.ESTALE, os.strerror(errno.ESTALE)))
        return read(folder)

    monkeypatch.setattr(manifest, "read", stale)
    with caplog.at_level(logging.WARNING, "pipedock"):
        checkpoint_folder.prune(make(tmp_path, "step_000006"), 1)
    assert names(tmp_path) == ["step_000004", "step_000006", "step_000008"] and caplog.text.count("not deleted: ") == 2
    caplog.clear()
    monkeypatch.setattr(manifest.os, "listdir", unreadable)
    with caplog.at_level(logging.WARNING, "pipedock"):
        checkpoint_folder.prune(tmp_path / "step_000006", 1)
    assert "old checkpoints are not deleted: %s: cannot be read: Input/output error" % tmp_path in caplog.text


def unreadable(path):
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def test_what_a_failed_save_leaves_is_said_as_it_is(tmp_path, monkeypatch):
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    said = lambda: str(checkpoint_folder.unwritable(tmp_path / "x", tmp_path, full))  # noqa: E731
    before = "%s: cannot be written: No space left on device. " % (tmp_path / "x")
    assert said() == before + "Nothing was saved yet."
    make(tmp_path, "step_000002", whole=False)
    assert said() == before + "Nothing was saved yet."
    make(tmp_path, "step_000004")
    assert said() == before + "The last checkpoint is whole."
    monkeypatch.setattr(manifest.os, "listdir", unreadable)
    assert said() == before + "Look at that disk."


def test_broken_older_ones_do_not_count(tmp_path):
    make(tmp_path, "step_000002")
    make(tmp_path, "step_000004", whole=False)
    checkpoint_folder.prune(make(tmp_path, "step_000006"), 2)
    assert names(tmp_path) == ["step_000002", "step_000006"]


def test_other_names_are_left_alone(tmp_path):
    make(tmp_path, "step_000002.bak")
    (tmp_path / "step_000001").write_text("a file")
    (tmp_path / "step_best").mkdir()
    checkpoint_folder.prune(make(tmp_path, "step_000006"), 1)
    assert names(tmp_path) == ["step_000001", "step_000002.bak", "step_000006", "step_best"]


@pytest.fixture
def beside(tmp_path):
    """What is copied into every checkpoint."""
    folder = tmp_path / "resolved" / "model"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


def write(parent, step, beside, content=b"x"):
    """A save as checkpoint.Saver makes it."""
    final = parent / ("step_%06d" % step)
    checkpoint_folder.begin(final, 1)
    fill(checkpoint_folder.aside_of(final), content)
    files = {path.name: manifest.file_entry(path) for path in checkpoint_folder.aside_of(final).iterdir()}
    checkpoint_folder.complete(final, dict(DOCUMENT, step=step, files=files), beside)
    return final


def test_a_folder_appears_whole_with_the_files_beside_and_is_the_latest(tmp_path, beside):
    for step in (2, 4):
        final = write(tmp_path / "checkpoints", step, beside)
        manifest.check_hashes(final)
        assert len(manifest.read(final)["files"]) == 7 and "config.json" in manifest.read(final)["files"]
        assert (final.parent / "latest").read_text() == final.name + "\n"
    assert names(final.parent) == ["latest", "step_000002", "step_000004"]


def test_the_same_step_again_takes_the_place_of_the_first(tmp_path, beside):
    final = write(tmp_path / "checkpoints", 2, beside)
    write(final.parent, 2, beside, b"new")
    assert (final / manifest.layer_file(0)).read_bytes() == b"new" and names(final.parent) == ["latest", final.name]


def test_a_start_puts_back_what_was_about_to_be_replaced(tmp_path, beside):
    final = write(tmp_path / "checkpoints", 2, beside)
    other = write(final.parent, 4, beside)
    os.replace(str(final), str(run_folder.old_of(final)))  # killed here
    shutil.copytree(str(other), str(run_folder.old_of(other)))  # or here, a moment later
    checkpoint_folder.aside_of(final).mkdir()
    run_folder.take(tmp_path, "run.yaml", print)
    assert names(final.parent) == ["latest", "step_000002", "step_000004"]
    manifest.check_hashes(final)


def test_no_room_is_said_before_anything_is_written(tmp_path, beside, monkeypatch):
    before = write(tmp_path / "checkpoints", 2, beside)
    monkeypatch.setattr(checkpoint_folder.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 9, 3 * 2**29))
    checkpoint_folder.begin(before.with_name("step_000004"), 3 * 2**29)
    with pytest.raises(RunFailed) as failed:
        checkpoint_folder.begin(before.with_name("step_000004"), 5 * 2**29)
    assert str(failed.value) == (
        "%s: a checkpoint needs 2.50 GiB, only 1.50 GiB are free on that disk; make room or lower train.keep. "
        "The last checkpoint is whole." % before.with_name("step_000004")
    )
    assert names(before.parent) == ["latest", "step_000002"]


def test_a_lower_keep_makes_room_before_the_work_begins(tmp_path, beside, monkeypatch):
    """What the message of a full disk advises."""
    for step in (2, 4, 6):
        newest = write(tmp_path / "checkpoints", step, beside)
    free = [100, 100 + 2 * 2**20, 100 + 2 * 2**20]
    monkeypatch.setattr(checkpoint_folder.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 9, free.pop(0)))
    monkeypatch.setattr(checkpoint_folder, "nbytes", lambda *unused: 2**20)
    run = SimpleNamespace(run=SimpleNamespace(out=str(tmp_path)), optim=SimpleNamespace(type="adamw"),
                          train=SimpleNamespace(keep=1))  # fmt: skip
    checkpoint_folder.check_room(run, None, "run.yaml", 3, print, None, newest)
    assert names(newest.parent) == ["latest", "step_000006"]
    free[:] = [100]
    with pytest.raises(UserError, match="a checkpoint needs 1.00 MiB, only 100 bytes are free|only 0.00 MiB are free"):
        checkpoint_folder.check_room(run, None, "run.yaml", 3, print)


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "checkpoints").write_text("a file")
    with pytest.raises(
        RunFailed, match="checkpoints/.tmp-step_000004: cannot be written: (Not a directory|File exists). Nothing was saved yet.$"
    ):
        checkpoint_folder.begin(tmp_path / "checkpoints" / "step_000004", 1)
