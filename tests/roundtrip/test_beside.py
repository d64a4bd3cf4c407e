"""Everything of an export but its weights is the checkpoint's, or it is refused; so is a checkpoint that changed on disk."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from export.from_hf import from_hf
from export.to_hf import to_hf
from export.verify import proved, verify
from pipeline_train.errors import RunFailed, UserError
from tests.models import make_hf, tiny_config
from tests.roundtrip.folders import edit_json, failing, make_checkpoint, seal, write_tokenizer_core
from tests.tokenizers import tiny_tokenizer


def plant_core(export):
    """A token more in tokenizer.json, and nothing else changed."""
    write_tokenizer_core(export, lambda core: core["added_tokens"].append(dict(core["added_tokens"][0], id=519, content="fox")))


PLANTS = {
    "template in one place": (
        lambda x: edit_json(x / "tokenizer_config.json", chat_template="{{ 'You lie. ' + messages[0]['content'] }}"),
        "tokenizer_config.json: differs from the checkpoint's: chat_template",
    ),
    "template in the other place": (
        lambda x: (x / "chat_template.jinja").write_text("{{ 'You lie. ' + messages[0]['content'] }}"),
        "chat_template.jinja: is in the export but not in the checkpoint",
    ),
    "no template": (
        lambda x: edit_json(x / "tokenizer_config.json", chat_template=None),
        "tokenizer_config.json: differs from the checkpoint's: chat_template",
    ),
    "eos token": (
        lambda x: edit_json(x / "tokenizer_config.json", eos_token="<pad>"),
        "tokenizer_config.json: differs from the checkpoint's: eos_token",
    ),
    "special tokens": (
        lambda x: edit_json(x / "special_tokens_map.json", eos_token="<pad>"),
        "special_tokens_map.json: differs from the checkpoint's: eos_token",
    ),
    "a token more": (plant_core, "tokenizer.json: differs from the checkpoint's"),
    "added tokens": (
        lambda x: (x / "added_tokens.json").write_text('{"fox": 519}'),
        "added_tokens.json: is in the export but not in the checkpoint",
    ),
    "generation": (
        lambda x: edit_json(x / "generation_config.json", eos_token_id=7, temperature=0.1),
        "generation_config.json: differs from the checkpoint's: eos_token_id, temperature",
    ),
    "no generation": (lambda x: (x / "generation_config.json").unlink(), "generation_config.json: missing in the export"),
    "eos id": (
        lambda x: edit_json(x / "config.json", eos_token_id=9),
        "config.json: eos_token_id is 2 in the checkpoint, 9 in the export",
    ),
    "no bos id": (
        lambda x: edit_json(x / "config.json", bos_token_id=None),
        "config.json: bos_token_id is 1 in the checkpoint, missing in the export",
    ),
    "pad id": (lambda x: edit_json(x / "config.json", pad_token_id=3), "config.json: pad_token_id is "),
    "class": (
        lambda x: edit_json(x / "config.json", architectures=["LlamaModel"]),
        'config.json: architectures is ["LlamaModel"], expected ["LlamaForCausalLM"]',
    ),
    "named templates": (
        lambda x: ((x / "additional_chat_templates").mkdir(), (x / "additional_chat_templates" / "rag.jinja").write_text("x")),
        "additional_chat_templates: differs from the checkpoint's",
    ),
    "an old .bin": (lambda x: torch.save({}, str(x / "pytorch_model.bin")), "pytorch_model.bin: is no part of the export"),
    "an old shard": (
        lambda x: save_file({"a": torch.ones(1)}, str(x / "model-00001-of-00002.safetensors")),
        "model-00001-of-00002.safetensors: is no part of the export",
    ),
    "an old index": (
        lambda x: (x / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model.safetensors"}}'),
        "model.safetensors.index.json: is no part of the export",
    ),
    "an adapter": (lambda x: (x / "adapter_config.json").write_text("{}"), "adapter_config.json: is no part of the export"),
    "broken JSON": (lambda x: (x / "special_tokens_map.json").write_text("[" * 100000), "special_tokens_map.json: cannot be read"),
}  # fmt: skip


@pytest.mark.parametrize("plant", PLANTS)
def test_what_lies_beside_the_weights(plant, pair):
    change, message = PLANTS[plant]
    checkpoint, export = pair("llama")
    change(export)
    _, proof = failing(checkpoint, export)
    assert any(message in failure for failure in proof["failures"]), proof["failures"]


IDS = {
    "a token more": (plant_core, "tokenizer: 'The quick brown fox"),
    "special tokens": (
        lambda x: [edit_json(x / name, eos_token="<pad>") for name in ("tokenizer_config.json", "special_tokens_map.json")],
        "tokenizer: eos_token_id is 0 in the checkpoint, 1 in the export",
    ),
    "template": (
        lambda x: edit_json(x / "tokenizer_config.json", chat_template="{{ 'You lie. ' + messages[0]['content'] }}"),
        "chat template: renders another prompt in the export: 'You lie. What is 2 + 2?', not 'What is 2 + 2?'",
    ),
}


@pytest.mark.parametrize("plant", IDS)
def test_ids_are_compared_whatever_the_files_say(plant, pair, monkeypatch):
    monkeypatch.setattr("export.beside.files", lambda *args: [])
    change, message = IDS[plant]
    checkpoint, export = pair("llama")
    assert verify(str(checkpoint), str(export))["holds"]
    change(export)
    assert message in failing(checkpoint, export)[0]


def test_what_an_export_mends_is_no_difference(tmp_path):
    """An old class name, a template only in chat_template.jinja, no generation config, named templates, several shards."""
    make_checkpoint(tmp_path / "c", tiny_config("llama", vocab_size=520))
    tiny_tokenizer(tmp_path / "c", "spm-slow", vocab=400)
    edit_json(tmp_path / "c" / "tokenizer_config.json", tokenizer_class="LLaMATokenizer", chat_template="{{ old }}")
    (tmp_path / "c" / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    (tmp_path / "c" / "generation_config.json").unlink()
    seal(tmp_path / "c")
    (tmp_path / "c" / "additional_chat_templates").mkdir()
    (tmp_path / "c" / "additional_chat_templates" / "rag.jinja").write_text("x")
    to_hf(str(tmp_path / "c"), str(tmp_path / "x"), shard_size="60KB", dtype="bf16")
    assert verify(str(tmp_path / "c"), str(tmp_path / "x"))["holds"]


def flip(path):
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("name", ["layer_002.safetensors", "tokenizer.json", "generation_config.json"])
def test_a_checkpoint_with_a_flipped_bit(name, pair):
    checkpoint, export = pair("llama")
    flip(checkpoint / name)
    for call in (lambda: to_hf(str(checkpoint), str(export) + "2"), lambda: verify(str(checkpoint), str(export))):
        with pytest.raises(UserError, match="c/%s: its content is not what was written .*use another checkpoint" % name):
            call()


def test_an_optimizer_file_is_not_read_for_an_export(pair):
    checkpoint, export = pair("llama")
    save_file({"a": torch.ones(3)}, str(checkpoint / "optim_000.safetensors"))
    seal(checkpoint)
    flip(checkpoint / "optim_000.safetensors")
    assert verify(str(checkpoint), str(export))["holds"]


def test_a_from_hf_folder_with_a_flipped_bit(tmp_path):
    make_hf(tmp_path / "hf", tiny_config("bloom"))
    from_hf(str(tmp_path / "hf"), str(tmp_path / "layers"))
    flip(tmp_path / "layers" / "layer_000.safetensors")
    with pytest.raises(UserError, match="layer_000.safetensors: its content is not what was written"):
        to_hf(str(tmp_path / "layers"), str(tmp_path / "x"))


def resized(export):
    state = load_file(str(export / "model.safetensors"))
    state["model.norm.weight"] += 1
    save_file(state, str(export / "model.safetensors"), metadata={"format": "pt"})


UNPROVED = {
    "no weights": lambda c, x: (x / "model.safetensors").unlink(),
    "other weights": lambda c, x: resized(x),
    "one bit": lambda c, x: flip(x / "model.safetensors"),
    "tokenizer": lambda c, x: flip(x / "tokenizer.json"),
    "weights added": lambda c, x: torch.save({}, str(x / "pytorch_model.bin")),
    "no proof": lambda c, x: (x / "proof.json").unlink(),
    "a proof of before": lambda c, x: edit_json(x / "proof.json", manifest=None),
    "a list": lambda c, x: (x / "proof.json").write_text("[]"),
    "nested": lambda c, x: (x / "proof.json").write_text("[" * 100000),
    "did not hold": lambda c, x: edit_json(x / "proof.json", holds=False),
    "no files": lambda c, x: edit_json(x / "proof.json", files={}),
    "another run": lambda c, x: (shutil.rmtree(str(c)), make_checkpoint(c, tiny_config("llama", vocab_size=520), seed=1)),
    "no run": lambda c, x: shutil.rmtree(str(c)),
}


@pytest.mark.parametrize("change", UNPROVED)
def test_what_is_not_proved_any_more(change, pair):
    checkpoint, export = pair("llama")
    assert not proved(str(export), str(checkpoint), 7)
    verify(str(checkpoint), str(export))
    (export / "README.md").write_text("of the user")
    assert proved(str(export), str(checkpoint), 7) and not proved(str(export), str(checkpoint), 8)
    UNPROVED[change](checkpoint, export)
    assert not proved(str(export), str(checkpoint), 7)


def test_the_wrong_folder_is_served_as_before(pair, tmp_path):
    """A model of the user's own, named by mistake: no export, so nothing is to be written there."""
    checkpoint, _ = pair("llama")
    make_hf(tmp_path / "own", tiny_config("llama"), seed=9)
    with pytest.raises(RunFailed, match="own: is not the checkpoint's model"):
        verify(str(checkpoint), str(tmp_path / "own"))
    assert not (tmp_path / "own" / "proof.json").exists()


