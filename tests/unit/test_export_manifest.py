"""manifest.json: what makes a layer folder complete, and which folder a path means."""

import json

import pytest

from pipeline_train import manifest
from pipeline_train.errors import UserError


def make(folder, step=1, layers=3):
    folder.mkdir(parents=True)
    for layer in range(layers):
        (folder / manifest.layer_file(layer)).write_bytes(b"x" * (layer + 1))
    document = {
        "format": manifest.FORMAT, "kind": "checkpoint", "family": "llama", "run_dtype": "bf16", "layer_dtype": "fp32",
        "tied": False, "layers": layers, "step": step, "run_name": "r", "versions": {}, "training": {},
        "files": {p.name: manifest.file_entry(p) for p in folder.iterdir()},
    }  # fmt: skip
    manifest.write(folder, document)
    return document


def test_round_trip(tmp_path):
    document = make(tmp_path / "c")
    assert manifest.read(tmp_path / "c") == document
    assert [p.name for p in (tmp_path / "c").iterdir() if "partial" in p.name] == []
    assert document["files"]["layer_001.safetensors"]["size"] == 2
    assert manifest.optim_file(12) == "optim_012.safetensors"


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("format", "pipedock-layers/9", "expected format pipedock-layers/1, found pipedock-layers/9"),
        ("kind", "copy", "kind: expected one of checkpoint, from-hf, found 'copy'"),
        ("run_dtype", "int8", "run_dtype: expected one of fp32, bf16, fp16, found 'int8'"),
        ("tied", "yes", "tied: missing or not what it should be ('yes')"),
        ("training", None, "training: missing or not what it should be (None)"),
        ("layers", None, "layers: missing or not what it should be (None)"),
        ("layers", 4, "lists no layer_003.safetensors although the model has 4 layers"),
        ("files", {"../secret": {"size": 1}}, "files: '../secret' is not a file of this folder with a size"),
    ],
)
def test_a_wrong_key_is_named(tmp_path, key, value, message):
    document = make(tmp_path / "c")
    (tmp_path / "c" / "manifest.json").write_text(json.dumps(dict(document, **{key: value})))
    with pytest.raises(UserError) as caught:
        manifest.read(tmp_path / "c")
    assert message in str(caught.value) and "manifest.json" in str(caught.value)
    if key != "files" and value != 4:
        with pytest.raises(UserError):  # nor is it ever written
            manifest.write(tmp_path / "c", dict(document, **{key: value}))


def test_files_that_do_not_match(tmp_path):
    make(tmp_path / "c")
    (tmp_path / "c" / "layer_001.safetensors").write_bytes(b"x")
    with pytest.raises(
        UserError, match="layer_001.safetensors: has 1 bytes, manifest.json says 2; the file was cut off or changed"
    ):
        manifest.read(tmp_path / "c")
    (tmp_path / "c" / "layer_001.safetensors").unlink()
    with pytest.raises(UserError, match="layer_001.safetensors: missing, although manifest.json lists it"):
        manifest.read(tmp_path / "c")
    (tmp_path / "c" / "manifest.json").write_text('{"format"')
    with pytest.raises(UserError, match="manifest.json: cannot be read .*use another checkpoint"):
        manifest.read(tmp_path / "c")
    (tmp_path / "c" / "manifest.json").write_text("[]")
    with pytest.raises(UserError, match="expected format pipedock-layers/1, found list"):
        manifest.read(tmp_path / "c")
    with pytest.raises(UserError, match="no manifest.json, so this is not a complete checkpoint"):
        manifest.read(tmp_path)


def test_a_run_means_its_newest_complete_checkpoint(tmp_path):
    run = tmp_path / "run"
    for step in (400, 800, 1200):
        make(run / "checkpoints" / ("step_%06d" % step), step)
    (run / "checkpoints" / "latest").write_text("step_001200")
    newest = run / "checkpoints" / "step_001200"
    assert manifest.find_checkpoint(run) == manifest.find_checkpoint(run / "checkpoints") == newest
    assert manifest.find_checkpoint(newest) == newest
    (newest / "layer_002.safetensors").write_bytes(b"")
    passed_over = []
    assert manifest.find_checkpoint(run, passed_over).name == "step_000800"
    assert len(passed_over) == 1 and "step_001200/layer_002.safetensors: has 0 bytes" in passed_over[0]


def test_no_checkpoint_to_be_found(tmp_path):
    with pytest.raises(UserError, match="none: no such folder; name a run, one of its checkpoints or a from-hf folder"):
        manifest.find_checkpoint(tmp_path / "none")
    with pytest.raises(UserError, match="holds no checkpoint"):
        manifest.find_checkpoint(tmp_path)
    (tmp_path / "checkpoints" / "step_000001").mkdir(parents=True)
    (tmp_path / "checkpoints" / "step_000002").mkdir()
    with pytest.raises(UserError, match="no complete checkpoint among 2; the newest: .*step_000002: no manifest.json"):
        manifest.find_checkpoint(tmp_path)


def test_a_flipped_bit_is_named(tmp_path):
    document = make(tmp_path / "c")
    manifest.check_hashes(tmp_path / "c")
    (tmp_path / "c" / "layer_001.safetensors").write_bytes(b"xy")  # of the same size
    manifest.read(tmp_path / "c")
    message = "layer_001.safetensors: its content is not what was written .its sha256 is not that of manifest.json.; use another"
    with pytest.raises(UserError, match=message):
        manifest.check_hashes(tmp_path / "c")
    (tmp_path / "c" / "layer_001.safetensors").unlink()
    with pytest.raises(UserError, match="layer_001.safetensors: missing"):
        manifest.check_hashes(tmp_path / "c")
    with pytest.raises(UserError, match="layer_001.safetensors: cannot be read: No such file"):
        manifest.check_hashes(tmp_path / "c", document)
    del document["files"]["layer_001.safetensors"], document["files"]["layer_002.safetensors"]["sha256"]
    with pytest.raises(UserError, match="layer_002.safetensors: its content is not what was written"):
        manifest.check_hashes(tmp_path / "c", document)


def test_manifests_that_would_end_in_a_traceback(tmp_path):
    document = make(tmp_path / "c")
    (tmp_path / "c" / "manifest.json").write_text("[" * 100000)
    with pytest.raises(UserError, match="manifest.json: cannot be read .*recursion"):
        manifest.read(tmp_path / "c")
    document["files"]["a\0b"] = {"size": 1}
    (tmp_path / "c" / "manifest.json").write_text(json.dumps(document))
    with pytest.raises(UserError, match="missing, although manifest.json lists it"):
        manifest.read(tmp_path / "c")
    with pytest.raises(UserError, match="x: no such folder"):
        manifest.find_checkpoint("x" * 300)
