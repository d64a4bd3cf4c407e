"""manifest.json: what makes a layer folder complete, and which folder a path means."""

import copy
import errno
import json
import os

import pytest

from pipeline_train import manifest
from pipeline_train.errors import UserError

TRAINING = {
    "optimizer": "adamw", "optimizer_steps": 1,
    "feed": {"seq_len": 8, "rows_per_step": 2, "pack": True, "seed": 1, "data": "0123", "now": "2024-05-01T23:59:58"},
    "loss_scaler": {"cur_scale": 65536.0, "cur_iter": 1, "last_overflow_iter": -1, "cur_hysteresis": 2},
}  # fmt: skip


def make(folder, step=1, layers=3):
    folder.mkdir(parents=True)
    for layer in range(layers):
        (folder / manifest.layer_file(layer)).write_bytes(b"x" * (layer + 1))
        (folder / manifest.optim_file(layer)).write_bytes(b"o")
    (folder / "config.json").write_text("{}")
    document = {
        "format": manifest.FORMAT, "kind": "checkpoint", "family": "llama", "run_dtype": "bf16", "layer_dtype": "fp32",
        "tied": False, "layers": layers, "step": step, "run_name": "r", "versions": {}, "training": copy.deepcopy(TRAINING),
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
        ("files", {"../secret": {"size": 1}}, "files: '../secret' is not a file of this folder with a size and a sha256"),
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
    with pytest.raises(UserError, match="files: 'a.*x00b' is not a file of this folder"):
        manifest.read(tmp_path / "c")
    with pytest.raises(UserError, match="x: no such folder"):
        manifest.find_checkpoint("x" * 300)


DEEP = json.loads("[" * 500 + "]" * 500)
ODD = [
    None,
    [],
    {},
    "",
    "x",
    "a\nb",
    "\ud800",
    -1,
    0,
    3,
    1 << 70,
    10**400,
    0.5,
    1e308,
    float("nan"),
    float("inf"),
    True,
    False,
    DEEP,
]
# What a manifest may hold there beside what it held: nothing depends on it, or it is compared with something else
FREE = {
    "family": str, "layer_dtype": str, "run_name": (str, type(None)), "versions": dict, "tied": bool,
    "training.optimizer": str, "training.feed": dict, "training.feed.data": str, "training.feed.pack": bool,
    "training.loss_scaler": dict,
}  # fmt: skip
NUMBERS = ("training.optimizer_steps", "training.feed.seq_len", "training.feed.rows_per_step", "training.feed.seed")


def places(document, prefix=()):
    """The path of every value in the document."""
    for key, value in document.items():
        yield prefix + (key,)
        if isinstance(value, dict):
            yield from places(value, prefix + (key,))


def allowed(name, value):
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= 1 << 53
    if name.startswith("training.loss_scaler."):
        return number
    if name in NUMBERS:
        return number and isinstance(value, int) and (value >= 0 or "feed" in name)
    if isinstance(value, str) and not value.isprintable() and name.startswith("training."):
        return False
    return isinstance(value, FREE.get(name, ()))


def test_whatever_a_manifest_holds_is_one_line_or_whole(tmp_path):
    document = make(tmp_path / "step_000001")
    assert len(list(places(document))) > 40
    for path in places(document):
        for value in ODD + [Ellipsis]:
            changed = copy.deepcopy(document)
            inner = changed
            for key in path[:-1]:
                inner = inner[key]
            if value is Ellipsis:
                del inner[path[-1]]
            else:
                inner[path[-1]] = value
            name, text = ".".join(path), json.dumps(changed)
            (tmp_path / "step_000001" / "manifest.json").write_text(text)
            try:
                found = manifest.read(tmp_path / "step_000001")
                manifest.check_training(tmp_path / "step_000001", found)
                manifest.check_hashes(tmp_path / "step_000001", found)
            except UserError as error:
                message = str(error)
                assert message.isprintable() and len(message) < 400 and "step_000001" in message, (name, value, message)
                assert not isinstance(error, manifest.Unreadable)
                refused = True
            else:
                refused = False
            dispensable = name.startswith(("training.feed.", "training.loss_scaler."))
            may = (
                dispensable
                if value is Ellipsis
                else allowed(name, value) or (type(value), value) == (type(at(document, path)), at(document, path))
            )
            assert refused != may, (name, value)


def at(document, path):
    for key in path:
        document = document[key]
    return document


@pytest.mark.parametrize("name, changes, message", [
    ("step_000002", {}, "manifest.json: step: 1, but the folder is named step_000002; use another checkpoint"),
    ("other", {"step": -1}, "manifest.json: step: missing or not what it should be (-1)"),
    ("other", {"step": None}, "manifest.json: step: missing or not what it should be (None)"),
    ("other", {"layers": 0}, "manifest.json: layers: missing or not what it should be (0)"),
    ("other", {"layers": True}, "manifest.json: layers: missing or not what it should be (True)"),
    ("other", {"format": ["x"]}, "expected format pipedock-layers/1, found a list"),
])  # fmt: skip
def test_a_step_that_is_not_the_folders(tmp_path, name, changes, message):
    document = make(tmp_path / name)
    (tmp_path / name / "manifest.json").write_text(json.dumps(dict(document, **changes)))
    with pytest.raises(UserError) as caught:
        manifest.read(tmp_path / name)
    assert message in str(caught.value)


@pytest.mark.parametrize("file", ["optim_001.safetensors", "config.json"])
def test_training_lists_all_its_files(tmp_path, file):
    document = make(tmp_path / "c")
    manifest.check_training(tmp_path / "c", document)
    del document["files"][file]
    with pytest.raises(UserError, match="c/manifest.json: lists no %s" % file):
        manifest.check_training(tmp_path / "c", document)
    with pytest.raises(UserError, match="c/manifest.json: kind: a run resumes from a checkpoint, this is from-hf"):
        manifest.check_training(tmp_path / "c", dict(document, kind="from-hf"))


def test_a_listed_name_that_is_no_file(tmp_path):
    make(tmp_path / "c")
    (tmp_path / "c" / "layer_001.safetensors").unlink()
    (tmp_path / "c" / "layer_001.safetensors").mkdir()
    with pytest.raises(UserError, match="layer_001.safetensors: is not a file, although manifest.json lists it; use another"):
        manifest.read(tmp_path / "c")


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.ESTALE])
@pytest.mark.parametrize("where", ["manifest", "stat", "content", "folder"])
def test_what_cannot_be_read_is_not_taken_for_broken(tmp_path, monkeypatch, number, where):
    for step in (1, 2):
        make(tmp_path / "checkpoints" / ("step_%06d" % step), step)
    newest, error = tmp_path / "checkpoints" / "step_000002", OSError(number, os.strerror(number))
    path = newest / (manifest.NAME if where == "manifest" else manifest.layer_file(1))
    path = newest.parent if where == "folder" else path

    def fails(original):
        def call(given, *arguments, **options):
            if str(given) == str(path):
                raise error
            return original(given, *arguments, **options)

        return call

    owner, name = {"manifest": (manifest.Path, "read_text"), "stat": (manifest.Path, "stat"), "content": (manifest, "file_entry"),
                   "folder": (manifest.os, "listdir")}[where]  # fmt: skip
    monkeypatch.setattr(owner, name, fails(getattr(owner, name)))
    with pytest.raises(manifest.Unreadable) as caught:
        manifest.find_checkpoint(tmp_path)
        manifest.check_hashes(newest)
    assert str(caught.value) == (
        "%s: cannot be read: %s. That does not make the checkpoint broken, so no other is taken instead: make it readable, or move "
        "it away to do without it" % (path, os.strerror(number))
    )
