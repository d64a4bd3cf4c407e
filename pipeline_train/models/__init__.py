"""Our own transformer layers, one file per family, equal to transformers' (tests/parity). Torch only.

embed  (ids[B,T] int64) -> hidden[B,T,D]
block  (hidden[B,T,D], positions[B,T] int64, segments[B,T] int64) -> hidden[B,T,D]
head   (hidden[B,T,D]) -> logits[B,T,V]
"""

import hashlib
import importlib

import torch
from torch import nn

from ..families import FAMILIES, Dims, ParamSlot


def build_layer(dims: Dims, layer: int) -> nn.Module:
    """The module of pipeline layer ``layer`` (0 embed, 1..L blocks, L+1 norm + head), fp32, every parameter NaN until loaded.

    ``state_dict()`` has the family's slot names in slot order. A head has its own ``lm_head.weight`` even when Dims.tied.
    """
    # By name, so that a new family is one new file here and no edit.
    module = importlib.import_module("." + FAMILIES[dims.family].name, __name__)
    return getattr(module, dims.kind_of(layer).capitalize())(dims)


def init_layer(module: nn.Module, dims: Dims, layer: int, seed: int) -> None:
    """Start a layer from scratch: matrices normal(0, Dims.init_std), norms 1, biases 0, as transformers does.

    A value depends on (seed, layer, parameter name) only, not on the stages; a tied head gets the embedding's values.
    """
    family = FAMILIES[dims.family]
    parameters = dict(module.named_parameters())
    with torch.no_grad():
        for slot in family.layer_slots(dims, layer):
            source_layer, source = layer, slot
            if dims.tied and slot.hf == family.tied[1]:
                source_layer, source = 0, next(s for s in family.layer_slots(dims, 0) if s.hf == family.tied[0])
            parameters[slot.name].copy_(_initial(source, dims, source_layer, seed))


def _initial(slot: ParamSlot, dims: Dims, layer: int, seed: int) -> torch.Tensor:
    size = slot.size(dims)
    if len(size) == 1:
        return torch.full(size, 0.0 if slot.name.endswith("bias") else 1.0)
    digest = hashlib.sha256(("%d/%d/%s" % (seed, layer, slot.name)).encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    return torch.empty(size).normal_(0.0, dims.init_std, generator=generator)
