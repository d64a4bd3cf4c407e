"""Attention over the slot cache, as an attention function of transformers' models.

On the CPU each row of a decode step attends to exactly its own columns, so its result cannot depend on the batch; the query heads
that share a key head are taken together, so grouped keys are never copied. On a GPU it is kernel.py's one call for all rows, or a
masked one.
"""

from contextlib import nullcontext
from typing import Any, Callable, Optional, Tuple, Union

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention as sdpa
from transformers import AttentionInterface

from .cache import FixedStep, SlotCache, Step

# What may compute a recorded decode pass, in the order in which it is tried: kernel.py; torch's memory-efficient kernel, which may
# take 2.4 times as long as what torch chooses; what torch chooses: one of cuDNN's by rows, columns and strides, and they differ.
OURS, EFFICIENT, ANY = KERNELS = "our kernel", "torch's memory-efficient kernel", "torch's choice"


def register(name: str, cache: SlotCache) -> Callable[..., Tuple[Tensor, None]]:
    """Make ``model.set_attn_implementation(name)`` mean attention over ``cache`` -> that function. Such a model is given no mask
    by transformers."""

    def attend(
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Optional[Tensor],
        scaling: Optional[float] = None,
        dropout: float = 0.0,
        sliding_window: Optional[int] = None,
        slopes: Optional[Tensor] = None,
        **more: Any,
    ) -> Tuple[Tensor, None]:
        """query [B, H, n, D], key and value [B, Hkv, width, D], ALiBi's slopes [H] -> [B, n, H, D]."""
        unknown = [what for what in ("softcap", "s_aux", "position_bias") if more.get(what) is not None]
        if unknown:
            raise NotImplementedError("attention with %s" % unknown[0])
        step = cache.step
        assert step is not None
        if isinstance(step, FixedStep):
            return _fixed(query, key, value, step, scaling, sliding_window, slopes), None
        return (_decode if step.decode else _prefill)(query, key, value, step, scaling, sliding_window, slopes), None

    AttentionInterface.register(name, attend)
    return attend


def _decode(
    q: Tensor, k: Tensor, v: Tensor, step: Step, scale: Optional[float], window: Optional[int], slopes: Optional[Tensor]
) -> Tensor:
    rows, heads, _, size = q.shape
    q = q.reshape(rows, k.shape[1], heads // k.shape[1], size)
    if q.device.type == "cpu":
        bias = None if slopes is None else _biases(step, slopes, q.dtype)
        out = q.new_empty(rows, k.shape[1], heads // k.shape[1], v.shape[3])
        for row, start in enumerate(step.starts):
            last = start + 1
            first = max(0, last - window) if window else 0
            one = slice(row, row + 1)
            seen = None if bias is None else bias[..., first:last]
            out[row] = sdpa(q[one], k[one, :, first:last], v[one, :, first:last], attn_mask=seen, scale=scale)[0]
    else:
        out = sdpa(q, k, v, attn_mask=_added(step, step.columns, 1, step.width, q.dtype, window, slopes), scale=scale)
    return out.reshape(rows, 1, heads, v.shape[3])


def _prefill(
    q: Tensor, k: Tensor, v: Tensor, step: Step, scale: Optional[float], window: Optional[int], slopes: Optional[Tensor]
) -> Tensor:
    """Each row's piece by itself: the same numbers whoever else is read."""
    groups, found = q.shape[1] // k.shape[1], []
    for row, (at, start, count) in enumerate(step.pieces()):
        width, queries = start + count, q[:, :, at : at + count]
        keys, values = k[row : row + 1, :, :width], v[row : row + 1, :, :width]
        if groups > 1:
            keys, values = keys.repeat_interleave(groups, dim=1), values.repeat_interleave(groups, dim=1)
        if start == 0 and slopes is None and not (window and window < width):
            out = sdpa(queries, keys, values, is_causal=True, scale=scale)
        else:
            added = _added(step, step.columns[row : row + 1], count, width, q.dtype, window, slopes)
            out = sdpa(queries, keys, values, attn_mask=added, scale=scale)
        found.append(out.transpose(1, 2))
    return torch.cat(found, 1) if len(found) > 1 else found[0]


def _fixed(
    q: Tensor, k: Tensor, v: Tensor, step: FixedStep, scale: Optional[float], window: Optional[int], slopes: Optional[Tensor]
) -> Tensor:
    """Rows behind ``step.active`` get anything finite. The first layer makes the mask."""
    given, (rows, heads, count, size) = q, q.shape
    groups = heads // k.shape[1]
    if step.decode and step.kernel == OURS:
        from . import kernel  # needs Triton

        return kernel.decode(q, k, v, step.columns, size**-0.5 if scale is None else scale, window, slopes)
    if window not in step.masks:
        step.masks[window] = _added(step, step.columns[: step.active], count, step.width, q.dtype, window, slopes)
    if step.decode:
        q = q[: step.active].reshape(step.active, k.shape[1], groups, size)  # no key is copied for the heads that share it
    elif groups > 1:
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    only = sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION) if step.decode and step.kernel == EFFICIENT else nullcontext()
    with only:
        out = sdpa(q, k, v, attn_mask=step.masks[window], scale=scale)
    if not step.decode:
        return out.transpose(1, 2)
    out = out.reshape(step.active, 1, heads, v.shape[3])
    return out if rows == step.active else torch.cat([out, given[step.active :].transpose(1, 2)[..., : v.shape[3]]])


def _added(
    step: Union[Step, FixedStep], columns: Tensor, count: int, width: int, dtype: torch.dtype, window: Optional[int],
    slopes: Optional[Tensor],
) -> Tensor:  # fmt: skip
    """``mask``, and ALiBi's biases where there are slopes: [B, 1 or H, count, width]."""
    hidden = mask(columns, count, width, dtype, window)
    return hidden if slopes is None else hidden + _biases(step, slopes, dtype)[..., :width]


def _biases(step: Union[Step, FixedStep], slopes: Tensor, dtype: torch.dtype) -> Tensor:
    """ALiBi's, slope times column, as transformers rounds them: [1, H, 1, width]. The first layer makes them."""
    if "alibi" not in step.masks:
        columns = torch.arange(step.width, device=slopes.device)
        step.masks["alibi"] = (slopes[:, None] * columns).to(dtype)[None, :, None]
    return step.masks["alibi"]


def mask(columns: Tensor, count: int, width: int, dtype: torch.dtype, window: Optional[int] = None) -> Tensor:
    """What to add to the scores of ``count`` new tokens at ``columns`` [B].. of each row: [B, 1, count, width]."""
    place = (columns[:, None] + torch.arange(count, device=columns.device))[:, None, :, None]
    column = torch.arange(width, device=columns.device)
    hidden = column > place
    if window:
        hidden = hidden | (column <= place - window)
    return torch.zeros(hidden.shape, dtype=dtype, device=columns.device).masked_fill(hidden, torch.finfo(dtype).min)
