"""The proof holds for an honest export and names what is wrong with every other one."""

import json
import re

import pytest
import torch

from export import prompts
from export import verify as verify_module
from export.verify import verify
from pipeline_train import families, manifest
from tests.models import tiny_config
from tests.roundtrip.folders import VERSION, change_weights, edit_json, failing, needs


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
    assert all(0 <= row["relative"] < 1e-5 and row["max"] > 0 for row in proof["layers"] + [proof["logits"]])
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
    dims = families.dims_of(tiny_config("bloom", vocab_size=250880))
    ids = prompts.random_ids(dims)
    assert len(ids) == prompts.RANDOM_LENGTH == len({i * prompts.RANDOM_LENGTH // dims.vocab for i in ids})
    assert ids == prompts.random_ids(dims) and max(ids) < dims.vocab
    assert len(prompts.random_ids(families.dims_of(tiny_config("llama", max_position_embeddings=16)))) == 16


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
