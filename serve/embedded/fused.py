"""Fewer kernels for a GPU, where a step of a small model is mostly waiting for one after the other.

Norms in one kernel instead of eight, rotations of queries and keys in three instead of ten, and projections of one input as one
product. All on transformers' own modules, each only where it computes what they do.
"""

import sys
from typing import Any, List, Optional, Tuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

PROJECTIONS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def fuse(model: nn.Module) -> Tuple[int, bool, int]:
    """-> how many norms, whether rotations, how many groups of projections were fused. For inference."""
    with torch.no_grad():
        joined = sum(_join(module, names) for module in list(model.modules()) for names in PROJECTIONS)
        return sum(_norm(module) for module in model.modules() if type(module).__name__.endswith("RMSNorm")), _rotate(model), joined


def _norm(module: Any) -> bool:
    """torch's rms_norm rounds once where transformers rounds twice, so the last bit of a 16-bit number may differ; a module that
    differs by more (one with weights of 1 + w, say) is left."""
    weight, eps = getattr(module, "weight", None), getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if weight is None or eps is None or weight.dim() != 1:
        return False

    def forward(x: Tensor) -> Tensor:
        return F.rms_norm(x, weight.shape, weight, eps)

    sample = torch.linspace(-3, 3, 5 * len(weight), device=weight.device, dtype=weight.dtype).view(5, -1)
    wanted, found = module(sample), forward(sample)
    if found.dtype != wanted.dtype or not torch.allclose(found, wanted, rtol=2 * torch.finfo(weight.dtype).eps, atol=0):
        return False
    module.forward = forward
    return True


class Rotation:
    """apply_rotary_pos_emb of transformers' llama and its like: q[B,H,n,E], k[B,G,n,E], cos and sin[B,n,E] -> q, k turned."""

    def __init__(self, theirs: Any) -> None:
        self._theirs = theirs
        self._known: Tuple[Any, Any] = (None, None)  # sin, which all blocks of a pass are given, and the same with signs

    def __call__(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *more: Any, **named: Any) -> Tuple[Tensor, Tensor]:
        if more or named or sin.dim() != 3 or sin.shape[-1] != q.shape[-1]:
            turned: Tuple[Tensor, Tensor] = self._theirs(q, k, cos, sin, *more, **named)
            return turned
        half = sin.shape[-1] // 2
        known, signed = self._known
        if known is not sin:
            signed = torch.cat([-sin[..., :half], sin[..., half:]], -1)[:, None]
            self._known = sin, signed
        both = _beside(q, k)
        both = torch.addcmul(both * cos[:, None], both.roll(half, -1), signed)
        return both[:, : q.shape[1]], both[:, q.shape[1] :]


def _beside(q: Tensor, k: Tensor) -> Tensor:
    """q[B,H,n,E], k[B,G,n,E] -> [B,H+G,n,E], without a copy where k lies behind q in every token: parts of one Product."""
    rows, heads, count, size = q.shape
    end = q.storage_offset() + heads * q.stride(1)
    if q.untyped_storage().data_ptr() == k.untyped_storage().data_ptr() and q.stride() == k.stride() and k.storage_offset() == end:
        return q.as_strided((rows, heads + k.shape[1], count, size), q.stride())
    return torch.cat([q, k], 1)


def _rotate(model: nn.Module) -> bool:
    module = sys.modules[type(model).__module__]
    theirs = getattr(module, "apply_rotary_pos_emb", None)
    if theirs is None or isinstance(theirs, Rotation):
        return theirs is not None
    ours = Rotation(theirs)
    q, k, cos, sin = (torch.linspace(-1, 1, size).view(2, -1, 3, 8) for size in (192, 96, 48, 48))
    try:
        wanted, found = theirs(q, k, cos[:, 0], sin[:, 0]), ours(q, k, cos[:, 0], sin[:, 0])
        same = all(torch.allclose(mine, other, rtol=1e-5) for mine, other in zip(found, wanted))
    except (IndexError, RuntimeError, TypeError, ValueError):
        return False
    if not same:
        return False
    module.apply_rotary_pos_emb = ours  # type: ignore[attr-defined]
    return True


class Product:
    """Several linear layers of one input, computed when the first of them is called with it."""

    def __init__(self, layers: List[nn.Linear]) -> None:
        self.weight = torch.cat([layer.weight for layer in layers])
        self.bias = None if layers[0].bias is None else torch.cat([layer.bias for layer in layers])
        self.sizes = [layer.out_features for layer in layers]
        self._x: Optional[Tensor] = None
        self._parts: Tuple[Tensor, ...] = ()

    def part(self, x: Tensor, number: int) -> Tensor:
        if self._x is not x:
            self._x, self._parts = x, F.linear(x, self.weight, self.bias).split(self.sizes, -1)
        part = self._parts[number]
        if number == len(self.sizes) - 1:
            self._x, self._parts = None, ()
        return part


class Part(nn.Module):
    """One of the layers of a Product."""

    def __init__(self, product: Product, number: int) -> None:
        super().__init__()
        self._product, self._number = product, number
        self.weight = nn.Parameter(product.weight.split(product.sizes)[number], requires_grad=False)
        self.bias = None if product.bias is None else nn.Parameter(product.bias.split(product.sizes)[number], requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self._product.part(x, self._number)


def _join(module: nn.Module, names: Tuple[str, ...]) -> bool:
    layers: List[Any] = [getattr(module, name, None) for name in names]
    if not all(type(layer) is nn.Linear for layer in layers):
        return False
    if len({(layer.in_features, layer.bias is None, layer.weight.dtype) for layer in layers}) != 1:
        return False
    product = Product(layers)
    for number, name in enumerate(names):
        setattr(module, name, Part(product, number))
    return True
