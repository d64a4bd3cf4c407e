"""Checkpoints of every age load strictly, convert bit-equal in both directions, and compute the same in transformers."""

import json
from inspect import signature

import pytest
import torch
from transformers import AutoModelForCausalLM

from export.from_hf import from_hf
from export.to_hf import to_hf
from export.verify import verify
from pipeline_train.weights import files, open_source, same_bits
from tests.models import VARIANTS, make_hf, tiny_config

from .folders import AGES, llama_of_430, make_checkpoint, needs, sharded_safetensors, state_of


def assert_source_is(source, model):
    """Layer by layer: exactly the slots, in order, with the model's values in the file's own dtype."""
    state = state_of(model)
    for layer in range(source.dims.layers):
        tensors = source.layer(layer)
        slots = source.family.layer_slots(source.dims, layer)
        assert list(tensors) == [slot.name for slot in slots]
        for slot in slots:
            assert same_bits(tensors[slot.name], state[source.family.hf_name(slot, layer)].to(tensors[slot.name].dtype))


@pytest.mark.parametrize("age", AGES, ids=lambda age: age.__name__)
def test_every_age_loads_and_comes_back_bit_equal(age, tmp_path):
    model = age(tmp_path / "hf")
    source = open_source(str(tmp_path / "hf"))
    source.check()
    assert_source_is(source, model)

    from_hf(str(tmp_path / "hf"), str(tmp_path / "layers"))
    layers = open_source(str(tmp_path / "layers"))
    layers.check()
    assert_source_is(layers, model)
    assert [layers.entry(n, s.name) for n, s in layers.slots()] == [source.entry(n, s.name) for n, s in source.slots()]

    to_hf(str(tmp_path / "layers"), str(tmp_path / "export"))
    dtype = torch.float32
    back, info = AutoModelForCausalLM.from_pretrained(str(tmp_path / "export"), output_loading_info=True, torch_dtype=dtype)
    assert not info["unexpected_keys"] and not info["mismatched_keys"]
    back, expected = state_of(back), state_of(model)
    assert set(back) == set(expected) and all(same_bits(back[name], expected[name]) for name in expected)
    assert verify(str(tmp_path / "hf"), str(tmp_path / "export"))["holds"]


@pytest.mark.parametrize("variant", [pytest.param(v, id=v.name, marks=needs(v.since, v.name)) for v in VARIANTS])
def test_every_variant_of_both_families_is_proved(variant, tmp_path):
    make_hf(tmp_path / "hf", tiny_config(variant.family, **variant.overrides))
    from_hf(str(tmp_path / "hf"), str(tmp_path / "layers"))
    to_hf(str(tmp_path / "layers"), str(tmp_path / "export"), shard_size="100KB")
    assert verify(str(tmp_path / "layers"), str(tmp_path / "export"))["logits"]["relative"] < 1e-5


@pytest.mark.parametrize("family", ["llama", "bloom"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_a_run_is_exported_in_its_own_dtype(family, tied, dtype, tmp_path):
    """Rounded from the fp32 master weights; --dtype wins over the run's."""
    model = make_checkpoint(tmp_path / "step_000007", tiny_config(family, tie_word_embeddings=tied), run_dtype=dtype)
    told = to_hf(str(tmp_path / "step_000007"), str(tmp_path / "export"), shard_size="50KB")
    assert (told["dtype"], told["tied"], told["step"]) == (dtype, tied, 7) and told["shards"] > 1
    config = json.loads((tmp_path / "export" / "config.json").read_text())
    assert config["tie_word_embeddings"] is tied
    assert config["torch_dtype"] == {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}[dtype]

    loaded = AutoModelForCausalLM.from_pretrained(str(tmp_path / "export"), torch_dtype="auto")
    expected = {name: tensor.to(loaded.dtype) for name, tensor in state_of(model).items()}
    assert all(same_bits(tensor, expected[name]) for name, tensor in state_of(loaded).items())
    assert verify(str(tmp_path / "step_000007"), str(tmp_path / "export"))["dtype"] == dtype

    to_hf(str(tmp_path / "step_000007"), str(tmp_path / "wide"), dtype="fp32")
    wide = state_of(AutoModelForCausalLM.from_pretrained(str(tmp_path / "wide")))
    assert all(same_bits(tensor, wide[name]) for name, tensor in state_of(model).items())


@pytest.mark.parametrize("family", ["llama", "bloom"])
def test_an_untied_head_survives_a_reload(family, tmp_path):
    """transformers ties again, silently, when config.json does not say false."""
    model = make_checkpoint(tmp_path / "c", tiny_config(family, tie_word_embeddings=False))
    to_hf(str(tmp_path / "c"), str(tmp_path / "export"))
    loaded = AutoModelForCausalLM.from_pretrained(str(tmp_path / "export"))
    loaded.save_pretrained(str(tmp_path / "again"))
    again = AutoModelForCausalLM.from_pretrained(str(tmp_path / "again"))
    for one in (loaded, again):
        assert same_bits(one.lm_head.weight.detach(), model.lm_head.weight.detach())
        assert not torch.equal(one.lm_head.weight, one.get_input_embeddings().weight)


def test_keys_of_tied_exports(tmp_path):
    """bloom carries its head (servers look for it), llama does not (its loaders rebuild it)."""
    for family, has_head in (("bloom", True), ("llama", False)):
        make_checkpoint(tmp_path / family, tiny_config(family, tie_word_embeddings=True))
        to_hf(str(tmp_path / family), str(tmp_path / (family + "-export")))
        names = open_source(str(tmp_path / (family + "-export"))).names()
        assert ("lm_head.weight" in names) is has_head
        assert all(name.startswith(("transformer.", "model.", "lm_head.")) for name in names)


NEW_TORCH = pytest.mark.skipif("mmap" not in signature(torch.load).parameters, reason="this torch cannot map a .bin")


@pytest.mark.parametrize("mapped", [pytest.param(True, id="mmap", marks=NEW_TORCH), pytest.param(False, id="as torch 1.13")])
def test_one_bin_shard_in_memory_at_a_time(mapped, tmp_path, monkeypatch):
    """torch 1.13 cannot map a .bin: a shard is then loaded once per use, never two at once."""
    model = llama_of_430(tmp_path)
    held, load = [], torch.load

    def old_load(path, map_location=None, weights_only=False):
        return load(path, map_location=map_location, weights_only=weights_only)

    if not mapped:
        monkeypatch.setattr(files.torch, "load", old_load)
    source = open_source(str(tmp_path))
    shards = {place.file for place in source._places.values()}
    assert len(shards) == 2 and all(shard.mapped is mapped for shard in shards)
    for layer in range(source.dims.layers):
        assert list(source.layer(layer))
        held.append(sum(shard._state is not None for shard in shards))
    assert max(held) == (0 if mapped else 1)
    assert_source_is(source, model)


def test_a_layer_opens_no_other_shard(tmp_path, monkeypatch):
    """A stage reads its own tensors only."""
    sharded_safetensors(tmp_path)
    source = open_source(str(tmp_path))
    read = []
    original = files.SafetensorsFile._read
    monkeypatch.setattr(files.SafetensorsFile, "_read", lambda self, name, *span: read.append(name) or original(self, name, *span))
    source.check()
    assert read == []
    source.layer(2)
    assert read and all(name.startswith("model.layers.1.") for name in read)
