"""The proof beyond arithmetic: files that are cut off, keys, tokenizers, drifted copies, other models, and the user's mistakes."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from export import prompts
from export.to_hf import to_hf
from export.verify import verify
from pipeline_train import families, manifest
from pipeline_train.errors import RunFailed, UserError
from pipeline_train.weights import open_source
from tests.models import tiny_config
from tests.roundtrip.folders import VERSION, change_weights, edit_json, failing, make_checkpoint, seal
from tests.tokenizers import tiny_tokenizer


def test_a_truncated_file(pair):
    checkpoint, export = pair()
    path = export / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert "model.safetensors: cut off" in failing(checkpoint, export)[0]


def test_a_missing_and_an_extra_tensor(pair):
    checkpoint, export = pair()
    change_weights(export, lambda s: s.pop("model.norm.weight"))
    assert "1 missing: model.norm.weight" in failing(checkpoint, export)[0]
    checkpoint, export = checkpoint.parent / "c", checkpoint.parent / "x2"
    to_hf(str(checkpoint), str(export))
    change_weights(export, lambda s: s.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(6)}))
    found, proof = failing(checkpoint, export)
    assert "1 tensor(s) extra: model.layers.0.self_attn.rotary_emb.inv_freq" in found
    assert proof["keys"]["extra"] == ["model.layers.0.self_attn.rotary_emb.inv_freq"]


def test_a_bloom_export_without_its_head(pair):
    checkpoint, export = pair("bloom")
    change_weights(export, lambda s: s.pop("lm_head.weight"))
    assert "1 tensor(s) missing: lm_head.weight" in failing(checkpoint, export)[0]


def test_files_beside_the_weights(pair):
    checkpoint, export = pair()
    edit_json(export / "config.json", torch_dtype="float16")
    (export / "tokenizer.json").write_text((export / "tokenizer.json").read_text() + " ")
    (checkpoint / "added_tokens.json").write_text("{}")
    _, proof = failing(checkpoint, export)
    assert proof["failures"][:3] == [
        "config.json: torch_dtype is float16, the weights are float32",
        "added_tokens.json: missing in the export",
        "tokenizer.json: differs from the checkpoint's",
    ]


def test_a_tokenizer_that_does_not_load_or_fit(pair):
    checkpoint, export = pair()
    for folder in (checkpoint, export):
        (folder / "tokenizer.json").write_text("{}")
    seal(checkpoint)
    found, _ = failing(checkpoint, export)
    assert "AutoTokenizer cannot use the export" in found or "the tokenizer gives no ids" in found
    (checkpoint / "tokenizer.json").unlink()
    tiny_tokenizer(checkpoint, "spm", vocab=700)
    seal(checkpoint)
    to_hf(str(checkpoint), str(export.parent / "big"))
    found, _ = failing(checkpoint, export.parent / "big")
    if VERSION < (5, 0):  # 5 reads this folder as an empty vocabulary
        assert "the tokenizer gives id" in found and "but the embedding has 520 rows" in found
    else:
        assert "the tokenizer gives no ids, or the same ones for different texts" in found


def test_a_checkpoint_whose_tied_copies_drifted(pair):
    checkpoint, export = pair("bloom")
    path = checkpoint / manifest.layer_file(4)
    state = load_file(str(path))
    state["lm_head.weight"][3, 3] += 1
    save_file(state, str(path), metadata={"format": "pt"})
    seal(checkpoint)
    assert "embedding and head are tied" in failing(checkpoint, export)[0]
    with pytest.raises(
        RunFailed, match="tied, but layer_000.safetensors/word_embeddings.weight and layer_004.*let them drift apart"
    ):
        to_hf(str(checkpoint), str(export.parent / "again"))
    assert not (export.parent / "again").exists()


def test_another_models_checkpoint(pair, tmp_path):
    _, export = pair()
    make_checkpoint(tmp_path / "other", tiny_config("llama", vocab_size=520, intermediate_size=64))
    assert "ffn is 64 in the checkpoint, 80 in the export" in failing(tmp_path / "other", export)[0]


def test_tolerance_is_applied_and_checked(pair):
    checkpoint, export = pair()
    found, _ = failing(checkpoint, export, tolerance=1e-12)
    assert "is the first that differs from transformers" in found
    for tolerance in (0, 0.9):
        with pytest.raises(UserError, match="--tolerance %s: expected a number up to 0.01" % tolerance):
            verify(str(checkpoint), str(export), tolerance=tolerance)


def test_what_the_user_can_get_wrong(pair, tmp_path):
    checkpoint, export = pair("bloom")
    cases = (
        (tmp_path / "none", export, "none: no such folder"),
        (checkpoint, tmp_path / "none", "none: no config.json there"),
        (export, export, "is the checkpoint itself"),
        (export, checkpoint, "holds layer files, not an export"),
    )
    for one, other, message in cases:
        with pytest.raises(UserError) as caught:
            verify(str(one), str(other))
        assert message in str(caught.value)
    with pytest.raises(RunFailed, match="has no tokenizer, so texts cannot be compared"):
        verify(str(checkpoint), str(export), prompts=["Hello"])
    shutil.rmtree(str(export))
    (checkpoint / "layer_001.safetensors").unlink()
    with pytest.raises(UserError, match="layer_001.safetensors: missing, although manifest.json lists it"):
        open_source(str(checkpoint))


def test_an_empty_vocabulary_is_no_tokenizer(monkeypatch, tmp_path):
    import transformers

    stub = {"input_ids": [1]}
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda path, **options: lambda text: stub)
    with pytest.raises(RunFailed, match="gives no ids, or the same ones for different texts; its files are not whole"):
        prompts.text_ids(tmp_path, list(prompts.TEXTS), families.dims_of(tiny_config("llama")))
    stub["input_ids"] = []
    with pytest.raises(RunFailed, match="gives no ids"):
        prompts.text_ids(tmp_path, ["Hello"], families.dims_of(tiny_config("llama")))
