"""The llama family's layers: embed, block, norm + head. Torch only; parameter names are HF's (families/llama.py)."""

import math
from typing import Any, Optional, Tuple

import torch
from torch import nn
from torch.nn import functional as F

from .. import compat
from ..families import Dims, RopeScaling
from .attention import attend
from .layers import Embedding, Linear, RMSNorm


@compat.constant
def inverse_frequencies(head_dim: int, theta: float, scaling: Optional[RopeScaling], device: torch.device) -> torch.Tensor:
    """[head_dim / 2] fp32, always computed on the CPU: another device's pow differs by an ulp, which 100k positions multiply.

    theta^(-2i/head_dim) (arXiv 2104.09864). linear: divided by factor (arXiv 2306.15595). llama3: wavelengths beyond
    original/low_freq_factor are divided by factor, those below original/high_freq_factor kept, those between blended
    (the Llama 3.1 release).
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64, device="cpu").float() / head_dim
    freqs = 1.0 / (theta**exponents)
    if scaling is not None and scaling.kind == "linear":
        freqs = freqs / scaling.factor
    elif scaling is not None:
        assert scaling.kind == "llama3", scaling.kind
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        turns = scaling.original_max_positions * freqs / (2 * math.pi)  # full turns within the original length
        keep = ((turns - low) / (high - low)).clamp(0.0, 1.0)
        freqs = (1.0 - keep) * freqs / scaling.factor + keep * freqs
    return freqs.to(device)


def rotary(positions: torch.Tensor, dims: Dims, dtype: torch.dtype) -> Tuple[torch.Tensor, torch.Tensor]:
    """positions[B,T] -> what ``rotate`` multiplies by, cos and sin [B,1,T,2,head_dim/2], computed in fp32 and rounded to dtype."""
    freqs = inverse_frequencies(dims.head_dim, dims.rope_theta, dims.rope_scaling, positions.device)
    angles = positions[:, None, :, None].float() * freqs
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    return torch.stack((cos, cos), dim=-2), torch.stack((-sin, sin), dim=-2)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x[B,H,T,E] turned by its positions; element i is paired with i + E/2, HF's layout. The halves change places as two rows do:
    torch.compile reads those in place, but a concatenation element by element, from either half."""
    halves = x.unflatten(-1, (2, -1))
    return (halves * cos + halves.flip(-2) * sin).flatten(-2)


class Attention(nn.Module):
    def __init__(self, dims: Dims) -> None:
        super().__init__()
        self.dims = dims
        self.q_proj = Linear(dims.hidden, dims.q_size, bias=dims.attn_bias)
        self.k_proj = Linear(dims.hidden, dims.kv_size, bias=dims.attn_bias)
        self.v_proj = Linear(dims.hidden, dims.kv_size, bias=dims.attn_bias)
        self.o_proj = Linear(dims.q_size, dims.hidden, bias=dims.attn_bias)

    def forward(self, x: torch.Tensor, positions: Any, segments: torch.Tensor) -> torch.Tensor:
        q, k, v = (
            y.unflatten(-1, (-1, self.dims.head_dim)).transpose(1, 2) for y in (self.q_proj(x), self.k_proj(x), self.v_proj(x))
        )
        cos, sin = rotary(positions, self.dims, x.dtype) if isinstance(positions, torch.Tensor) else positions
        return self.o_proj(attend(rotate(q, cos, sin), rotate(k, cos, sin), v, segments, positions))


class Mlp(nn.Module):
    def __init__(self, dims: Dims) -> None:
        super().__init__()
        self.gate_proj = Linear(dims.hidden, dims.ffn, bias=dims.mlp_bias)
        self.up_proj = Linear(dims.hidden, dims.ffn, bias=dims.mlp_bias)
        self.down_proj = Linear(dims.ffn, dims.hidden, bias=dims.mlp_bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Embed(nn.Module):
    def __init__(self, dims: Dims) -> None:
        super().__init__()
        self.embed_tokens = Embedding(dims.vocab, dims.hidden)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """ids[B,T] int64 -> hidden[B,T,D]."""
        return self.embed_tokens(ids)


class Block(nn.Module):
    def __init__(self, dims: Dims) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(dims.hidden, dims.norm_eps)
        self.self_attn = Attention(dims)
        self.post_attention_layernorm = RMSNorm(dims.hidden, dims.norm_eps)
        self.mlp = Mlp(dims)

    def places(self, positions: torch.Tensor, dtype: torch.dtype) -> Tuple[torch.Tensor, torch.Tensor]:
        """What ``forward`` takes in place of positions: all blocks need the same cosines and sines, and to make them takes as long
        as to use them."""
        return rotary(positions, self.self_attn.dims, dtype)

    def forward(self, hidden: torch.Tensor, positions: Any, segments: torch.Tensor) -> torch.Tensor:
        """hidden[B,T,D], positions and segments[B,T] int64 -> hidden[B,T,D]. In place of the positions: ``places``."""
        hidden = hidden + self.self_attn(self.input_layernorm(hidden), positions, segments)
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


class Head(nn.Module):
    def __init__(self, dims: Dims) -> None:
        super().__init__()
        self.norm = RMSNorm(dims.hidden, dims.norm_eps)
        self.lm_head = Linear(dims.hidden, dims.vocab, bias=False)

    def final_norm(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden[B,T,D] -> what transformers calls the last hidden state."""
        return self.norm(hidden)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden[B,T,D] -> logits[B,T,V]."""
        return self.lm_head(self.norm(hidden))
