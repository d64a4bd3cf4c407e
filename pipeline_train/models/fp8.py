"""Products of a bf16 run with factors of 8 bits (e4m3 of arXiv 2209.05433): twice the arithmetic of a Hopper or Ada card.

    forward          x[N,I]  W^T     x's tokens and W's rows each with a scale of their own, so that the largest number is 448
    input gradient   dY[N,O] W       dY's tokens and W's columns likewise
    weight gradient  dY^T x          stays as it is, in bf16 and added to an fp32 sum: an error of it would add up over the steps

Weights stay bf16 with fp32 masters. Their two fp8 copies are made once a step: 2 bytes a parameter. Embedding and head have none.
"""

import functools
from typing import Callable, Dict, NamedTuple, Optional, Set, Tuple

import torch

from .summed import add_product, linear_of

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0  # of E4M3
Scaled = Tuple[torch.Tensor, torch.Tensor]


class Copies(NamedTuple):
    """``rows``: of W[O,I], fp8 [O,I] and scales [O,1]; ``columns``: of its transpose, [I,O] and [I,1]."""

    rows: Scaled
    columns: Scaled


COPIES: Dict[int, Copies] = {}  # by the weight's address, as summed.SUMS
FRESH: Set[int] = set()


def rounded(x: torch.Tensor) -> Scaled:
    """x[N,K] -> fp8 [N,K] and fp32 scales [N,1]; their product is x with 4 significant bits."""
    scale = x.abs().amax(-1, keepdim=True).float().clamp(min=1e-20) / LARGEST
    return (x.float() / scale).to(E4M3), scale


def forget() -> None:
    """The weights have changed: their copies are made anew when they are needed next."""
    FRESH.clear()


def _both(weight: torch.Tensor) -> Tuple[torch.Tensor, ...]:
    return rounded(weight) + rounded(weight.t())


@functools.lru_cache(maxsize=None)
def _maker(cuda: bool) -> Callable[..., Tuple[torch.Tensor, ...]]:
    return torch.compile(_both, dynamic=False) if cuda else _both


def copies_of(weight: torch.Tensor) -> Copies:
    place = weight.data_ptr()
    if place not in FRESH:
        rows, scales, columns, others = _maker(weight.is_cuda)(weight.detach())
        made = Copies((rows, scales), (columns.contiguous(), others))
        if place in COPIES:  # the same memory again: nothing is scattered between two steps
            for old, new in zip(COPIES[place].rows + COPIES[place].columns, made.rows + made.columns):
                old.copy_(new)
        else:
            COPIES[place] = made
        FRESH.add(place)
    return COPIES[place]


def _multiply(a: torch.Tensor, scale: torch.Tensor, other: Scaled, dtype: torch.dtype) -> torch.Tensor:
    """a[N,K] times the transpose of other[M,K], with their scales."""
    if a.is_cuda:
        return torch._scaled_mm(a, other[0].t(), scale, other[1].t(), out_dtype=dtype, use_fast_accum=False)
    return ((a.float() * scale) @ (other[0].float() * other[1]).t()).to(dtype)


@torch.library.custom_op("pipedock::fp8_product", mutates_args=())
def product(x8: torch.Tensor, scale: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x8[N,I] fp8, scale[N,1], weight[O,I] -> [N,O] in the weight's dtype."""
    return _multiply(x8, scale, copies_of(weight).rows, weight.dtype)


@product.register_fake
def _(x8: torch.Tensor, scale: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return weight.new_empty(x8.shape[0], weight.shape[0])


@torch.library.custom_op("pipedock::fp8_input_gradient", mutates_args=())
def _input_gradient(
    upstream: torch.Tensor, up8: torch.Tensor, scale: torch.Tensor, x: torch.Tensor, weight: torch.Tensor
) -> torch.Tensor:
    """upstream[N,O] as it is and in fp8 -> its product with weight[O,I]; with x[N,I] it joins the weight's sum."""
    add_product(upstream, x, weight)
    return _multiply(up8, scale, copies_of(weight).columns, weight.dtype)


@_input_gradient.register_fake
def _(
    upstream: torch.Tensor, up8: torch.Tensor, scale: torch.Tensor, x: torch.Tensor, weight: torch.Tensor
) -> torch.Tensor:  # fmt: skip
    return upstream.new_empty(x.shape)


def _multiplied(x: torch.Tensor, weight: torch.Tensor, bias: Optional[torch.Tensor]) -> torch.Tensor:
    out = product(*rounded(x.reshape(-1, x.shape[-1])), weight)
    return (out if bias is None else out + bias).view(*x.shape[:-1], weight.shape[0])


linear = linear_of(_multiplied, lambda upstream, x, weight: _input_gradient(upstream, *rounded(upstream), x, weight))
