"""run.compile: blocks through torch.compile are the same blocks. FlexAttention, GPUs only, is compared in benchmarks/compile.py."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline_train import compat, families, native
from pipeline_train.errors import UserError
from pipeline_train.models import init_layer, layers
from pipeline_train.stages import PipeLayer
from tests import compiler

LLAMA = {"model_type": "llama", "vocab_size": 100, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "rope_scaling": {
             "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
             "original_max_position_embeddings": 64}}  # fmt: skip
BLOOM = {"model_type": "bloom", "vocab_size": 100, "hidden_size": 36, "n_layer": 3, "n_head": 3, "hidden_dropout": 0.0,
         "attention_dropout": 0.0}  # fmt: skip
MODELS = {"llama": LLAMA, "bloom": BLOOM}
compiles = pytest.mark.skipif(not compiler.CAN, reason=compiler.WHY_NOT)
can_choose = pytest.mark.skipif(compat.release(torch.__version__) < (2, 4), reason="torch before 2.4 cannot choose what to keep")


def run(dims, compiled, again):
    """-> what three blocks give for two packed rows, and all their gradients."""
    layers = [PipeLayer(dims, layer, torch.float32, again, compiled) for layer in (1, 2, 3)]
    for layer, module in enumerate(layers, 1):
        init_layer(module.inner, dims, layer, seed=0)
    hidden = torch.randn(2, 24, dims.hidden, generator=torch.Generator().manual_seed(0)).requires_grad_()
    segments = torch.tensor([[1] * 15 + [2] * 9, [1] * 6 + [2] * 12 + [0] * 6])
    positions = torch.cat([torch.arange(15), torch.arange(9)]).expand(2, 24).contiguous()
    wire = (hidden, positions, segments)
    for module in layers:
        wire = module(wire)
    wire[0].square().sum().backward()
    return wire[0].detach(), [hidden.grad] + [p.grad for module in layers for p in module.inner.parameters()]


def distance(a, b):
    return float((a - b).abs().max() / b.abs().max().clamp_min(1e-6))


@compiles
@pytest.mark.parametrize("family", sorted(MODELS))
def test_compiled_blocks_are_the_same_and_share_one_graph(family):
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    dims = families.dims_of(MODELS[family])
    out, gradients = run(dims, compiled=False, again="none")
    for again in ("none", "blocks"):
        found, theirs = run(dims, compiled=True, again=again)
        assert distance(found, out) < 1e-6
        assert max(distance(a, b) for a, b in zip(theirs, gradients)) < 1e-5
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]


@compiles
@pytest.mark.skipif(not compat.has_wide_products(), reason="torch before 2.8 has no run.fp8")
@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("family", sorted(MODELS))
def test_blocks_whose_products_sum_gradients_share_one_graph_too(family, fp8):
    """accumulate.into_sums, and with run.fp8: nothing of it is left to Python between two graphs."""
    from torch._dynamo.utils import counters

    dims = families.dims_of(MODELS[family])
    hidden = torch.randn(2, 24, dims.hidden, generator=torch.Generator().manual_seed(0)).bfloat16()
    segments = torch.ones(2, 24, dtype=torch.long)
    seen = []
    for compiled in (False, True):
        torch._dynamo.reset()
        counters.clear()
        modules = [PipeLayer(dims, layer, torch.bfloat16, "none", compiled) for layer in (1, 2)]
        sums = []
        for layer, module in enumerate(modules, 1):
            init_layer(module.inner, dims, layer, seed=0)
            for linear in (found for found in module.modules() if isinstance(found, layers.Linear)):
                linear.sums, linear.fp8 = True, fp8
                sums.append(layers.summed.SUMS.setdefault(linear.weight.data_ptr(), torch.zeros(linear.weight.shape)).zero_())
        wire = (hidden.clone().requires_grad_(), torch.arange(24).expand(2, 24).contiguous(), segments)
        first = wire[0]
        for module in modules:
            wire = module(wire)
        wire[0].float().square().sum().backward()
        seen.append([wire[0].detach(), first.grad, *(total.clone() for total in sums)])
        layers.summed.SUMS.clear()
        layers.fp8.COPIES.clear()
        layers.fp8.forget()
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
    for mine, theirs in zip(*seen):
        assert theirs.norm() > 0 and (mine.float() - theirs.float()).norm() < 0.05 * theirs.float().norm()


class Products(TorchDispatchMode):
    """Counts matrix products, attention's own not."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.count += operator.name() in ("aten::mm", "aten::addmm")
        return operator(*args, **(kwargs or {}))


