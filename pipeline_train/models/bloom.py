"""The bloom family's layers: embed + norm, block, norm + head. Torch only; parameter names are HF's (families/bloom.py)."""

import torch
from torch import nn
from torch.nn import functional as F

from ..families import Dims
from .attention import attend, slopes_on
from .layers import Embedding, LayerNorm, Linear


class Attention(nn.Module):
    def __init__(self, dims: Dims) -> None:
        super().__init__()
        self.dims = dims
        self.query_key_value = Linear(dims.hidden, dims.qkv_size)
        self.dense = Linear(dims.q_size, dims.hidden)

    def forward(self, x: torch.Tensor, positions: torch.Tensor, segments: torch.Tensor) -> torch.Tensor:
        fused = self.query_key_value(x).unflatten(-1, (-1, 3, self.dims.head_dim))  # [B,T,H,3,E]: interleaved per head
        q, k, v = (y.transpose(1, 2) for y in fused.unbind(-2))
        return self.dense(attend(q, k, v, segments, positions, slopes_on(self.dims.heads, x.device)))


class Mlp(nn.Module):
    def __init__(self, dims: Dims) -> None:
        super().__init__()
        self.dense_h_to_4h = Linear(dims.hidden, dims.ffn)
        self.dense_4h_to_h = Linear(dims.ffn, dims.hidden)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.dense_4h_to_h(F.gelu(self.dense_h_to_4h(x), approximate="tanh"))


class Embed(nn.Module):
    def __init__(self, dims: Dims) -> None:
        super().__init__()
        self.word_embeddings = Embedding(dims.vocab, dims.hidden)
        self.word_embeddings_layernorm = LayerNorm(dims.hidden, dims.norm_eps)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """ids[B,T] int64 -> hidden[B,T,D]."""
        return self.word_embeddings_layernorm(self.word_embeddings(ids))


class Block(nn.Module):
    def __init__(self, dims: Dims) -> None:
        super().__init__()
        self.post_norm_residual = dims.post_norm_residual
        self.input_layernorm = LayerNorm(dims.hidden, dims.norm_eps)
        self.self_attention = Attention(dims)
        self.post_attention_layernorm = LayerNorm(dims.hidden, dims.norm_eps)
        self.mlp = Mlp(dims)

    def forward(self, hidden: torch.Tensor, positions: torch.Tensor, segments: torch.Tensor) -> torch.Tensor:
        """hidden[B,T,D], positions and segments[B,T] int64 -> hidden[B,T,D]."""
        normed = self.input_layernorm(hidden)
        hidden = (normed if self.post_norm_residual else hidden) + self.self_attention(normed, positions, segments)
        normed = self.post_attention_layernorm(hidden)
        return (normed if self.post_norm_residual else hidden) + self.mlp(normed)


class Head(nn.Module):
    def __init__(self, dims: Dims) -> None:
        super().__init__()
        self.ln_f = LayerNorm(dims.hidden, dims.norm_eps)
        self.lm_head = Linear(dims.hidden, dims.vocab, bias=False)

    def final_norm(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden[B,T,D] -> what transformers calls the last hidden state."""
        return self.ln_f(hidden)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden[B,T,D] -> logits[B,T,V]."""
        return self.lm_head(self.ln_f(hidden))
