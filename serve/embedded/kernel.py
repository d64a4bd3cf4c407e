"""Attention of a decode step on a GPU: every row is read to its own end, in an order that depends on nothing but its length.

Libraries choose a kernel by the number of rows and by the longest one, and with it the last bits; and they read all rows as far as
the longest. Here a row is cut into chunks of ``CHUNK`` columns, each summed by one program with the online softmax of arXiv
1805.02867, and the chunks are put together from the first to the last, as in arXiv 2311.01282 but with chunks of a fixed size.
ALiBi (arXiv 2108.12409) is rounded where transformers' bloom rounds it: slope times column, then its sum with the score.

Needs Triton, which comes with torch's builds for CUDA, and the C compiler that it starts.
"""

import math
from typing import Any, Optional

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK = 512  # columns for one program
BLOCK = 64  # of them at once
LEAST = 16  # rows and columns that a tensor core's product has at least
LOG2E = tl.constexpr(math.log2(math.e))  # powers of 2 are the faster ones


@triton.jit
def _load_row(columns, row, limit, WINDOW: tl.constexpr):
    """-> the first column that the row's new token sees, and how many there are to its own; 0, 0 for a row that is not in use."""
    place = tl.load(columns + row)
    length = tl.where(place < limit, place + 1, 0).to(tl.int32)
    low = length * 0
    if WINDOW > 0:
        low = tl.maximum(length - WINDOW, 0)
    return low, length


@triton.jit(do_not_specialize=["chunks"])
def _chunk(
    q, k, v, slopes, columns, out, sums, tops, totals, limit, chunks, scale,
    q0, q1, q2, k0, k1, k2, v0, v1, v2,
    GROUPS: tl.constexpr, G: tl.constexpr, SIZE: tl.constexpr, E: tl.constexpr, VALUES: tl.constexpr, F: tl.constexpr,
    ONE: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, WINDOW: tl.constexpr, ALIBI: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One chunk of one row for the query heads of one key head: into ``out`` if there is no other, else into the three others."""
    row, head, chunk = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    low, length = _load_row(columns, row, limit, WINDOW)
    first, end = tl.maximum(chunk * CHUNK, low // BLOCK * BLOCK), tl.minimum(chunk * CHUNK + CHUNK, length)
    g, e, f = tl.arange(0, G), tl.arange(0, E), tl.arange(0, F)
    top = tl.full([G], float("-inf"), tl.float32)
    total = tl.zeros([G], tl.float32)
    acc = tl.zeros([G, F], tl.float32)
    used = (g < GROUPS)[:, None]
    query = tl.load(q + row * q0 + head * q1 + g[:, None] * q2 + e[None, :], mask=used & (e < SIZE)[None, :], other=0.0)
    far, its = row.to(tl.int64), head.to(tl.int64)  # a table may have more than 2^31 numbers
    keys, values = k + far * k0 + its * k1, v + far * v0 + its * v1
    for at in range(first, end, BLOCK):
        column = at + tl.arange(0, BLOCK)
        seen = (column < length) & (column >= low)
        key = tl.load(keys + column[None, :] * k2 + e[:, None], mask=seen[None, :] & (e < SIZE)[:, None], other=0.0)
        score = tl.dot(query, key, input_precision=PRECISION) * scale
        if ALIBI:
            bias = tl.load(slopes + head * GROUPS + g, mask=g < GROUPS, other=0.0)[:, None] * column[None, :]
            score = (score + bias.to(query.dtype).to(tl.float32)).to(query.dtype).to(tl.float32)
        score = tl.where(seen[None, :], score * LOG2E, float("-inf"))
        higher = tl.maximum(top, tl.max(score, 1))
        share = tl.exp2(score - higher[:, None])
        less = tl.exp2(top - higher)
        value = tl.load(values + column[:, None] * v2 + f[None, :], mask=seen[:, None] & (f < VALUES)[None, :], other=0.0)
        total = total * less + tl.sum(share, 1)
        acc = acc * less[:, None] + tl.dot(share.to(value.dtype), value, input_precision=PRECISION)
        top = higher
    place = (row * tl.num_programs(1) + head) * GROUPS + g
    if ONE:
        result = tl.where(length > 0, acc / total[:, None], 0.0)
        tl.store(out + place[:, None] * VALUES + f[None, :], result.to(out.dtype.element_ty), mask=used & (f < VALUES)[None, :])
    elif first < end:
        place = place * chunks + chunk
        tl.store(tops + place, top, mask=g < GROUPS)
        tl.store(totals + place, total, mask=g < GROUPS)
        tl.store(sums + place[:, None] * VALUES + f[None, :], acc, mask=used & (f < VALUES)[None, :])


@triton.jit(do_not_specialize=["chunks"])
def _together(
    columns, out, sums, tops, totals, limit, chunks,
    VALUES: tl.constexpr, F: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """The chunks of one row and one query head, from the first to the last."""
    row, head = tl.program_id(0), tl.program_id(1)
    low, length = _load_row(columns, row, limit, WINDOW)
    f = tl.arange(0, F)
    place = row * tl.num_programs(1) + head
    top, total, acc = float("-inf"), 0.0, tl.zeros([F], tl.float32)
    for chunk in range(low // BLOCK * BLOCK // CHUNK, tl.cdiv(length, CHUNK)):
        one = place * chunks + chunk
        its_top = tl.load(tops + one)
        higher = tl.maximum(top, its_top)
        less, its = tl.exp2(top - higher), tl.exp2(its_top - higher)
        total = total * less + tl.load(totals + one) * its
        acc = acc * less + tl.load(sums + one * VALUES + f, mask=f < VALUES, other=0.0) * its
        top = higher
    result = tl.where(length > 0, acc / total, 0.0)
    tl.store(out + place * VALUES + f, result.to(out.dtype.element_ty), mask=f < VALUES)


def decode(
    q: Tensor, k: Tensor, v: Tensor, columns: Tensor, scale: float, window: Optional[int] = None, slopes: Optional[Tensor] = None
) -> Tensor:
    """q[B,H,1,E] of the tokens at ``columns`` [B], k[R,G,W,E] and v[R,G,W,F] of the first R rows; ``slopes`` [H], ALiBi's in fp32
    -> [B,1,H,F]. A row whose column is not less than W is not in use and gets zeros; those behind the first R must not be."""
    rows, heads, _, size = q.shape
    groups, values, limit = heads // k.shape[1], v.shape[3], k.shape[2]
    chunks = triton.cdiv(limit, CHUNK)
    out = q.new_empty(rows, 1, heads, values)
    parts = [out] * 3
    if chunks > 1:
        parts = [q.new_empty(k.shape[0], heads, chunks, *last, dtype=torch.float32) for last in ((values,), (), ())]
    q = q[:, :, 0].unflatten(1, (k.shape[1], groups))
    shape: Any = {"VALUES": values, "F": _power(values), "CHUNK": CHUNK, "BLOCK": BLOCK, "WINDOW": window or 0}
    _chunk[(rows, k.shape[1], chunks)](
        q, k, v, q if slopes is None else slopes, columns, out, *parts, limit, chunks, scale,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
        GROUPS=groups, G=_power(groups), SIZE=size, E=_power(size), ONE=chunks == 1, **shape,
        ALIBI=slopes is not None, PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
    )  # fmt: skip
    if chunks > 1:
        _together[(rows, heads)](columns, out, *parts, limit, chunks, **shape)
    return out


def _power(number: int) -> int:
    return max(LEAST, triton.next_power_of_2(number))
