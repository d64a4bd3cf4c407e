"""Modules that several families share. Torch only.

Parameters start as NaN: a stage loads or initialises every one of them, and one that was forgotten shows itself in the first loss.
"""

import importlib
from typing import Any

import torch
from torch import nn

from .. import compat

summed: Any = importlib.import_module(".summed", __package__) if compat.has_custom_ops() else None
fp8: Any = importlib.import_module(".fp8", __package__) if compat.has_wide_products() else None


class Linear(nn.Linear):
    """nn.Linear without the random start, which costs a minute for a 7B model and is overwritten anyway.

    ``sums``: the weight's gradient goes to where summed.SUMS says, not into ``weight.grad``; ``fp8``: see there, needs ``sums``."""

    sums = fp8 = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.sums or not torch.is_grad_enabled():
            return super().forward(x)
        return (fp8 if self.fp8 else summed).linear(x, self.weight, self.bias)

    def reset_parameters(self) -> None:
        nn.init.constant_(self.weight, float("nan"))
        if self.bias is not None:
            nn.init.constant_(self.bias, float("nan"))


class Embedding(nn.Embedding):
    """nn.Embedding without the random start, and without ``padding_idx``.

    transformers' llama freezes the input embedding of ``pad_token_id``; where that is also the end of a turn (SmolLM2) a token of
    the text would never be trained. Padding gets no gradient here anyway: nothing attends to it and it has no target.
    ``sums``: as Linear's.
    """

    sums = False

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return summed.embedding(ids, self.weight) if self.sums and torch.is_grad_enabled() else super().forward(ids)

    def reset_parameters(self) -> None:
        nn.init.constant_(self.weight, float("nan"))


class LayerNorm(nn.LayerNorm):
    """nn.LayerNorm that starts as NaN like the rest."""

    def reset_parameters(self) -> None:
        nn.init.constant_(self.weight, float("nan"))
        nn.init.constant_(self.bias, float("nan"))


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) in fp32, rounded to x's dtype, times weight (arXiv 1910.07467; rounding as transformers does).

    x[..., D] -> the same shape and dtype.
    """

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((size,), float("nan")))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)
