"""Slot <-> Hugging Face name, one mapping read in both directions. Standard library only.

A slot is (pipeline layer, name in that layer's state_dict). Layouts at rest are Hugging Face's, so conversion is renaming.
"""

from typing import Dict, List, Tuple

from pipeline_train.families import Dims, ModelFamily, ParamSlot

SlotKey = Tuple[int, str]


def slots(family: ModelFamily, dims: Dims) -> List[Tuple[int, ParamSlot]]:
    """(layer, slot) of every parameter in file order: embed, blocks, head."""
    return [(layer, slot) for layer in range(dims.layers) for slot in family.layer_slots(dims, layer)]


def hf_names(family: ModelFamily, dims: Dims) -> Dict[SlotKey, str]:
    """(layer, slot name) -> HF name, for every parameter; a bijection."""
    return {(layer, slot.name): family.hf_name(slot, layer) for layer, slot in slots(family, dims)}


def slot_keys(family: ModelFamily, dims: Dims) -> Dict[str, SlotKey]:
    """HF name -> (layer, slot name), the inverse of ``hf_names``."""
    return {name: key for key, name in hf_names(family, dims).items()}
