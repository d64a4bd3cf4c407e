"""Attention of packed rows through FlexAttention, which makes one kernel of mask, bias and softmax and skips what no token sees.

CUDA only: torch has no backward pass of it for a CPU. Shapes as in attention.py, whose plain path is the reference
(benchmarks/compile.py compares the two on a GPU).
"""

import functools
from typing import Callable, Optional

import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from ..plan.activations import LEAST_HEAD, LEAST_ROW


@functools.lru_cache(maxsize=None)
def _make_mask() -> Callable[..., BlockMask]:
    return torch.compile(create_block_mask, dynamic=False)


def takes(hidden: torch.Tensor, head_dim: int) -> bool:
    """Whether the kernel can do hidden[B,T,D] with heads of ``head_dim``."""
    return hidden.is_cuda and hidden.shape[1] >= LEAST_ROW and head_dim >= LEAST_HEAD


def mask_of(segments: torch.Tensor) -> BlockMask:
    """segments[B,T] -> which tokens see which, as attention.visible, in blocks of 128 x 128."""

    def allowed(b: torch.Tensor, h: torch.Tensor, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        return (i >= j) & (segments[b, i] == segments[b, j])

    rows, length = segments.shape
    return _make_mask()(allowed, rows, None, length, length, device=segments.device)


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: BlockMask,
    positions: torch.Tensor,
    alibi_slopes: Optional[torch.Tensor],
) -> torch.Tensor:
    """As attention.attend, [B,H,T,E] -> [B,H,T,E]; the bias is added to the scores in fp32. Only inside a compiled block."""

    def biased(score: torch.Tensor, b: torch.Tensor, h: torch.Tensor, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        assert alibi_slopes is not None
        return score + alibi_slopes[h] * (positions[b, j] - positions[b, i])

    bias = None if alibi_slopes is None else biased
    return flex_attention(q, k, v, score_mod=bias, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1])
