"""Random weights, made where they lie."""

from typing import Iterable

import torch


def random_like(parameter: torch.Tensor, seed: int) -> torch.Tensor:
    """Normal(0, 0.02) for a matrix, ones for the rest; fp32, on the parameter's device."""
    if parameter.dim() == 1:
        return torch.ones(parameter.shape, device=parameter.device)
    generator = torch.Generator(device=parameter.device).manual_seed(seed)
    return torch.empty(parameter.shape, device=parameter.device).normal_(0.0, 0.02, generator=generator)


def fill(parameters: Iterable[torch.Tensor]) -> None:
    """All of them, the same on every replica."""
    with torch.no_grad():
        for number, parameter in enumerate(parameters):
            parameter.copy_(random_like(parameter, number))
