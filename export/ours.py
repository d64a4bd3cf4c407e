"""The pipeline's own layers on the checkpoint's weights: how they compute in training, and with attention spelled out."""

import contextlib
from typing import List

import torch

from pipeline_train import models
from pipeline_train.families import ParamSlot
from pipeline_train.models import attention

from .layerwise import Side, small


class Ours(Side):
    def name_of(self, slot: ParamSlot, layer: int) -> str:
        return slot.name

    def load(self, layer: int, ids: List[List[int]]) -> None:
        self.module = models.build_layer(small(self.dims), layer)
        super().load(layer, ids)

    def run(self, layer: int, inputs: List, dtype: torch.dtype, as_trained: bool) -> List[torch.Tensor]:
        """One [1, T, D] per prompt: of token ids for layer 0, else of hidden states; of the last layer its norm.

        ``as_trained``: through the attention kernel that training uses; else through the operations of transformers' eager
        attention in their order, which leaves nothing but the order of sums to differ in.
        """
        self.to(dtype)
        kind = self.dims.kind_of(layer)
        with torch.no_grad(), contextlib.nullcontext() if as_trained else attention.spelled_out():
            if kind == "embed":
                return [self.module(self.tokens(row)) for row in inputs]
            if kind == "head":
                return [self.module.final_norm(h) for h in inputs]
            return [self.module(h, torch.arange(h.shape[1])[None], torch.ones(h.shape[:2], dtype=torch.int64)) for h in inputs]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[1, T, D] before the norm -> [T, n] for the head's rows in use."""
        with torch.no_grad():
            return self.module(hidden)[0]
