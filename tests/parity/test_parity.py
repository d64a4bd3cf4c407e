"""Our layers against transformers' models on the same weights and tokens: logits, every hidden state, every gradient."""

import copy
import functools
import tempfile

import pytest
import torch
import transformers
from torch.nn import functional as F

from pipeline_train import families
from pipeline_train.models.loss import token_loss
from tests.models import VARIANTS, make_hf, our_forward, our_layers, tiny_config

TOLERANCE = 1e-5  # of the largest element of each tensor
VERSION = tuple(int(part) for part in transformers.__version__.split(".")[:2])
LENGTHS = (11, 1, 20, 7)  # samples of the packed row
SCALE = 0.37


def rows():
    for variant in VARIANTS:
        marks = []
        if VERSION < variant.since:
            reason = "transformers %s does not compute this variant (since %d.%d)" % ((transformers.__version__,) + variant.since)
            marks.append(pytest.mark.skip(reason=reason))
        yield pytest.param(variant, id=variant.name, marks=marks)


each_variant = pytest.mark.parametrize("variant", list(rows()))


@functools.lru_cache(maxsize=None)
def reference(name):
    """The variant's config.json as transformers wrote it, and its model."""
    variant = next(v for v in VARIANTS if v.name == name)
    with tempfile.TemporaryDirectory() as directory:
        model = make_hf(directory, tiny_config(variant.family, **variant.overrides), seed=len(name))
        return families.read_config(directory), model


def tokens(dims, *shape, seed=0):
    return torch.randint(0, dims.vocab, shape, generator=torch.Generator().manual_seed(seed))


def padded_batch(dims):
    """Three rows of 40: full, 33 tokens, 9 tokens; padding on the right, as plain transformers takes it."""
    ids = tokens(dims, 3, 40)
    lengths = torch.tensor([40, 33, 9])
    segments = (torch.arange(40) < lengths[:, None]).long()
    positions = torch.arange(40) * segments
    targets = torch.roll(ids, -1, dims=1).masked_fill(torch.arange(40) >= lengths[:, None] - 1, -100)
    targets[0, 5:12] = -100  # a prompt that is not learnt
    return ids, positions, segments, targets


def relative(ours, theirs):
    """max|ours - theirs| / max|theirs|; nan, which fails any bound, if either holds one."""
    return float((ours.detach().float() - theirs.detach().float()).abs().max() / theirs.detach().float().abs().max())


@each_variant
def test_logits_and_hidden_states(variant):
    config, model = reference(variant.name)
    dims, layers = our_layers(model, config)
    ids, positions, segments, _ = padded_batch(dims)
    with torch.no_grad():
        theirs = model(ids, attention_mask=segments, output_hidden_states=True)
        hidden, logits = our_forward(layers, ids, positions, segments)
    real = segments.bool()
    assert relative(logits[real], theirs.logits[real]) <= TOLERANCE
    assert len(hidden) == len(theirs.hidden_states) == dims.blocks + 1
    for ours, expected in zip(hidden, theirs.hidden_states):
        assert relative(ours[real], expected[real]) <= TOLERANCE
    assert torch.isfinite(logits).all()  # padding included


@each_variant
def test_every_gradient(variant):
    config, model = reference(variant.name)
    model = copy.deepcopy(model).train()  # bloom's GELU has a backward of its own in training mode
    dims, layers = our_layers(model, config)
    family = families.family_of(config)
    ids, positions, segments, targets = padded_batch(dims)
    logits = model(ids, attention_mask=segments).logits
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum") * SCALE
    expected.backward()
    loss = token_loss(our_forward(layers, ids, positions, segments)[1], targets, SCALE)
    loss.backward()
    assert relative(loss, expected) <= TOLERANCE
    ours = {}
    for layer, module in enumerate(layers):
        parameters = dict(module.named_parameters())
        for slot in family.layer_slots(dims, layer):
            ours[family.hf_name(slot, layer)] = parameters[slot.name].grad
    if dims.tied:  # two copies here, one parameter there: the stages add the two gradients
        ours[family.tied[0]] = ours[family.tied[0]] + ours.pop(family.tied[1])
    theirs = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert set(ours) == set(theirs)
    for name, gradient in theirs.items():
        assert relative(ours[name], gradient) <= TOLERANCE, name


@each_variant
def test_packed_row_equals_each_sample_alone(variant):
    config, model = reference(variant.name)
    dims, layers = our_layers(model, config)
    ids = tokens(dims, 1, sum(LENGTHS) + 5, seed=1)
    segments = torch.cat([torch.full((n,), i + 1) for i, n in enumerate(LENGTHS)] + [torch.zeros(5, dtype=torch.long)])[None]
    positions = torch.cat([torch.arange(n) for n in LENGTHS + (5,)])[None]
    with torch.no_grad():
        packed = our_forward(layers, ids, positions, segments)[1]
        start = 0
        for length in LENGTHS:
            alone = model(ids[:, start : start + length]).logits
            assert relative(packed[:, start : start + length], alone) <= TOLERANCE
            start += length
        other = ids.clone()
        other[0, : LENGTHS[0]] = (other[0, : LENGTHS[0]] + 1) % dims.vocab
        changed = our_forward(layers, other, positions, segments)[1]
    assert not torch.equal(changed[:, : LENGTHS[0]], packed[:, : LENGTHS[0]])
    assert torch.equal(changed[:, LENGTHS[0] :], packed[:, LENGTHS[0] :])  # nothing leaks from the first sample


@each_variant
def test_slots_are_the_model(variant):
    """Slot names, HF names, shapes and counts, against our modules and transformers'."""
    config, model = reference(variant.name)
    dims, layers = our_layers(model, config)
    family = families.family_of(config)
    shapes = {}
    for layer, module in enumerate(layers):
        slots = family.layer_slots(dims, layer)
        assert [(s.name, s.size(dims)) for s in slots] == [(k, tuple(v.shape)) for k, v in module.state_dict().items()]
        assert sum(p.numel() for p in module.parameters()) == family.layer_params(dims, layer)
        shapes.update({family.hf_name(s, layer): s.size(dims) for s in slots})
    saved = {key: tuple(value.shape) for key, value in model.state_dict().items() if not key.endswith("inv_freq")}
    assert shapes == saved
    total = sum(family.layer_params(dims, layer) for layer in range(dims.layers))
    assert total - (dims.vocab * dims.hidden if dims.tied else 0) == model.num_parameters()


@pytest.mark.parametrize("name", ["llama-mha", "bloom-4-heads", "bloom-3-heads"])
def test_bf16_is_as_near_to_fp32_as_transformers_is(name):
    """In bf16 both round; ours must not be farther from the exact logits than transformers' eager attention."""
    config, model = reference(name)
    half = copy.deepcopy(model).bfloat16()
    dims, layers = our_layers(half, config)
    ids = tokens(dims, 4, 64, seed=2)
    positions = torch.arange(64).expand(4, 64)
    with torch.no_grad():
        exact = model(ids).logits
        theirs = half(ids).logits
        ours = our_forward(layers, ids, positions, torch.ones_like(positions))[1]
    assert ours.dtype == torch.bfloat16
    mean = [float((x.float() - exact).abs().mean() / exact.abs().mean()) for x in (ours, theirs)]
    assert mean[0] <= 1.2 * mean[1], mean
    assert mean[0] < 0.05, mean