@can_choose
@pytest.mark.parametrize("family", sorted(MODELS))
def test_selective_gives_the_same_without_a_product_more(family):
    dims, seen = families.dims_of(MODELS[family]), {}
    for again in ("none", "selective", "blocks"):
        with Products() as products:
            seen[again] = run(dims, compiled=False, again=again)
        seen[again] += (products.count,)
    assert torch.equal(seen["none"][0], seen["selective"][0])
    assert all(torch.equal(a, b) for a, b in zip(seen["none"][1], seen["selective"][1]))
    assert seen["none"][2] == seen["selective"][2] < seen["blocks"][2]


@compiles
@pytest.mark.parametrize("family", sorted(MODELS))
def test_selective_inside_compiled_blocks_that_share_one_graph(family, caplog):
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    dims = families.dims_of(MODELS[family])
    out, gradients = run(dims, compiled=False, again="none")
    found, theirs = run(dims, compiled=True, again="selective")
    assert "context_fn" not in caplog.text
    assert distance(found, out) < 1e-6
    assert max(distance(a, b) for a, b in zip(theirs, gradients)) < 1e-5
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]


@compiles
def test_a_compiled_layer_has_the_same_names():
    dims = families.dims_of(LLAMA)
    plain, compiled = (PipeLayer(dims, 1, torch.float32, "none", c) for c in (False, True))
    assert list(compiled.state_dict()) == list(plain.state_dict())


def test_blocks_and_head_are_compiled(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: function, raising=False)
    dims = families.dims_of(LLAMA)
    assert [PipeLayer(dims, n, torch.float32, "none", True).faster is not None for n in (0, 1, 4)] == [False, True, True]
    assert PipeLayer(dims, 1, torch.float32, "none").faster is None


@pytest.mark.parametrize("version, gpus, missing, text", [
    ("1.13.1", 1, None, "run.compile: torch 1.13.1 cannot compile the blocks, 2.6 and later can; leave it out"),
    ("2.13.0", 0, "without_cpp", "run.compile: there is no C++ compiler; install it, or leave run.compile out"),
    ("2.13.0", 1, "without_triton", "run.compile: there is no C compiler; install it, or leave run.compile out"),
])  # fmt: skip
def test_where_it_cannot_be_had_it_is_refused(monkeypatch, version, gpus, missing, text):
    if missing is not None:
        reason = "there is no C++ compiler" if missing == "without_cpp" else "there is no C compiler"
        monkeypatch.setattr(native, missing, lambda *args: reason)
    with pytest.raises(UserError) as caught:
        compat.check_compile(version, gpus)
    assert str(caught.value) == text


def test_selective_needs_a_torch_that_can_choose():
    compat.check_selective("2.4.0")
    with pytest.raises(UserError) as caught:
        compat.check_selective("1.13.1")
    assert str(caught.value) == "parallel.recompute: torch 1.13.1 cannot do selective, 2.4 and later can; use blocks"


def test_where_it_can_be_had_it_is_taken(monkeypatch):
    monkeypatch.setattr(native, "without_cpp", lambda: None)
    compat.check_compile("2.13.0", 0)


def test_a_run_is_refused_before_it_starts(monkeypatch):
    from pipeline_train import config, device

    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setattr(native, "without_cpp", lambda: "there is no C++ compiler")
    run = config.parse({"run": {"out": "o", "compile": True}, "model": {"path": "m", "dtype": "fp32"}, "data": {"train": "t"},
                        "parallel": {"pipe": 1}})  # fmt: skip
    with pytest.raises(UserError, match="run.compile: "):
        device.resolve_device(run, dict(compat.versions(), deepspeed="0.19.8"), "run.yaml", print)
