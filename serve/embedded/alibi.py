"""Bloom's ALiBi as a pass that is recorded can have it: transformers copies its slopes from the host anew for each pass.

With it come masks that say everything, [B, 1, n, W] to add to the scores: those of transformers are made with a copy from the host,
too, and take new tokens to stand in the last columns.
"""

from typing import Any

import torch
from torch import Tensor


def keep_slopes(model: Any) -> bool:
    """Let the base model's build_alibi_tensor, if it has one, use slopes that it has made once -> whether it has one. The same
    numbers where anything is visible: slope times column, which is what arXiv 2108.12409 adds to the scores."""
    base = model.base_model
    theirs = getattr(base, "build_alibi_tensor", None)
    if theirs is None:
        return False
    ones = torch.ones(1, 2, dtype=torch.long, device=model.device)
    slopes = theirs(ones, base.num_heads, torch.float32).reshape(base.num_heads, 2)[:, 1:].clone()  # those of column 1

    def build(attention_mask: Tensor, num_heads: int, dtype: torch.dtype) -> Tensor:
        """A mask [B, ..., W] -> [B x heads, 1, W]."""
        rows, width = attention_mask.shape[0], attention_mask.shape[-1]
        alibi = slopes * torch.arange(width, device=slopes.device)
        return alibi.to(dtype).expand(rows, num_heads, width).reshape(-1, 1, width)

    base.build_alibi_tensor = build
    return True
