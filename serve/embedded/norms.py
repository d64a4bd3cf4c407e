"""RMS norms in one kernel on a GPU: transformers' modules compute them in eight."""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F


def fuse(model: nn.Module) -> int:
    """Let torch's rms_norm compute every module of ``model`` that is one -> how many. It rounds once where transformers rounds
    twice, so the last bit of a 16-bit number may differ; a module that differs by more (one with weights of 1 + w, say) is left."""
    return sum(_fuse(module) for module in model.modules() if type(module).__name__.endswith("RMSNorm"))


def _fuse(module: Any) -> bool:
    weight, eps = getattr(module, "weight", None), getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if weight is None or eps is None or weight.dim() != 1:
        return False

    def forward(x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, weight.shape, weight, eps)

    sample = torch.linspace(-3, 3, 5 * len(weight), device=weight.device, dtype=weight.dtype).view(5, -1)
    wanted, found = module(sample), forward(sample)
    if found.dtype != wanted.dtype or not torch.allclose(found, wanted, rtol=2 * torch.finfo(weight.dtype).eps, atol=0):
        return False
    module.forward = forward
    return True
