"""config.json of every age -> Dims; what is not implemented is refused by its name; no torch anywhere."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline_train import families
from pipeline_train.errors import UserError
from pipeline_train.families import RopeScaling
from tests.models import LLAMA3_SCALING, tiny_config
from tests.real_configs import BLOOM_176B, BLOOM_560M, BLOOM_V5, LLAMA_31, LLAMA_2023, LLAMA_V5, SMOLLM2, VICUNA_16K

ROOT = Path(__file__).resolve().parents[2]

SCALING_31 = RopeScaling("llama3", 8.0, 1.0, 4.0, 8192)
AGES = {
    "llama-2023": (LLAMA_2023, 6738415616,
                   {"kv_heads": 32, "head_dim": 128, "rope_theta": 10000.0, "tied": False, "max_positions": 2048}),
    "vicuna-16k": (VICUNA_16K, 6738415616, {"rope_scaling": RopeScaling("linear", 4.0), "max_positions": 16384}),
    "llama-3.1": (LLAMA_31, 8030261248,
                  {"kv_heads": 8, "rope_theta": 500000.0, "rope_scaling": SCALING_31, "max_positions": 131072}),
    "smollm2": (SMOLLM2, 134515008,
                {"tied": True, "heads": 9, "kv_heads": 3, "head_dim": 64, "rope_theta": 100000.0, "rope_scaling": None}),
    "llama-v5": (LLAMA_V5, 8030261248, {"kv_heads": 8, "head_dim": 128, "rope_theta": 500000.0, "rope_scaling": SCALING_31}),
    "bloom-560m": (BLOOM_560M, 559214592, {"hidden": 1024, "blocks": 24, "heads": 16, "tied": True, "max_positions": None}),
    "bloom-176b": (BLOOM_176B, 176247271424, {"hidden": 14336, "blocks": 70, "heads": 112, "ffn": 57344, "tied": True}),
    "bloom-v5": (BLOOM_V5, 559214592, {"hidden": 1024, "blocks": 24, "heads": 16, "tied": True}),
}  # fmt: skip


@pytest.mark.parametrize("age", AGES)
def test_config_of_every_age(age):
    """Sizes read from published files; the parameter counts are the published ones."""
    config, parameters, expected = AGES[age]
    family, dims = families.family_of(config), families.dims_of(config)
    assert {key: getattr(dims, key) for key in expected} == expected
    total = sum(family.layer_params(dims, layer) for layer in range(dims.layers))
    assert total - (dims.vocab * dims.hidden if dims.tied else 0) == parameters


@pytest.mark.parametrize("family", list(families.FAMILIES))
def test_every_key_that_the_installed_transformers_writes_is_understood(family):
    from transformers import AutoConfig

    full = AutoConfig.for_model(family).to_dict()  # all keys, also those that save_pretrained leaves out
    assert families.dims_of(full).family == family


def test_theta_and_scaling_in_either_shape_are_the_same():
    old = tiny_config("llama", rope_theta=500.0, rope_scaling=LLAMA3_SCALING)
    new = tiny_config("llama", rope_parameters=dict(LLAMA3_SCALING, rope_theta=500.0))
    del new["rope_theta"]
    both = dict(old, rope_parameters=new["rope_parameters"])
    assert families.dims_of(old) == families.dims_of(new) == families.dims_of(both)
    oldest = tiny_config("llama", rope_scaling={"type": "linear", "factor": 2})
    newest = tiny_config("llama", rope_scaling={"rope_type": "linear", "type": "linear", "factor": 2.0})
    assert families.dims_of(oldest) == families.dims_of(newest)
    plain = tiny_config("llama", rope_parameters={"rope_type": "default", "rope_theta": 10000.0}, rope_scaling=None)
    assert families.dims_of(plain) == families.dims_of(tiny_config("llama"))


def test_absent_and_null_keys_take_transformers_defaults():
    config = tiny_config("llama", head_dim=None, num_key_value_heads=None)
    for key in ("rope_theta", "tie_word_embeddings", "rms_norm_eps", "max_position_embeddings"):
        del config[key]
    dims = families.dims_of(config)
    assert (dims.head_dim, dims.kv_heads, dims.rope_theta, dims.tied, dims.norm_eps, dims.max_positions, dims.init_std) == (
        12, 4, 10000.0, False, 1e-6, 2048, 0.02,
    )  # fmt: skip
    config = tiny_config("bloom")
    del config["tie_word_embeddings"]
    assert families.dims_of(config).tied is True


REFUSED = [
    ("llama", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_scaling: rope_type: 'yarn' is not implemented"),
    ("llama", {"rope_scaling": {"type": "dynamic", "factor": 4.0}}, "rope_scaling: type: 'dynamic' is not implemented"),
    ("llama", {"rope_parameters": {"rope_type": "longrope"}}, "rope_parameters: rope_type: 'longrope' is not implemented"),
    ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0, "attention_factor": 1.1}}, "rope_scaling: attention_factor: not"),
    ("llama", {"rope_parameters": {"rope_type": "default", "mscale": 1.0}}, "rope_parameters: mscale: not implemented"),
    ("llama", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "rope_parameters: partial_rotary_factor: 0.5"),
    ("llama", {"rope_scaling": {"type": "linear"}}, "rope_scaling: factor: missing"),
    ("llama", {"rope_scaling": {"type": "linear", "factor": -2.0}}, "rope_scaling: factor: expected a positive float"),
    ("llama", {"rope_scaling": {"type": "linear", "rope_type": "llama3"}}, "rope_type is 'llama3' but type is 'linear'"),
    ("llama", {"rope_scaling": dict(LLAMA3_SCALING, high_freq_factor=1.0)}, "high_freq_factor: must be greater than low_freq"),
    ("llama", {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_scaling: low_freq_factor: missing"),
    ("llama", {"rope_scaling": "linear"}, "rope_scaling: expected a dictionary or null, got 'linear'"),
    ("llama", {"rope_parameters": {"rope_theta": 5.0}}, "two values of the rotary rope_theta"),
    ("llama", {"rope_parameters": {"type": "default"}, "rope_scaling": {"type": "linear", "factor": 2.0}}, "the rotary scaling"),
    ("llama", {"hidden_act": "gelu"}, "hidden_act: 'gelu' is not implemented (implemented: 'silu')"),
    ("llama", {"pretraining_tp": 2}, "pretraining_tp: 2 is not implemented"),
    ("llama", {"attention_dropout": 0.1}, "attention_dropout: 0.1 is not implemented"),
    ("llama", {"rope_interleaved": True}, "rope_interleaved: True is not implemented"),
    ("llama", {"quantization_config": {"bits": 4}}, "quantization_config: not implemented"),
    ("llama", {"sliding_window": 4096, "qk_norm": True}, "qk_norm, sliding_window: not implemented"),
    ("llama", {"num_key_value_heads": 3}, "4 query heads cannot share 3 key-value heads"),
    ("llama", {"num_attention_heads": 5, "num_key_value_heads": 5}, "48 is not a multiple of 5 heads, and no head_dim"),
    ("llama", {"head_dim": 7}, "head_dim: 7 is odd"),
    ("llama", {"hidden_size": None}, "hidden_size: missing"),
    ("llama", {"vocab_size": "131"}, "vocab_size: expected a positive int, got '131'"),
    ("llama", {"tie_word_embeddings": "yes"}, "tie_word_embeddings: expected true or false, got 'yes'"),
    ("bloom", {"hidden_dropout": 0.1}, "hidden_dropout: 0.1 is not implemented"),
    ("bloom", {"attention_dropout": 0.1}, "attention_dropout: 0.1 is not implemented"),
    ("bloom", {"n_inner": 100}, "n_inner: 100 is not implemented (implemented: 192)"),
    ("bloom", {"n_embed": 64}, "hidden_size is 48 but n_embed is 64"),
    ("bloom", {"num_attention_heads": 8}, "n_head is 4 but num_attention_heads is 8"),
    ("bloom", {"n_head": 5}, "hidden_size: 48 is not a multiple of 5 heads"),
    ("bloom", {"pretraining_tp": 4, "slow_but_exact": True}, "slow_but_exact: True is not implemented"),
    ("bloom", {"attention_softmax_in_fp32": False}, "attention_softmax_in_fp32: False is not implemented"),
    ("bloom", {"position_embedding_type": "rope"}, "position_embedding_type: not implemented"),
    ("mistral", {}, "model_type: 'mistral' is not supported (supported: llama, bloom)"),
]


@pytest.mark.parametrize("family, overrides, message", REFUSED)
def test_refused_by_name(family, overrides, message):
    config = dict(tiny_config("llama"), model_type="mistral") if family == "mistral" else tiny_config(family, **overrides)
    with pytest.raises(UserError) as error:
        families.dims_of(config)
    assert message in str(error.value)
    assert str(error.value).startswith("config.json") and "\n" not in str(error.value)


def test_a_config_without_a_model_type():
    with pytest.raises(UserError, match=r"config.json: model_type: missing.*supported: llama, bloom"):
        families.family_of({"hidden_size": 4})


def test_read_config(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(BLOOM_560M))
    assert families.read_config(str(tmp_path)) == families.read_config(str(tmp_path / "config.json")) == BLOOM_560M


def test_a_run_without_a_checkpoint_is_called_so(tmp_path):
    (tmp_path / "resolved").mkdir()
    with pytest.raises(UserError) as caught:
        families.read_config(str(tmp_path))
    assert str(caught.value) == "%s: is a run that has saved no checkpoint yet" % tmp_path


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "no such file. A model folder holds config.json"),
        (b"{", "not valid JSON: Expecting property name"),
        (b"\xff\xfe{}", "not valid JSON: 'utf-8' codec can't decode"),
        (b'{"rms_norm_eps": NaN}', "not valid JSON: NaN is not a number"),
        (b"[1]", "expected a JSON object with model_type and sizes, found list"),
    ],
)
def test_read_config_of_what_is_none(tmp_path, content, message):
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(UserError) as error:
        families.read_config(str(tmp_path))
    assert str(error.value).startswith(str(tmp_path / "config.json") + ": ") and message in str(error.value)


IGNORED = {
    "llama": ["model.layers.31.self_attn.rotary_emb.inv_freq"],
    "bloom": [
        "transformer.h.0.self_attention.scale_mask_softmax.causal_mask",
        "h.12.self_attention.scale_mask_softmax.causal_mask",
    ],
}


@pytest.mark.parametrize("name", list(families.FAMILIES))
def test_ignorable_keys_are_never_parameters(name):
    family = families.FAMILIES[name]
    for key in IGNORED.get(name, []):
        assert any(re.search(pattern, key) for pattern in family.ignorable), key
    for slot in family.slots:
        for key in (slot.hf.format(i=3), slot.hf.format(i=3)[len(family.optional_prefix) :]):
            assert not any(re.search(pattern, key) for pattern in family.ignorable), key


@pytest.mark.parametrize("name", list(families.FAMILIES))
def test_a_family_is_consistent(name):
    family = families.FAMILIES[name]
    names = {slot.hf for slot in family.slots}
    assert len(names) == len(family.slots) == len({(slot.layer, slot.name) for slot in family.slots})
    assert set(family.tied) <= names
    assert all("{i}" in slot.hf for slot in family.slots if slot.layer == "block")
    assert all(slot.hf.format(i=0).endswith(slot.name) for slot in family.slots)


def test_works_in_a_bare_interpreter():
    """-S: no installed package can be imported at all, so the standard library has to be enough."""
    code = (
        "from pipeline_train import families; import sys\n"
        "dims = families.dims_of(%r)\n"
        "assert 'torch' not in sys.modules and 'msgspec' not in sys.modules\n"
        "print(dims.layers, families.family_of(%r).layer_params(dims, 1))" % (SMOLLM2, SMOLLM2)
    )
    done = subprocess.run([sys.executable, "-S", "-E", "-c", code], cwd=str(ROOT), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert done.stdout.decode().split() == ["32", "3540096"], done.stdout.decode()
