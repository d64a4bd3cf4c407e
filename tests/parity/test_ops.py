"""What a block costs where nothing is fused (torch 1.13 has neither sdpa nor torch.compile): operators that write something, and
how much they write, beside the layers of the transformers that is installed. In bf16, which a CPU has, with fp16's operators."""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline_train import compat, families
from pipeline_train.models import attention, build_layer, init_layer
from tests.models import tiny_config

ROWS, TOKENS = 2, 64


class Written(TorchDispatchMode):
    """Operators whose result is no view, and its bytes."""

    def __init__(self):
        super().__init__()
        self.operators, self.bytes = Counter(), 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        out = operator(*args, **(kwargs or {}))
        given = {tensor.storage().data_ptr() for tensor in _tensors(args)}
        if operator._schema.name.endswith("_") or any(made.storage().data_ptr() not in given for made in _tensors(out)):
            self.operators[operator._schema.name] += 1
            self.bytes += sum(made.numel() * made.element_size() for made in _tensors(out))
        return out


def _tensors(found):
    if isinstance(found, torch.Tensor):
        return [found] if found.numel() else []
    return [tensor for one in found for tensor in _tensors(one)] if isinstance(found, (list, tuple)) else []


def counted(forward, hidden):
    """``forward`` and its backward pass -> (operators, bytes)."""
    with Written() as seen:
        out = forward(hidden)
        out.backward(torch.ones_like(out))
    return sum(seen.operators.values()), seen.bytes


def ours(raw, count):
    dims = families.dims_of(raw)
    blocks = [build_layer(dims, layer).to(torch.bfloat16) for layer in range(1, count + 1)]
    for layer, block in enumerate(blocks, 1):
        init_layer(block, dims, layer, seed=0)
    places = torch.arange(TOKENS).expand(ROWS, TOKENS).contiguous()

    def forward(hidden):
        for block in blocks:
            hidden = block(hidden, places, torch.ones_like(places))
        return hidden

    return forward


def theirs(raw, count):
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    config = CONFIG_MAPPING[raw["model_type"]].from_dict(raw)
    setattr(config, "num_hidden_layers" if raw["model_type"] == "llama" else "n_layer", count)
    how = {"attn_implementation": "eager"} if compat.release(compat.versions()["transformers"]) >= (4, 36) else {}
    base = AutoModelForCausalLM.from_config(config, **how).to(torch.bfloat16).train().base_model
    seen = torch.ones(ROWS, TOKENS, dtype=torch.long)
    return lambda hidden: base(inputs_embeds=hidden, attention_mask=seen, use_cache=False)[0]


@pytest.mark.parametrize("family", ["llama", "bloom"])
def test_a_block_costs_no_more_than_that_of_transformers(family, monkeypatch):
    monkeypatch.setattr(attention, "HAS_SDPA", False)
    raw = tiny_config(family, hidden_size=64, vocab_size=128)
    costs = []
    for make in (ours, theirs):
        few, more = (counted(make(raw, count), torch.randn(ROWS, TOKENS, 64).bfloat16().requires_grad_()) for count in (1, 3))
        costs.append([(b - a) / 2 for a, b in zip(few, more)])  # of one block
    (operators, written), (their_operators, their_written) = costs
    assert 20 < operators and 0 < written <= their_written
    if compat.release(compat.versions()["transformers"]) < (
        4,
        36,
    ):  # those of torch 1.13's day; later ones make masks once for all blocks
        assert operators <= their_operators
