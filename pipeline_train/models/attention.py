"""Attention inside packed rows, behind one function. Shapes: B rows, T tokens, H query heads, G key-value heads, E head size.

``segments`` numbers the samples of a row 1, 2, ...; 0 is padding. A token sees itself and what stands before it in its own
segment. Padding counts as a segment of its own, so that its softmax is never empty and never NaN.
"""

import contextlib
import math
from typing import Any, Iterator, List, Optional

import torch
from torch.nn import functional as F

from .. import compat

HAS_SDPA = compat.has_sdpa()


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    segments: Any,
    positions: torch.Tensor,
    alibi_slopes: Optional[torch.Tensor] = None,
) -> torch.Tensor:
    """softmax(q k^T / sqrt(E) + alibi) v, causal and within segments; the softmax in fp32 for every dtype.

    q[B,H,T,E], k and v[B,G,T,E] with G dividing H, segments and positions[B,T] int64, alibi_slopes[H] fp32 or None
    -> [B,T,H*E] in q's dtype. In place of ``segments`` flex.mask_of's mask: then FlexAttention does it.
    """
    if not isinstance(segments, torch.Tensor):
        from . import flex  # not in the pinned stack

        return flex.attend(q, k, v, segments, positions, alibi_slopes).transpose(1, 2).flatten(2)
    groups = q.shape[1] // k.shape[1]
    k, v = _repeat(k, groups), _repeat(v, groups)
    allowed = visible(segments)
    if alibi_slopes is None:
        mixed = _sdpa(q, k, v, allowed) if HAS_SDPA else _eager(q, k, v, _additive(allowed, None, q.dtype))
    else:
        # Distances, not absolute positions: the same softmax, and exact near the diagonal where bf16 must tell tokens apart.
        distance = (positions[:, None, :] - positions[:, :, None]).float()
        bias = _additive(allowed, alibi_slopes[:, None, None] * distance[:, None], q.dtype)
        mixed = _sdpa(q, k, v, bias) if HAS_SDPA else _eager(q, k, v, bias)
    return mixed.transpose(1, 2).flatten(2)


@contextlib.contextmanager
def spelled_out() -> Iterator[None]:
    """Without the fused kernel: the operations of transformers' eager attention in their order, to compare with it bit by bit."""
    global HAS_SDPA
    before, HAS_SDPA = HAS_SDPA, False
    try:
        yield
    finally:
        HAS_SDPA = before


def visible(segments: torch.Tensor) -> torch.Tensor:
    """segments[B,T] -> bool[B,1,T,T]: may the token of row i see the token of column j."""
    same = segments[:, :, None] == segments[:, None, :]
    return same.tril()[:, None]


def alibi_slopes(heads: int) -> List[float]:
    """The slope of each head (arXiv 2108.12409, section 3 and its reference code for counts that are no power of two).

    2^(-8/n), 2^(-16/n), ... for the n heads of the greatest power of two; the rest are every other slope of the next power.
    """
    nearest = 2 ** int(math.log2(heads))
    slopes = [2.0 ** (-8.0 * (i + 1) / nearest) for i in range(nearest)]
    return slopes + [2.0 ** (-4.0 * (2 * i + 1) / nearest) for i in range(heads - nearest)]


@compat.constant
def slopes_on(heads: int, device: torch.device) -> torch.Tensor:
    """``alibi_slopes`` as fp32 [H]; kept per device, and no buffer, because casting a module would round it."""
    return torch.tensor(alibi_slopes(heads), dtype=torch.float32, device=device)


def _repeat(x: torch.Tensor, groups: int) -> torch.Tensor:
    """[B,G,T,E] -> [B,G*groups,T,E]; neighbouring query heads share a key-value head."""
    return x if groups == 1 else x.repeat_interleave(groups, dim=1)


def _additive(allowed: torch.Tensor, bias: Optional[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """The mask as numbers to add to the scores: the bias (or 0) where allowed, -inf elsewhere. Overwrites ``bias``."""
    if bias is None:
        bias = torch.zeros(allowed.shape, device=allowed.device)
    return bias.masked_fill_(~allowed, float("-inf")).to(dtype)


def _sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def _eager(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    scores = torch.matmul(q / math.sqrt(q.shape[-1]), k.transpose(-1, -2)) + bias  # scaled first: fp16 ends at 65504
    return torch.matmul(torch.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype), v)
