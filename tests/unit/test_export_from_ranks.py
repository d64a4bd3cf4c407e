"""export.from_ranks where something goes wrong, with one rank and no pipeline; what it writes: tests/integration."""

import errno
import os
import shutil
from collections import namedtuple

import pytest
import torch
import torch.distributed as dist

from export import from_ranks
from pipeline_train.errors import RunFailed
from pipeline_train.models import init_layer
from tests.fake_pipe import Pipe


@pytest.fixture(scope="module", autouse=True)
def alone(tmp_path_factory):
    """A process group of one."""
    store = tmp_path_factory.mktemp("store") / "file"
    dist.init_process_group("gloo", init_method="file://%s" % store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Trained(Pipe):
    """A rank that holds all weights whole."""

    def __init__(self, dtype="fp32"):
        super().__init__()
        self.config.model.dtype = dtype
        for number, layer in self.stage.layers.items():
            init_layer(layer, self.dims, number, 1)

    def pieces(self, layer, size):
        for name, parameter in self.stage.layers[layer].named_parameters():
            flat = parameter.detach().reshape(-1)
            for start in range(0, len(flat), size):
                yield name, start, flat[start : start + size]


def export(pipe, tmp_path, size="70KB"):
    return from_ranks.write_to(pipe, str(tmp_path / "model"), "hf", size)


def refused(pipe, tmp_path):
    """The message, when nothing is left."""
    with pytest.raises(RunFailed) as error:
        export(pipe, tmp_path)
    assert os.listdir(str(tmp_path)) == []
    return str(error.value)


def test_figures_and_files(tmp_path, monkeypatch):
    monkeypatch.setattr(from_ranks, "PIECE", 1000)
    pipe = Trained()
    written = export(pipe, tmp_path)
    total = 4 * sum(p.numel() for layer in pipe.stage.layers.values() for p in layer.parameters())
    assert written["bytes"] == total and written["ranks"] == 1 and written["gb_per_s"] >= 0
    assert os.listdir(str(tmp_path)) == [".model.partial"], "it has its name only when it is complete"
    names = sorted(os.listdir(str(tmp_path / ".model.partial")))
    assert len(names) > 3 and all(name.endswith("-of-%05d.safetensors" % len(names)) for name in names)
    assert from_ranks.text_of(dict(written, bytes=13480000000, seconds=3.21, gb_per_s=4.199)) == (
        "exported 13.48 GB from 1 ranks in 3.2 s (4.20 GB/s)"
    )


def test_a_short_write_is_gone_on_with(tmp_path, monkeypatch):
    pwrite, calls = os.pwrite, []

    def some(file, data, place):
        calls.append(place)
        return pwrite(file, data[: max(1, len(data) // 2)], place)

    export(Trained(), tmp_path / "whole")
    monkeypatch.setattr(os, "pwrite", some)
    export(Trained(), tmp_path / "halves")
    assert len(calls) > 100
    for path in (tmp_path / "whole/.model.partial").iterdir():
        assert path.read_bytes() == (tmp_path / "halves/.model.partial" / path.name).read_bytes()


def test_a_full_disk(tmp_path, monkeypatch):
    def full(file, data, place):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    assert refused(Trained(), tmp_path) == "export: rank 0: writing failed: No space left on device"


def test_a_disk_that_is_too_small(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**6, 10**6, 1000))
    message = refused(Trained(), tmp_path)
    assert message.startswith("export: rank 0: %s: needs 0." % (tmp_path / "model")) and " are free there; make room" in message


def test_a_weight_that_fp16_cannot_hold(tmp_path):
    pipe = Trained("fp16")
    with torch.no_grad():
        next(pipe.stage.layers[1].parameters())[0] = 70000.0
    message = refused(pipe, tmp_path)
    assert "layers.0." in message and message.endswith("over 65504, which fp16 cannot hold; export with --dtype bf16 or fp32")


def test_a_folder_that_a_rank_does_not_see(tmp_path, monkeypatch):
    monkeypatch.setattr(from_ranks, "_sees", lambda path: not path.is_file())
    written = export(Trained(), tmp_path)
    assert written == {"not_shared": [0]} and os.listdir(str(tmp_path)) == []
    assert from_ranks.text_of({"not_shared": [2, 3]}) == (
        "exporting from the checkpoint: the folder is not on a disk that all ranks see (not seen by rank 2, 3)"
    )


def test_seeing(tmp_path, monkeypatch):
    """A network's file system may show a file later; one that never comes is waited for so long and no longer."""
    monkeypatch.setattr(from_ranks.time, "sleep", lambda seconds: (tmp_path / "a").touch())
    assert from_ranks._sees(tmp_path / "a")
    monkeypatch.setattr(from_ranks, "SEEN_S", 0.0)
    assert not from_ranks._sees(tmp_path / "b")
