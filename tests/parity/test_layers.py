"""The parts under the layers: ALiBi slopes, rotary frequencies, the two attention paths, the loss, initialisation."""

import math

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline_train import families, models
from pipeline_train.models import attention, llama, loss
from tests import compiler
from tests.models import tiny_config

SEGMENTS = torch.tensor([[1] * 5 + [2] * 1 + [3] * 6 + [0] * 4, [1] * 16])
POSITIONS = torch.tensor([[0, 1, 2, 3, 4, 0, 0, 1, 2, 3, 4, 5, 0, 1, 2, 3], list(range(16))])


def random(*shape, seed=0, scale=1.0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def test_alibi_slopes_of_any_head_count():
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor

    mask = torch.ones(1, 2, dtype=torch.long)
    for heads in list(range(1, 130)) + [112, 160]:
        theirs = build_alibi_tensor(mask, heads, torch.float32)[:, 0, 1]  # slope * position 1
        ours = torch.tensor(attention.alibi_slopes(heads))
        assert ours.shape == theirs.shape
        assert ((ours - theirs).abs() / theirs).max() < 1e-6, heads


@pytest.mark.parametrize("scaling", [None, "linear", "llama3"])
def test_rotary_frequencies_of_llama_3(scaling):
    """Llama 3.1's published sizes: 64 frequencies, base 500000, wavelengths on all three sides of the blend."""
    section = {"rope_type": scaling, "factor": 8.0}
    if scaling == "llama3":
        section.update(low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192)
    config = tiny_config("llama", head_dim=128, rope_theta=500000.0, rope_scaling=section if scaling else None)
    dims = families.dims_of(config)
    ours = llama.inverse_frequencies(dims.head_dim, dims.rope_theta, dims.rope_scaling, torch.device("cpu")).double()
    plain = 500000.0 ** (-torch.arange(0, 128, 2).double() / 128)
    expected = plain if scaling is None else plain / 8
    if scaling == "llama3":
        blend = ((8192 * plain / (2 * math.pi) - 1) / 3).clamp(0, 1)
        assert (blend == 0).any() and (blend == 1).any() and ((blend > 0) & (blend < 1)).any()
        expected = (1 - blend) * plain / 8 + blend * plain
    assert ((ours - expected).abs() / expected).max() < 1e-5


@pytest.mark.skipif(not attention.HAS_SDPA, reason="this torch has no scaled_dot_product_attention; eager is the only path")
@pytest.mark.parametrize("alibi", [False, True])
@pytest.mark.parametrize("groups", [1, 3])
def test_sdpa_equals_eager(monkeypatch, alibi, groups):
    """The path of torch 1.13 computes what the path of torch 2 computes, values and gradients."""
    slopes = torch.tensor(attention.alibi_slopes(6)) if alibi else None
    results = []
    for sdpa in (True, False):
        monkeypatch.setattr(attention, "HAS_SDPA", sdpa)
        q = random(2, 6, 16, 8, seed=1).requires_grad_()
        k, v = (random(2, 6 // groups, 16, 8, seed=seed).requires_grad_() for seed in (2, 3))
        mixed = attention.attend(q, k, v, SEGMENTS, POSITIONS, slopes)
        assert mixed.shape == (2, 16, 48)
        mixed.backward(random(2, 16, 48, seed=4))
        results.append([mixed, q.grad, k.grad, v.grad])
    for one, other in zip(*results):
        assert torch.isfinite(one).all()
        assert (one - other).abs().max() <= 1e-5 * other.abs().max()


@pytest.mark.parametrize(
    "sdpa", [False, pytest.param(True, marks=pytest.mark.skipif(not attention.HAS_SDPA, reason="no sdpa here"))]
)
def test_attention_by_the_definition(monkeypatch, sdpa):
    """Token by token: softmax over the earlier tokens of the same sample, with ALiBi, in float64."""
    monkeypatch.setattr(attention, "HAS_SDPA", sdpa)
    slopes = attention.alibi_slopes(3)
    q, k, v = random(2, 3, 16, 4, seed=1), random(2, 1, 16, 4, seed=2), random(2, 1, 16, 4, seed=3)
    mixed = attention.attend(q, k, v, SEGMENTS, POSITIONS, torch.tensor(slopes)).reshape(2, 16, 3, 4)
    for row in range(2):
        for head in range(3):
            for i in range(16):
                seen = [j for j in range(i + 1) if SEGMENTS[row, j] == SEGMENTS[row, i]]
                scores = k[row, 0, seen].double() @ q[row, head, i].double() / 2
                scores = scores + slopes[head] * POSITIONS[row, seen].double()
                expected = scores.softmax(0) @ v[row, 0, seen].double()
                assert (mixed[row, i, head].double() - expected).abs().max() < 1e-5


def test_a_row_of_padding_has_finite_values_and_gradients():
    for family in families.FAMILIES:
        dims = families.dims_of(tiny_config(family))
        block = models.build_layer(dims, 1)
        models.init_layer(block, dims, 1, seed=0)
        hidden = random(1, 8, dims.hidden).requires_grad_()
        zeros = torch.zeros(1, 8, dtype=torch.long)
        out = block(hidden, zeros, zeros)
        out.sum().backward()
        assert torch.isfinite(out).all() and torch.isfinite(hidden.grad).all()
        assert all(torch.isfinite(p.grad).all() for p in block.parameters())


COMPILED = pytest.param(None, marks=pytest.mark.skipif(not compiler.CAN, reason=compiler.WHY_NOT), id="compiled")
TARGETS = torch.tensor([[3, -100, 0, 8, -100], [-100, 1, 1, -100, 7]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("chunk", [1, 27, 1 << 24, COMPILED])
def test_loss_is_the_sum_over_learnt_tokens(monkeypatch, dtype, chunk):
    if chunk is not None:
        monkeypatch.setattr(loss, "CHUNK", chunk)  # 1 row at a time; 3 of 10; all
    logits = random(2, 5, 9, scale=4.0).to(dtype).requires_grad_()
    same = logits.detach().float().requires_grad_()
    ours = loss.token_loss(logits, TARGETS, 0.25, chunk is None)
    theirs = F.cross_entropy(same.flatten(0, 1), TARGETS.flatten(), ignore_index=-100, reduction="sum") * 0.25
    assert ours.dtype == torch.float32
    assert abs(ours.item() - theirs.item()) < 1e-5 * theirs.item()
    (ours * 1024).backward()  # a loss scale
    (theirs * 1024).backward()
    assert logits.grad.dtype == dtype
    bound = 1e-6 if dtype == torch.float32 else 4e-3
    assert (logits.grad.float() - same.grad).abs().max() < bound * same.grad.abs().max()


@pytest.mark.parametrize("chunk", [1 << 24, COMPILED])
def test_loss_of_nothing_learnt_is_zero(chunk):
    """An empty row, or a row whose logits overflowed but is not learnt, must not poison the step."""
    logits = torch.full((1, 3, 9), float("nan")).requires_grad_()
    nothing = loss.token_loss(logits, torch.full((1, 3), -100), 1.0, chunk is None)
    nothing.backward()
    assert nothing.item() == 0.0 and torch.equal(logits.grad, torch.zeros_like(logits))


@pytest.mark.parametrize("chunk", [1 << 24, COMPILED])
def test_loss_says_nan_when_a_learnt_token_is_nan(chunk):
    logits = torch.full((1, 1, 9), float("nan"))
    assert math.isnan(loss.token_loss(logits, torch.zeros(1, 1, dtype=torch.long), 1.0, chunk is None).item())


class Largest(TorchDispatchMode):
    """Remembers the size of the largest fp32 tensor that any operation returns."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor) and tensor.dtype == torch.float32:
                self.elements = max(self.elements, tensor.numel())
        return out


def test_loss_keeps_no_fp32_copy_of_the_logits(monkeypatch):
    monkeypatch.setattr(loss, "CHUNK", 4000)
    logits = random(4, 64, 1000).bfloat16().requires_grad_()
    targets = torch.zeros(4, 64, dtype=torch.long)
    with Largest() as largest:
        loss.token_loss(logits, targets, 1.0).backward()
    assert 0 < largest.elements <= 4000


@pytest.mark.parametrize("family", list(families.FAMILIES))
def test_init_depends_on_seed_layer_and_name_only(family):
    dims = families.dims_of(tiny_config(family, tie_word_embeddings=True))

    def start(layer, seed):
        module = models.build_layer(dims, layer)
        assert all(torch.isnan(p).all() for p in module.parameters())  # nothing is random before it is asked for
        models.init_layer(module, dims, layer, seed)
        return module.state_dict()

    torch.manual_seed(1)
    first = [start(layer, 7) for layer in range(dims.layers)]
    torch.manual_seed(2)
    again = [start(layer, 7) for layer in reversed(range(dims.layers))][::-1]
    for one, other in zip(first, again):
        assert all(torch.equal(one[name], other[name]) for name in one)
    matrices = [name for name, value in first[1].items() if value.dim() == 2]
    for name in matrices:
        assert not torch.equal(first[1][name], first[2][name])
        assert not torch.equal(first[1][name], start(1, 8)[name])
        assert abs(first[1][name].std().item() / dims.init_std - 1) < 0.1
    vectors = {name: value for state in first for name, value in state.items() if value.dim() == 1}
    for name, value in vectors.items():
        assert torch.equal(value, torch.full_like(value, 0.0 if name.endswith("bias") else 1.0))
    embedding = next(iter(first[0].values()))
    assert torch.equal(first[-1]["lm_head.weight"], embedding)


def test_an_untied_head_starts_on_its_own():
    dims = families.dims_of(tiny_config("llama", tie_word_embeddings=False))
    embed, head = models.build_layer(dims, 0), models.build_layer(dims, dims.layers - 1)
    models.init_layer(embed, dims, 0, 7)
    models.init_layer(head, dims, dims.layers - 1, 7)
    assert not torch.equal(head.lm_head.weight, embed.embed_tokens.weight)


def test_casting_a_layer_leaves_its_frequencies_and_slopes_exact():
    """DeepSpeed casts modules to half precision: nothing that must stay fp32 may be a buffer."""
    for family in families.FAMILIES:
        dims = families.dims_of(tiny_config(family))
        block = models.build_layer(dims, 1)
        assert list(block.buffers()) == []


@pytest.mark.parametrize("family", list(families.FAMILIES))
def test_training_after_inference_mode_in_one_process(family):
    """What is kept between calls (frequencies, slopes) must not be a tensor that autograd refuses."""
    dims = families.dims_of(tiny_config(family))
    llama.inverse_frequencies.cache_clear()
    attention.slopes_on.cache_clear()
    block = models.build_layer(dims, 1)
    models.init_layer(block, dims, 1, seed=0)
    hidden, places = random(1, 8, dims.hidden), torch.arange(8)[None]
    with torch.inference_mode():
        block(hidden, places, torch.ones_like(places))
    block(hidden, places, torch.ones_like(places)).sum().backward()
    assert all(p.grad is not None for p in block.parameters())
