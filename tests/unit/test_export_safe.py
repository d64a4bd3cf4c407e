"""What must never happen to an export: two writers at once, code that runs, files that slip in after the proof or beside it."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from export import aside, sidecars
from export.to_hf import to_hf
from export.verify import verify
from pipedock import main
from pipeline_train import proof
from pipeline_train.errors import RunFailed, UserError
from pipeline_train.weights import open_source
from tests.models import make_hf, tiny_config, with_code
from tests.tokenizers import tiny_tokenizer

ROOT = Path(__file__).resolve().parents[2]
HOLD = """
import sys, time
sys.path.insert(0, %r)
from export import aside
folder = aside.begin(sys.argv[1], 0)
(folder / "mine").write_text("x")
print("begun", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "model"
    tiny_tokenizer(folder)
    make_hf(folder, tiny_config("llama", vocab_size=512))
    return folder


@pytest.fixture
def export(model, tmp_path):
    """With a proof that holds."""
    to_hf(str(model), str(tmp_path / "export"))
    verify(str(model), str(tmp_path / "export"))
    return tmp_path / "export"


def holder(output):
    """Another process that is writing ``output``."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD % str(ROOT), str(output)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "begun\n"
    return process


def test_two_writers_of_one_folder_do_not_meet(tmp_path, model):
    output = tmp_path / "out"
    process = holder(output)
    try:
        with pytest.raises(UserError) as error:
            to_hf(str(model), str(output))
        assert str(error.value) == "%s: another pipedock is writing it; wait for its end, or name another folder" % output
        aside.abandon(str(output))  # as a launcher does that has nothing there
        assert (aside.partial_of(str(output)) / "mine").exists()
    finally:
        process.kill()
        process.wait()
    to_hf(str(model), str(output))  # what the killed one has left is taken over, and emptied
    assert open_source(str(output)).names() and not (output / "mine").exists()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_the_lock_ends_with_the_export(tmp_path, model):
    for overwrite in (False, True, True):
        to_hf(str(model), str(tmp_path / "out"), overwrite=overwrite)
        assert str(aside.partial_of(str(tmp_path / "out"))) not in aside._CLAIMED


def test_a_link_to_a_folder_stays_one(tmp_path, model):
    to_hf(str(model), str(tmp_path / "real"))
    (tmp_path / "link").symlink_to(tmp_path / "real")
    for _ in range(2):
        (tmp_path / "real" / "old").touch()
        to_hf(str(model), str(tmp_path / "link"), overwrite=True)
        assert (tmp_path / "link").is_symlink() and not (tmp_path / "real" / "old").exists()


@pytest.mark.parametrize("place, what", [("", "is %s itself"), ("x", "lies inside %s")])
def test_an_export_does_not_go_into_what_it_is_made_of(tmp_path, export, place, what):
    output = str(export / place) if place else str(export)
    with pytest.raises(UserError) as error:
        to_hf(str(export), output, overwrite=True)
    assert what % export in str(error.value) and proof.objection(export) is None


def test_code_in_a_folder_does_not_run_in_the_proof(tmp_path, model, export):
    path = with_code(export, tmp_path / "ran")
    assert str(proof.objection(export)).startswith("%s: was added since it was proved" % path)
    with pytest.raises(RunFailed) as error:
        verify(str(model), str(export))
    assert "is code that transformers would run; an export has none, remove it" in str(error.value)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", [
    "chat_template.json", "added_tokens.json", "vocab.json", "additional_chat_templates/x.jinja", "modeling_x.py",
    "preprocessor_config.json", "sub/x.safetensors",
])  # fmt: skip
def test_whatever_is_added_after_the_proof_is_named(export, name):
    (export / name).parent.mkdir(exist_ok=True)
    (export / name).write_text("{}")
    assert str(proof.objection(export)).startswith("%s: was added since it was proved" % (export / name))


def test_what_no_loader_reads_may_come_later(export):
    for name in ("README.md", ".cache/huggingface/x.lock", ".gitattributes"):
        (export / name).parent.mkdir(parents=True, exist_ok=True)
        (export / name).write_text("x")
    assert proof.objection(export) is None


def test_a_name_that_no_file_can_have(export):
    document = json.loads((export / proof.NAME).read_text())
    document["files"]["a\0b"] = {"size": 1, "sha256": "x"}
    (export / proof.NAME).write_text(json.dumps(document))
    assert "changed since it was proved" in str(proof.objection(export))


def test_a_file_that_changes_while_it_is_proved(export, model, monkeypatch):
    files = proof.files

    def changing(folder):
        time.sleep(0.01)
        path = folder / "model.safetensors"
        data = path.read_bytes()
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        return files(folder)

    monkeypatch.setattr(proof, "files", changing)
    with pytest.raises(RunFailed) as error:
        verify(str(model), str(export))
    assert "its files changed while they were compared; run it again when nobody writes there" in str(error.value)


def test_a_folder_of_templates_that_is_a_link_brings_no_more_than_templates(tmp_path):
    source, target = tmp_path / "a" / "source", tmp_path / "a" / "target"
    source.mkdir(parents=True)
    target.mkdir()
    (source / sidecars.TEMPLATE_FOLDER).symlink_to(tmp_path)
    (tmp_path / "tool.jinja").write_text("{{ x }}")
    (tmp_path / "secret").write_text("s")
    sidecars.copy(source, target)
    assert [path.name for path in (target / sidecars.TEMPLATE_FOLDER).rglob("*")] == ["tool.jinja"]


def test_a_template_that_is_no_text(tmp_path, model, capsys):
    (model / "chat_template.jinja").write_bytes(b"\xff\xfe\x00")
    assert main(["to-hf", "--input", str(model), "--output", str(tmp_path / "out")]) == 2
    assert "chat_template.jinja: cannot be read as text: not UTF-8" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("state", [
    {5: torch.ones(2)}, {"a": torch.ones(2, 2).to_sparse()}, {"a": torch.ones(2, device="meta")},
], ids=["a number for a name", "sparse", "meta"])  # fmt: skip
def test_a_state_dict_of_other_things(tmp_path, model, state, capsys):
    (model / "model.safetensors").unlink()
    torch.save(state, str(model / "pytorch_model.bin"))
    assert main(["from-hf", "--input", str(model), "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and ("not a state dict" in error or "not a whole file" in error)


@pytest.mark.parametrize(
    "name", ["a" * 5000 + ".safetensors", "\ud800.safetensors", "a\nb.safetensors"], ids=["long", "half", "two lines"]
)
def test_an_index_with_names_that_cannot_be(tmp_path, model, name, capfd):
    os.remove(str(model / "model.safetensors"))
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    assert main(["from-hf", "--input", str(model), "--output", str(tmp_path / "out"), "--json"]) == 2
    found = capfd.readouterr()
    assert found.err.count("\n") == 1 and len(found.err) < 600
    assert json.loads(found.out)["error"]


def test_an_export_that_a_kill_has_left_under_another_name_is_not_lost(tmp_path, model):
    """Between the two renames of --overwrite."""
    output = tmp_path / "out"
    to_hf(str(model), str(output))
    (output / "mine").touch()
    output.rename(tmp_path / ".out.old")
    with pytest.raises(UserError) as error:
        to_hf(str(model), str(output))
    assert str(error.value) == "%s: exists and is not empty; name another folder or remove it" % output
    assert (output / "mine").exists() and sorted(path.name for path in tmp_path.iterdir()) == ["model", "out"]


def test_weights_that_are_not_numbers_are_called_so(tmp_path, model):
    path = model / "model.safetensors"
    state = load_file(str(path))
    state["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(state, str(path), {"format": "pt"})
    to_hf(str(model), str(tmp_path / "out"))
    with pytest.raises(RunFailed) as error:
        verify(str(model), str(tmp_path / "out"))
    assert "layer 2 (block) is the first whose values are not numbers: the weights hold NaN or infinity" in str(error.value)
