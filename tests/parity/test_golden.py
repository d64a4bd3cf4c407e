"""Our layers against golden values of the llama variants that transformers 4.30 does not know (grouped queries, another rotary base
or scaling, biases, head sizes): on every stack. Where transformers does know them, the golden values are held against it too."""

import pytest
import transformers

from tests.parity import golden

TOLERANCE = 1e-5
VERSION = tuple(int(part) for part in transformers.__version__.split(".")[:2])
STORED = golden.stored()
each_case = pytest.mark.parametrize("name", list(golden.CASES))


def off(tensors, wanted):
    """Names of the tensors whose digest is not the stored one."""
    assert set(tensors) == set(wanted)
    return [key for key, tensor in tensors.items()
            if golden.differs(golden.digest(tensor), wanted[key], tensor.numel(), TOLERANCE)]  # fmt: skip


def test_every_variant_that_the_pinned_transformers_lacks_has_golden_values():
    assert set(STORED) == set(golden.CASES) | {"transformers"} and len(golden.CASES) == 8


@each_case
def test_our_layers_compute_the_golden_values(name):
    assert off(golden.of_ours(name), STORED[name]) == []


@each_case
def test_the_golden_values_are_what_transformers_computes(name):
    since = golden.CASES[name].since
    if VERSION < since:
        pytest.skip("transformers %s does not compute this variant (since %d.%d)" % ((transformers.__version__,) + since))
    assert off(golden.of_transformers(name), STORED[name]) == []


def test_a_digest_tells_small_differences():
    """One element off by a thousandth, two elements swapped, nan: none may pass."""
    tensors = golden.of_ours("llama-gqa")
    tensor = tensors["logits"].detach()
    wanted = golden.digest(tensor)
    assert not golden.differs(golden.digest(tensor.clone()), wanted, tensor.numel(), TOLERANCE)
    place = int(tensor.abs().argmax()) // 131
    for change in (lambda t: t[place].mul_(1.001), lambda t: t[3, 4].fill_(float("nan")), lambda t: t.copy_(t.flip(0))):
        other = tensor.clone()
        change(other)
        assert golden.differs(golden.digest(other), wanted, tensor.numel(), TOLERANCE)
