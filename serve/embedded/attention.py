"""Attention over the slot cache, as an attention function of transformers' models.

On the CPU each row of a decode step attends to exactly its own columns, so its result cannot depend on the batch; the query heads
that share a key head are taken together, so grouped keys are never copied. On a GPU it is one masked call for all rows.
"""

from contextlib import nullcontext
from typing import Any, ContextManager, Optional, Sequence, Set, Tuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention as sdpa
from transformers import AttentionInterface

from .cache import FixedStep, SlotCache, Step

# Which of torch's kernels a recorded decode pass may take, in the order in which they are tried. None: torch chooses, the fastest.
KERNELS: Tuple[Optional[SDPBackend], ...] = (None, SDPBackend.EFFICIENT_ATTENTION)


def register(name: str, cache: SlotCache) -> None:
    """Make ``model.set_attn_implementation(name)`` mean attention over ``cache``. Such a model is given no mask by transformers."""

    def attend(
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Optional[Tensor],
        scaling: Optional[float] = None,
        dropout: float = 0.0,
        sliding_window: Optional[int] = None,
        **more: Any,
    ) -> Tuple[Tensor, None]:
        """query [B, H, n, D], key and value [B, Hkv, width, D] -> [B, n, H, D]."""
        unknown = [what for what in ("softcap", "s_aux", "position_bias") if more.get(what) is not None]
        if unknown:
            raise NotImplementedError("attention with %s" % unknown[0])
        step = cache.step
        assert step is not None
        if isinstance(step, FixedStep):
            return _fixed(query, key, value, step, scaling, sliding_window), None
        out = (_decode if step.decode else _prefill)(query, key, value, step, scaling, sliding_window)
        return out, None

    AttentionInterface.register(name, attend)


def _decode(q: Tensor, k: Tensor, v: Tensor, step: Step, scale: Optional[float], window: Optional[int]) -> Tensor:
    rows, heads, _, size = q.shape
    q = q.reshape(rows, k.shape[1], heads // k.shape[1], size)
    if q.device.type == "cpu":
        out = q.new_empty(rows, k.shape[1], heads // k.shape[1], v.shape[3])
        for row, start in enumerate(step.starts):
            last = start + 1
            first = max(0, last - window) if window else 0
            one = slice(row, row + 1)
            out[row] = sdpa(q[one], k[one, :, first:last], v[one, :, first:last], scale=scale)[0]
    else:
        out = sdpa(q, k, v, attn_mask=mask(step.columns, 1, step.width, q.dtype, window), scale=scale)
    return out.reshape(rows, 1, heads, v.shape[3])


def _prefill(q: Tensor, k: Tensor, v: Tensor, step: Step, scale: Optional[float], window: Optional[int]) -> Tensor:
    """Each piece alone, over its own row's columns: the same numbers whoever else is read."""
    groups, found = q.shape[1] // k.shape[1], []
    for row, (at, start, count) in enumerate(step.pieces()):
        width, queries = start + count, q[:, :, at : at + count]
        keys, values = k[row : row + 1, :, :width], v[row : row + 1, :, :width]
        if groups > 1:
            keys, values = keys.repeat_interleave(groups, dim=1), values.repeat_interleave(groups, dim=1)
        if start == 0 and not (window and window < width):
            out = sdpa(queries, keys, values, is_causal=True, scale=scale)
        else:
            hidden = mask(step.columns[row : row + 1], count, width, q.dtype, window)
            out = sdpa(queries, keys, values, attn_mask=hidden, scale=scale)
        found.append(out.transpose(1, 2))
    return torch.cat(found, 1) if len(found) > 1 else found[0]


def _fixed(q: Tensor, k: Tensor, v: Tensor, step: FixedStep, scale: Optional[float], window: Optional[int]) -> Tensor:
    """Rows behind ``step.active`` get their own queries back, anything finite. The first layer makes the mask."""
    given, (rows, heads, count, size) = q, q.shape
    groups = heads // k.shape[1]
    if window not in step.masks:
        step.masks[window] = mask(step.columns[: step.active], count, step.width, q.dtype, window)
    if step.decode:
        q = q[: step.active].reshape(step.active, k.shape[1], groups, size)  # no key is copied for the heads that share it
    elif groups > 1:
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    with only(step.kernel if step.decode else None):
        out = sdpa(q, k, v, attn_mask=step.masks[window], scale=scale)
    if not step.decode:
        return out.transpose(1, 2)
    out = out.reshape(step.active, 1, heads, v.shape[3])
    return out if rows == step.active else torch.cat([out, given[step.active :].transpose(1, 2)[..., : v.shape[3]]])


def only(kernel: Optional[SDPBackend]) -> ContextManager[None]:
    """sdpa takes this kernel; RuntimeError where it cannot."""
    return nullcontext() if kernel is None else sdpa_kernel(kernel)


def alike(
    heads: int, kv_heads: int, size: int, value_size: int, dtype: torch.dtype, device: torch.device,
    rows: Sequence[int], widths: Sequence[int], kernel: Optional[SDPBackend],
) -> Set[Tuple[int, int]]:  # fmt: skip
    """(rows, width) of those decode passes that give a row the same bits as the largest of all. RuntimeError: not this kernel.

    How large a pass is others decide, and libraries choose a kernel by that: cuDNN's attention, with a hundred columns, another one
    than with five hundred. Tried on random numbers, on the device itself.
    """
    generator = torch.Generator(device).manual_seed(0)
    groups, most, widest = heads // kv_heads, rows[-1], widths[-1]
    q = torch.randn(most, kv_heads, groups, size, dtype=dtype, device=device, generator=generator)
    k = torch.randn(most, kv_heads, widest, size, dtype=dtype, device=device, generator=generator)
    v = torch.randn(most, kv_heads, widest, value_size, dtype=dtype, device=device, generator=generator)
    columns = torch.arange(most, device=device) % (widths[0] - 28) + 27

    def some(count: int, width: int) -> Tensor:
        additive = mask(columns[:count], 1, width, dtype)
        with only(kernel):
            return sdpa(q[:count], k[:count, :, :width], v[:count, :, :width], attn_mask=additive)

    wanted = some(most, widest)
    same = {(n, width) for n in rows for width in widths if torch.equal(some(n, width), wanted[:n])}
    return same | {(most, widest)}  # even where the device does not give the same bits twice


def mask(columns: Tensor, count: int, width: int, dtype: torch.dtype, window: Optional[int] = None) -> Tensor:
    """What to add to the scores of ``count`` new tokens at ``columns`` [B].. of each row: [B, 1, count, width]."""
    place = (columns[:, None] + torch.arange(count, device=columns.device))[:, None, :, None]
    column = torch.arange(width, device=columns.device)
    hidden = column > place
    if window:
        hidden = hidden | (column <= place - window)
    return torch.zeros(hidden.shape, dtype=dtype, device=columns.device).masked_fill(hidden, torch.finfo(dtype).min)
