"""The writer of weight files: what the safetensors library reads back, and the hash that is made on the way."""

import errno
import hashlib
import json
import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from pipeline_train import manifest
from pipeline_train.weights import writing
from pipeline_train.weights.files import SafetensorsFile
from pipeline_train.weights.writing import Item, TensorFile, write_file

TENSORS = {
    "a.weight": torch.arange(12, dtype=torch.float32).view(3, 4), "b": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
    "scalar": torch.tensor(3.25), "none": torch.zeros(0, 4), "half": torch.tensor([[float("inf")], [1e-7]], dtype=torch.float16),
    "not.in.order": torch.arange(6, dtype=torch.float32).view(2, 3).t(),
}  # fmt: skip


def test_the_library_reads_back_what_was_written(tmp_path):
    path = tmp_path / "x.safetensors"
    entry = write_file(path, TENSORS)
    assert (
        entry == manifest.file_entry(path) == {"size": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    )
    found = load_file(str(path))
    assert list(found) and set(found) == set(TENSORS)
    for name, tensor in TENSORS.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape and torch.equal(found[name], tensor), name
    with safe_open(str(path), framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    ours = SafetensorsFile(path)
    assert all(torch.equal(ours.read(name), tensor) for name, tensor in TENSORS.items())


def test_the_header_is_padded_and_the_data_aligned(tmp_path):
    for length in range(1, 9):
        write_file(tmp_path / "x", {"n" * length: torch.ones(3)})
        data = (tmp_path / "x").read_bytes()
        size = int.from_bytes(data[:8], "little")
        assert size % 8 == 0 and len(data) == 8 + size + 12 and data[8:9] == b"{"
        assert json.loads(data[8 : 8 + size])["n" * length] == {"dtype": "F32", "shape": [3], "data_offsets": [0, 12]}


def test_a_tensor_may_come_in_pieces_larger_and_smaller_than_what_is_hashed_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(writing, "PIECE", 10)
    tensor = torch.arange(100, dtype=torch.float32)
    with TensorFile(tmp_path / "x", [Item("t", "F32", (100,))], hashed=True) as file:
        file.write("t", [tensor[:1], tensor[1:60], tensor[60:]])
    assert torch.equal(load_file(str(tmp_path / "x"))["t"], tensor) and file.entry == manifest.file_entry(tmp_path / "x")


def test_the_file_is_on_disk_when_it_is_written(tmp_path, monkeypatch):
    synced = []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (synced.append(os.fstat(fd).st_size), fsync(fd)))
    entry = write_file(tmp_path / "x", TENSORS)
    assert synced == [entry["size"]]


def test_a_disk_that_is_full_is_an_oserror(tmp_path):
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full here")
    with pytest.raises(OSError) as error:
        write_file("/dev/full", TENSORS)
    assert error.value.errno == errno.ENOSPC
