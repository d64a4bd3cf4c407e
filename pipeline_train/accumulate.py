"""Gradients of a bf16 run, added to their fp32 sums the moment the backward pass makes them.

DeepSpeed's BF16_Optimizer keeps every bf16 gradient until the backward pass has ended, zeroes and adds into it the next time, and
makes an fp32 copy of each before it adds that to the sum: 28 bytes of memory traffic for a parameter and micro-batch, and 2 bytes
that stay. Here matrices add in the product itself (models/summed.py), the few numbers of norms and biases as each gradient comes.
"""

from typing import Any, Callable, Sequence

import torch

from .models import layers


def into_sums(optimizer: Any, model: torch.nn.Module, blocks: Sequence[torch.nn.Module] = ()) -> None:
    """``optimizer``: DeepSpeed's BF16_Optimizer of ``model``. Only one model of a process trains. Needs compat.has_custom_ops.
    ``blocks``: those whose products are to be in fp8."""
    totals = {
        parameter: total
        for parameters, sums in zip(optimizer.bf16_groups, optimizer.fp32_groups_gradients)
        for parameter, total in zip(parameters, sums)
    }
    in_products = set()
    layers.summed.SUMS.clear()
    if layers.fp8 is not None:
        layers.fp8.COPIES.clear()
        layers.fp8.forget()
    for module in model.modules():
        if isinstance(module, (layers.Linear, layers.Embedding)):
            module.sums = True
            in_products.add(module.weight)
            layers.summed.SUMS[module.weight.data_ptr()] = totals[module.weight].view(module.weight.shape)
    for module in (module for block in blocks for module in block.modules() if isinstance(module, layers.Linear)):
        module.fp8 = True
    for parameter, total in totals.items():
        parameter._hp_grad = total  # what DeepSpeed's tied reduction looks at
        if parameter not in in_products:
            parameter.register_post_accumulate_grad_hook(_adder(total))
    _count_all(optimizer)


def _adder(total: torch.Tensor) -> Callable[[torch.Tensor], None]:
    def take(parameter: torch.Tensor) -> None:
        assert parameter.grad is not None
        with torch.no_grad():
            total.add_(parameter.grad.reshape(-1))
        parameter.grad = None

    return take


def _count_all(optimizer: Any) -> None:
    """DeepSpeed leaves a sum out of the norm unless it has added to it itself. All of them count: what nobody added to is 0."""
    clear = optimizer.clear_hp_grads

    def cleared() -> None:
        clear()
        optimizer.fp32_groups_has_gradients = [[True] * len(group) for group in optimizer.fp32_groups_gradients]

    optimizer.clear_hp_grads = cleared
    cleared()
