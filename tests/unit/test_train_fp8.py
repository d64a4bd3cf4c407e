"""run.fp8: which products are in fp8, from which copies of the weights, and who cannot have it. A CPU gives the same numbers."""

import pytest
import torch

from pipeline_train import compat, config, device, families, native, plan
from pipeline_train.errors import UserError
from pipeline_train.models import layers

if not compat.has_wide_products():
    pytest.skip("torch before 2.8 has no run.fp8", allow_module_level=True)
from pipeline_train.models import fp8, summed  # noqa: E402

LLAMA = {"model_type": "llama", "vocab_size": 100, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
         "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 512}  # fmt: skip
CARD = compat.Gpus(1, "NVIDIA H200", True, True)


@pytest.fixture
def linear():
    """[48 -> 32], bf16, its gradients into a sum."""
    torch.manual_seed(0)
    made = layers.Linear(48, 32).to(torch.bfloat16)
    with torch.no_grad():
        made.weight.normal_(0, 0.1)
        made.bias.normal_()
        made.weight[3] *= 100  # a row with a scale of its own
        made.weight[:, 5] = 0
    made.sums = made.fp8 = True
    summed.SUMS[made.weight.data_ptr()] = torch.zeros(32, 48)
    yield made
    summed.SUMS.pop(made.weight.data_ptr())
    fp8.COPIES.pop(made.weight.data_ptr(), None)
    fp8.forget()


def plain(scaled):
    return scaled[0].float() * scaled[1]


@pytest.mark.parametrize("size", [1e-30, 1e-4, 1.0, 1e30])
def test_every_row_is_rounded_by_its_own_largest(size):
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0)) * size
    x[1], x[2] = x[1] * 1000, 0
    got = plain(fp8.rounded(x.bfloat16()))
    large = x.abs() > x.abs().amax(-1, keepdim=True) / 2**10  # above those that e4m3 gives fewer bits
    assert ((got - x).abs()[large] <= x.abs()[large] / 14).all() or size == 1e-30
    assert (got[2] == 0).all() and torch.isfinite(got).all()
    assert (fp8.rounded(x.bfloat16())[0].float().abs().amax(-1)[[0, 1, 3, 4]] == fp8.LARGEST).all() or size == 1e-30


def test_the_products_are_those_of_the_rounded_factors(linear):
    x = torch.randn(2, 7, 48).bfloat16().requires_grad_()
    upstream = torch.randn(2, 7, 32).bfloat16()
    out = linear(x)
    out.backward(upstream)
    weight, flat, up = linear.weight.detach(), x.detach().reshape(14, 48), upstream.reshape(14, 32)
    wanted = plain(fp8.rounded(flat)) @ plain(fp8.rounded(weight)).t()
    torch.testing.assert_close(out.detach().reshape(14, 32), wanted.bfloat16() + linear.bias.detach())
    torch.testing.assert_close(x.grad.reshape(14, 48), (plain(fp8.rounded(up)) @ plain(fp8.rounded(weight.t())).t()).bfloat16())
    assert torch.equal(summed.SUMS[linear.weight.data_ptr()], (up.t() @ flat).float()) and linear.weight.grad is None
    assert torch.equal(linear.bias.grad, up.sum(0))
    exact = flat.float() @ weight.float().t() + linear.bias.float()
    assert 0.005 < (out.detach().reshape(14, 32) - exact).norm() / exact.norm() < 0.06


def test_without_gradients_nothing_is_rounded(linear):
    x = torch.randn(3, 48).bfloat16()
    with torch.no_grad():
        assert torch.equal(linear(x), torch.nn.functional.linear(x, linear.weight, linear.bias))


def test_copies_are_made_once_a_step_into_the_same_memory(linear):
    x = torch.randn(3, 48).bfloat16().requires_grad_()
    linear.bias.data.zero_()
    first = linear(x).detach()
    places = [tensor.data_ptr() for pair in fp8.COPIES[linear.weight.data_ptr()] for tensor in pair]
    with torch.no_grad():
        linear.weight *= -1
    assert torch.equal(linear(x).detach(), first)
    fp8.forget()
    assert torch.equal(linear(x).detach(), -first)
    assert [tensor.data_ptr() for pair in fp8.COPIES[linear.weight.data_ptr()] for tensor in pair] == places


def run(**sections):
    made = {
        "run": {"out": "o", "fp8": True},
        "model": {"path": "m", "dtype": "bf16"},
        "data": {"train": "t"},
        "parallel": {"pipe": 1},
    }
    return config.parse({key: dict(value, **sections.get(key, {})) for key, value in made.items()})


@pytest.mark.parametrize("sections, gpus, torch_version, text", [
    ({"model": {"dtype": "fp16"}}, CARD, "2.13.0",
     "run.fp8: is for bf16 runs, and this one is in fp16; set model.dtype: bf16, or leave run.fp8 out"),
    ({"parallel": {"offload": True}}, CARD, "2.13.0", "run.fp8: does not go with parallel.offload; leave one of them out"),
    ({}, CARD, "2.7.1", "run.fp8: torch 2.7.1 has not all that it needs, 2.8 and later have; leave it out"),
    ({}, compat.Gpus(1, "NVIDIA A100", True), "2.13.0",
     "run.fp8: NVIDIA A100 has no fp8, cards since Ada and Hopper have; leave it out"),
])  # fmt: skip
def test_who_cannot_have_it(monkeypatch, sections, gpus, torch_version, text):
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.setattr(compat, "gpus", lambda: gpus)
    versions = dict(compat.versions(), torch=torch_version)
    with pytest.raises(UserError) as caught:
        device.resolve_device(run(**sections), versions, "run.yaml", print)
    assert str(caught.value) == text


def test_the_copies_of_weights_need_a_compiler(monkeypatch):
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.setattr(compat, "gpus", lambda: CARD)
    monkeypatch.setattr(native, "without_triton", lambda gpus: "there is no C compiler")
    with pytest.raises(UserError) as caught:
        device.resolve_device(run(), dict(compat.versions(), torch="2.13.0", deepspeed="0.19.8"), "run.yaml", print)
    assert str(caught.value) == "run.fp8: there is no C compiler; install it, or leave run.fp8 out"


def test_who_can_have_it_and_what_it_is_for(monkeypatch):
    said = []
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.setattr(compat, "gpus", lambda: CARD)
    monkeypatch.setattr(native, "without_triton", lambda gpus: None)
    versions = dict(compat.versions(), torch="2.13.0", deepspeed="0.19.8")
    assert device.resolve_device(run(run={"compile": True}), versions, "run.yaml", said.append) == 1 and not said
    device.resolve_device(run(), versions, "run.yaml", said.append)
    assert said == ["run.fp8: without run.compile the rounding takes longer than the products save"]


def test_sizes_that_a_card_cannot_multiply():
    plan.check_fp8_sizes(families.dims_of(LLAMA))
    with pytest.raises(UserError) as caught:
        plan.check_fp8_sizes(families.dims_of(dict(LLAMA, intermediate_size=50)))
    assert str(caught.value) == "run.fp8: sizes must be multiples of 16, and the model's feed-forward size is 50; leave it out"
