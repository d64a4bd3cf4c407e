"""checkpoint.Saver: what it writes and when, with one rank and no pipeline; crashes are in test_train_crash.py."""

import errno
import json
import logging
import os
import stat
import threading

import pytest
import torch.distributed as dist
from safetensors.torch import load_file

from pipeline_train import checkpoint, host, manifest
from pipeline_train.errors import RunFailed
from tests.fake_pipe import Pipe
from tests.models import tiny_config


@pytest.fixture(scope="module", autouse=True)
def alone(tmp_path_factory):
    """A process group of one."""
    store = tmp_path_factory.mktemp("store") / "file"
    dist.init_process_group("gloo", init_method="file://%s" % store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def out(tmp_path):
    (tmp_path / "resolved" / "model").mkdir(parents=True)
    (tmp_path / "resolved" / "model" / "config.json").write_text(json.dumps(tiny_config("llama")))
    return tmp_path


@pytest.fixture
def gate(monkeypatch):
    """Files are written only after gate.set()."""
    opened = threading.Event()
    write = checkpoint.write_file

    def wait(path, tensors):
        assert opened.wait(30)
        return write(path, tensors)

    monkeypatch.setattr(checkpoint, "write_file", wait)
    yield opened
    opened.set()


def names(out):
    return sorted(path.name for path in (out / "checkpoints").iterdir())


def holds(out, step, value=None):
    """The checkpoint is whole and all its weights and moments are those of ``step``."""
    folder = checkpoint.folder(out, step)
    manifest.check_hashes(folder)
    document = manifest.read(folder)
    assert document["step"] == document["training"]["optimizer_steps"] == step and document["training"]["feed"] == {"data": "d"}
    for layer in range(document["layers"]):
        for tensor in load_file(str(folder / manifest.layer_file(layer))).values():
            assert tensor.unique().tolist() == [step]
        for name, tensor in load_file(str(folder / manifest.optim_file(layer))).items():
            assert tensor.unique().tolist() == [step + 1 + ("exp_avg", "exp_avg_sq").index(name.split("::")[1])]
    return True


@pytest.mark.parametrize("wished", [True, False])
def test_a_save_holds_its_step_and_is_reported_once(out, wished):
    pipe = Pipe(async_save=wished)
    saver = checkpoint.Saver(pipe, out, {"data": "d"})
    assert saver.poll() == []
    pipe.set(3)
    saver.save(3)
    finished = saver.finish()
    assert holds(out, 3) and [(f["step"], f["path"], f["asynchronous"]) for f in finished] == [
        (3, "checkpoints/step_000003", wished)
    ]
    assert 0 <= finished[0]["stall_s"] and 0 < finished[0]["seconds"]
    assert saver.poll() == saver.finish() == []


def test_behind_the_next_steps_the_old_weights_are_written(out, gate):
    pipe = Pipe()
    saver = checkpoint.Saver(pipe, out, {"data": "d"})
    pipe.set(3)
    saver.save(3)
    assert saver.poll() == []
    pipe.set(4)  # the next step
    assert saver.poll() == [] and names(out) == [".tmp-step_000003"]
    gate.set()
    assert [fields["step"] for fields in saver.finish()] == [3] and holds(out, 3)


def test_a_second_save_waits_for_the_first(out, gate):
    pipe = Pipe()
    saver = checkpoint.Saver(pipe, out, {"data": "d"})
    pipe.set(3)
    saver.save(3)
    pipe.set(5)
    threading.Timer(0.3, gate.set).start()
    saver.save(5)
    finished = saver.finish()
    assert [fields["step"] for fields in finished] == [3, 5] and holds(out, 3) and holds(out, 5)
    assert finished[0]["stall_s"] > 0.1  # the wait is the first one's: it was not done


def test_a_disk_that_hangs_shows_no_signs_of_life_and_one_that_writes_does(out, gate):
    """Else a run whose disk never answers would wait for ever, ticking."""
    pipe = Pipe()
    saver, pulse = checkpoint.Saver(pipe, out, {"data": "d"}), pipe.watched.pulse
    saver.save(3)
    seen = []

    def look():
        seen.append(pulse.ticks)
        if len(seen) == 2:
            gate.set()

    for after in (0.5, 1.0):  # WAIT_S is less
        threading.Timer(after, look).start()
    saver.finish()
    assert seen[0] == seen[1] and pulse.board.sign(0).doing == "saving"
    assert pulse.ticks >= seen[1] + 2 * pipe.dims.layers  # a sign for each file


def test_the_same_step_is_saved_once(out):
    pipe = Pipe()
    saver = checkpoint.Saver(pipe, out, {"data": "d"})
    pipe.set(3)
    saver.save(3)
    saver.save(3)
    assert len(saver.finish()) == 1
    saver.save(3)
    assert saver.finish() == []


@pytest.mark.parametrize("free", [None, 10000])
def test_without_the_memory_training_waits_and_the_log_says_so(out, monkeypatch, caplog, free):
    monkeypatch.setattr(host, "available_memory", lambda: free)
    pipe = Pipe()
    saver = checkpoint.Saver(pipe, out, {"data": "d"})
    pipe.set(2)
    with caplog.at_level(logging.WARNING, "pipedock"):
        saver.save(2)
    assert [fields["asynchronous"] for fields in saver.poll()] == [False] and holds(out, 2)
    values = sum(p.numel() for layer in pipe.stage.layers.values() for p in layer.parameters())
    assert (
        "train.async_save: %s of host memory are not free twice: training waits for this save" % host.size(12 * values)
        in caplog.text
    )


def test_just_enough_memory_is_enough(out, monkeypatch):
    pipe = Pipe()
    saver = checkpoint.Saver(pipe, out, {"data": "d"})
    values = sum(p.numel() for layer in pipe.stage.layers.values() for p in layer.parameters())
    for free, wanted in ((2 * 12 * values, True), (2 * 12 * values - 1, False)):
        monkeypatch.setattr(host, "available_memory", lambda free=free: free)
        pipe.set(pipe.steps + 1)
        saver.save(pipe.steps)
        assert [fields["asynchronous"] for fields in saver.finish()] == [wanted]


@pytest.mark.parametrize("wished", [True, False])
@pytest.mark.parametrize("error, words", [
    (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "layer_002.safetensors: cannot be written: No space left on device. The"),
    (ValueError("odd"), "odd"),
])  # fmt: skip
def test_a_save_that_fails_leaves_nothing_and_touches_no_checkpoint(out, monkeypatch, wished, error, words):
    pipe = Pipe(async_save=wished)
    saver = checkpoint.Saver(pipe, out, {"data": "d"})
    pipe.set(2)
    saver.save(2)
    saver.finish()
    write = checkpoint.write_file

    def full(path, tensors):
        if path.name == manifest.layer_file(2):
            raise error
        return write(path, tensors)

    monkeypatch.setattr(checkpoint, "write_file", full)
    with pytest.raises(RunFailed, match=words):
        saver.save(4)
        saver.finish()
    assert names(out) == ["latest", "step_000002"] and holds(out, 2)


@pytest.mark.parametrize("wished", [True, False])
def test_a_disk_that_is_full_at_the_end_of_a_save(out, monkeypatch, wished):
    def full(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoint.checkpoint_folder.manifest, "write", full)
    saver = checkpoint.Saver(Pipe(async_save=wished), out, {})
    with pytest.raises(RunFailed, match="step_000004: cannot be written: No space left on device. Nothing was saved yet.$"):
        saver.save(4)
        saver.finish()
    assert names(out) == []


def test_no_room_stops_the_save_before_it_begins(out, monkeypatch):
    saver = checkpoint.Saver(Pipe(), out, {})
    saver.needed = 2**60
    with pytest.raises(
        RunFailed,
        match="step_000004: a checkpoint needs 1073741824.00 GiB, only .* GiB are free on that disk; .* Nothing was saved yet.$",
    ):
        saver.save(4)
    assert names(out) == []


@pytest.mark.parametrize("family", ["llama", "bloom"])
def test_the_space_asked_for_is_the_space_taken(out, family):
    pipe = Pipe(family, async_save=False)
    saver = checkpoint.Saver(pipe, out, {"data": "d"})
    saver.save(1)
    taken = sum(path.stat().st_size for path in checkpoint.folder(out, 1).iterdir())
    assert taken <= saver.needed < taken + 2**20 + 2**17


def test_a_checkpoints_files_have_the_modes_of_the_umask(out):
    before = os.umask(0o027)
    try:
        saver = checkpoint.Saver(Pipe(async_save=False), out, {})
        saver.save(1)
    finally:
        os.umask(before)
    assert {stat.S_IMODE(path.stat().st_mode) for path in checkpoint.folder(out, 1).iterdir()} == {0o640}


def test_only_the_newest_are_kept(out):
    saver = checkpoint.Saver(Pipe(keep=2), out, {})
    for step in (1, 2, 3):
        saver.save(step)
    saver.finish()
    assert names(out) == ["latest", "step_000002", "step_000003"]
