"""The proof holds for an honest export and names what is wrong with every other one."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from export import forward
from export import verify as verify_module
from export.to_hf import to_hf
from export.verify import verify
from pipeline_train import manifest
from pipeline_train.errors import RunFailed, UserError
from pipeline_train.weights import open_source
from tests.models import tiny_config
from tests.roundtrip.folders import VERSION, edit_json, make_checkpoint, needs, seal
from tests.tokenizers import tiny_tokenizer


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """{family: folder with a checkpoint "c" and its export "x"}; the llama one has a tokenizer."""
    folders = {}
    for family in ("llama", "bloom"):
        folder = tmp_path_factory.mktemp(family)
        config = tiny_config(family, tie_word_embeddings=family == "bloom", vocab_size=520)
        make_checkpoint(folder / "c", config)
        if family == "llama":
            tiny_tokenizer(folder / "c", "bpe", vocab=512, chat_template="{{ messages[0]['content'] }}")
            seal(folder / "c")
        to_hf(str(folder / "c"), str(folder / "x"))
        folders[family] = folder
    return folders


@pytest.fixture
def pair(made, tmp_path):
    """A copy that a test may spoil: pair("llama") -> (checkpoint, export)."""

    def copy(family="llama"):
        shutil.copytree(str(made[family]), str(tmp_path / family))
        return tmp_path / family / "c", tmp_path / family / "x"

    return copy


def failing(checkpoint, export, **options):
    """-> (message, proof.json) of a verification that must fail."""
    with pytest.raises(RunFailed) as caught:
        verify(str(checkpoint), str(export), **options)
    proof = json.loads((export / "proof.json").read_text())
    assert proof["holds"] is False and proof["failures"]
    assert "\n" not in str(caught.value)
    return str(caught.value), proof


def change_weights(export, change):
    state = load_file(str(export / "model.safetensors"))
    change(state)
    save_file(state, str(export / "model.safetensors"), metadata={"format": "pt"})


def swap(state, one, other):
    state[one], state[other] = state[other], state[one]


def test_an_honest_export_is_proved(pair):
    checkpoint, export = pair("llama")
    proof = verify(str(checkpoint), str(export))
    assert proof == json.loads((export / "proof.json").read_text())
    assert proof["holds"] and proof["failures"] == [] and proof["step"] == 7 and proof["dtype"] == "fp32"
    assert [(row["layer"], row["what"]) for row in proof["layers"]] == [
        (0, "embed"), (1, "block"), (2, "block"), (3, "block"), (4, "norm"),
    ]  # fmt: skip
    assert proof["layers"][0]["relative"] == 0.0 and proof["layers"][0]["max"] > 0
    assert 0 < proof["logits"]["relative"] < 1e-5 and 0 < max(row["relative"] for row in proof["layers"]) < 1e-5
    assert proof["tensors"] == {"compared": 30, "differing": []}
    assert len(proof["prompts"]["texts"]) == 4 and proof["prompts"]["rows"] == 5
    assert proof["files"]["model.safetensors"] == manifest.file_entry(export / "model.safetensors")
    assert {"config.json", "tokenizer.json", "pipedock-export.json"} < set(proof["files"]) and "proof.json" not in proof["files"]
    assert proof["peak_gib"] > 0 and proof["versions"]["transformers"]


def test_prompts_of_the_caller(pair):
    checkpoint, export = pair("llama")
    proof = verify(str(checkpoint), str(export), prompts=["Hello", "你好"])
    assert proof["prompts"]["texts"] == ["Hello", "你好"] and proof["prompts"]["rows"] == 3


def test_random_ids_reach_every_part_of_the_vocabulary():
    dims = open_dims(tiny_config("bloom", vocab_size=250880))
    ids = forward.random_ids(dims)
    assert len(ids) == forward.RANDOM_LENGTH == len({i * forward.RANDOM_LENGTH // dims.vocab for i in ids})
    assert ids == forward.random_ids(dims) and max(ids) < dims.vocab
    assert len(forward.random_ids(open_dims(tiny_config("llama", max_position_embeddings=16)))) == 16


def open_dims(config):
    from pipeline_train import families

    return families.dims_of(config)


Q, K = "model.layers.1.self_attn.q_proj.weight", "model.layers.1.self_attn.k_proj.weight"
PLANTS = {
    "q and k swapped": ("llama", lambda s: swap(s, Q, K), r"2 tensor\(s\) differ in their bits: %s, %s" % (Q, K), 2),
    "two blocks swapped": (
        "llama",
        lambda s: [swap(s, k, k.replace("layers.1", "layers.2")) for k in list(s) if ".layers.1." in k],
        r"18 tensor\(s\) differ in their bits",
        2,
    ),
    "one bit": (
        "llama",
        lambda s: s["model.norm.weight"].view(torch.int32)[3].bitwise_xor_(1),
        "1 tensor.*model.norm.weight",
        None,
    ),
    "last block's output": ("llama", lambda s: s["model.layers.2.mlp.down_proj.weight"].mul_(1.01), "down_proj", 3),
    "final norm": ("llama", lambda s: s["model.norm.weight"].mul_(1.01), "model.norm.weight", 4),
    "head": ("llama", lambda s: s["lm_head.weight"][5].mul_(1.01), "lm_head.weight", 4),
    "tied copy": ("bloom", lambda s: s["lm_head.weight"][5].mul_(1.01), "embedding and head are tied, but .* differ", None),
    "NaN": ("bloom", lambda s: s["transformer.h.0.mlp.dense_4h_to_h.bias"].fill_(float("nan")), "dense_4h_to_h.bias", 1),
}


@pytest.mark.parametrize("plant", PLANTS)
def test_wrong_weights_are_named(plant, pair):
    family, change, message, first_layer = PLANTS[plant]
    checkpoint, export = pair(family)
    change_weights(export, change)
    import re

    found, proof = failing(checkpoint, export)
    assert re.search(message, found), found
    if first_layer is not None:
        assert "layer %d " % first_layer in " ".join(proof["failures"]), proof["failures"]


CONFIG_PLANTS = {
    "rope theta": ("llama", {"rope_theta": 11000.0}, "rope_theta is 10000.0 in the checkpoint, 11000.0 in the export", 1),
    "rope scaling": ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope_scaling", 1),
    "norm eps": ("llama", {"rms_norm_eps": 2e-3}, "norm_eps is 1e-05 in the checkpoint, 0.002 in the export", 1),
    "bloom's eps": ("bloom", {"layer_norm_epsilon": 1e-3}, "norm_eps", 0),
    "residual": ("bloom", {"apply_residual_connection_post_layernorm": True}, "post_norm_residual", 1),
}


@pytest.mark.parametrize(
    "plant", [pytest.param(plant, marks=needs((4, 43), plant)) if "rope" in plant else plant for plant in CONFIG_PLANTS]
)
def test_wrong_config_is_caught_twice(plant, pair, monkeypatch):
    """By the configuration itself, and, if that check were blind, by the hidden states of the first layer that computes with it."""
    family, change, message, first_layer = CONFIG_PLANTS[plant]
    checkpoint, export = pair(family)
    edit_json(export / "config.json", rope_parameters=None, **change)  # transformers 5 writes its own spelling beside it
    found, proof = failing(checkpoint, export)
    assert "config.json: " + message in found or message in found
    assert any(row["relative"] > 1e-5 for row in proof["layers"])
    monkeypatch.setattr(verify_module, "_config", lambda *args: [])
    found, _ = failing(checkpoint, export)
    assert "layer %d (" % first_layer in found and "over the tolerance of 1e-05" in found


def test_a_head_tied_by_config_alone(pair):
    """tie_word_embeddings true over an untied head: transformers would silently replace the trained head."""
    checkpoint, export = pair("llama")
    edit_json(export / "config.json", tie_word_embeddings=True)
    found, _ = failing(checkpoint, export)
    assert "tied is False in the checkpoint, True in the export" in found


@pytest.mark.skipif(VERSION >= (5, 0), reason="transformers 5 keeps a head that the file has, whatever config.json says")
def test_transformers_own_tying_is_checked(pair, monkeypatch):
    checkpoint, export = pair("llama")
    edit_json(export / "config.json", tie_word_embeddings=True)
    monkeypatch.setattr(verify_module, "_config", lambda *args: [])
    monkeypatch.setattr(verify_module, "_tensors", lambda *args: [])
    found, _ = failing(checkpoint, export)
    assert "transformers ties the head to the embedding, the checkpoint keeps the head apart" in found


def test_untying_a_tied_model(pair):
    checkpoint, export = pair("bloom")
    edit_json(export / "config.json", tie_word_embeddings=False)
    assert "tied is True in the checkpoint, False in the export" in failing(checkpoint, export)[0]


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
    with pytest.raises(UserError, match="--tolerance 0: expected a number between 0 and 1"):
        verify(str(checkpoint), str(export), tolerance=0)


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
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda path: lambda text: stub)
    with pytest.raises(RunFailed, match="gives no ids, or the same ones for different texts; its files are not whole"):
        forward.text_ids(tmp_path, list(forward.TEXTS), open_dims(tiny_config("llama")))
    stub["input_ids"] = []
    with pytest.raises(RunFailed, match="gives no ids"):
        forward.text_ids(tmp_path, ["Hello"], open_dims(tiny_config("llama")))
