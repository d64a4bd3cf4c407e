"""Slot <-> HF name: a bijection in both directions, and transformers agrees with it name by name and shape by shape."""

import pytest

from export import naming
from pipeline_train import families
from tests.models import VARIANTS, tiny_config
from tests.roundtrip.folders import needs, state_of


def setup(variant):
    config = tiny_config(variant.family, **variant.overrides)
    return families.family_of(config), families.dims_of(config)


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
def test_names_are_a_bijection(variant):
    family, dims = setup(variant)
    to_hf, from_hf = naming.hf_names(family, dims), naming.slot_keys(family, dims)
    assert len(to_hf) == len(from_hf) == len(naming.slots(family, dims)) == len({*to_hf.values()})
    assert all(from_hf[name] == key for key, name in to_hf.items())
    assert all(to_hf[key] == name for name, key in from_hf.items())


@pytest.mark.parametrize("variant", [pytest.param(v, id=v.name, marks=needs(v.since, v.name)) for v in VARIANTS])
def test_transformers_has_exactly_these_names_and_shapes(variant):
    from transformers import AutoConfig, AutoModelForCausalLM

    family, dims = setup(variant)
    config = tiny_config(variant.family, **variant.overrides)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(config.pop("model_type"), **config))
    ours = {family.hf_name(slot, layer): slot.size(dims) for layer, slot in naming.slots(family, dims)}
    assert ours == {name: tuple(tensor.shape) for name, tensor in state_of(model).items()}