def test_asking_about_another_checkpoint_keeps_the_proof(pair, tmp_path):
    checkpoint, export = pair("llama")
    verify(str(checkpoint), str(export))
    before = (export / "proof.json").read_bytes()
    other = tmp_path / "other"
    make_checkpoint(other, tiny_config("llama", vocab_size=520), seed=1)
    with pytest.raises(RunFailed) as error:
        verify(str(other), str(export))
    assert "is not the model of %s: " % other in str(error.value)
    assert str(error.value).endswith("It is the proved export of %s, and keeps that proof." % checkpoint)
    assert (export / "proof.json").read_bytes() == before and error.value.document["holds"] is False
    flip(export / "model.safetensors")
    with pytest.raises(RunFailed, match="is not the checkpoint's model"):
        verify(str(other), str(export))
    assert json.loads((export / "proof.json").read_text())["holds"] is False


def test_names_that_are_too_long(pair):
    checkpoint, export = pair("bloom")
    long = str(export.parent / ("x" * 300))
    with pytest.raises(UserError, match="xxx: no config.json there"):
        verify(str(checkpoint), long)
    for call in (lambda: verify(long, str(export)), lambda: to_hf(long, str(export.parent / "y"))):
        with pytest.raises(UserError, match="xxx: no such folder"):
            call()
