"""The model families, looked up by config.json. Standard library only, so that planning needs no GPU box.

A new family is one file here, one of the same name in ``models/``, its name in the line below, and one row in ``tests/models.py``.
"""

import json
import os
from typing import Any, Dict

from ..errors import UserError
from . import bloom, llama
from .base import ConfigReader, Dims, ModelFamily, ParamSlot, RopeScaling, ServingFacts

FAMILIES = {family.name: family for family in (llama.FAMILY, bloom.FAMILY)}  # type: Dict[str, ModelFamily]

MOST_BLOCKS = 10000  # far above any model; whoever lists the layers of a billion blocks runs out of memory

__all__ = [
    "FAMILIES",
    "ConfigReader",
    "Dims",
    "ModelFamily",
    "ParamSlot",
    "RopeScaling",
    "ServingFacts",
    "dims_of",
    "family_of",
    "read_config",
]


def read_config(dir_or_file: str) -> Dict[str, Any]:
    """The config.json of a model folder, or that file itself, as a dictionary. Raises UserError when absent or not JSON."""
    path = os.fspath(dir_or_file)
    if os.path.isdir(path):
        path = os.path.join(path, "config.json")
    try:
        with open(path, encoding="utf-8") as file:
            config = json.loads(file.read(), parse_constant=_no_constant)
    except FileNotFoundError:
        if os.path.isdir(os.path.join(os.path.dirname(path), "resolved")):
            raise UserError("%s: is a run that has saved no checkpoint yet" % os.path.dirname(path)) from None
        raise UserError("%s: no such file. A model folder holds config.json, weights and tokenizer files." % path) from None
    except OSError as error:
        raise UserError("%s: cannot be read: %s" % (path, error.strerror)) from None
    except RecursionError:
        raise UserError("%s: not a model's configuration: nested too deeply" % path) from None
    except ValueError as error:  # also UnicodeDecodeError
        raise UserError("%s: not valid JSON: %s" % (path, error)) from None
    if not isinstance(config, dict):
        raise UserError("%s: expected a JSON object with model_type and sizes, found %s" % (path, type(config).__name__))
    return config


def family_of(config: Dict[str, Any]) -> ModelFamily:
    """The family that ``model_type`` names. Raises UserError naming the supported ones."""
    model_type = config.get("model_type")
    for family in FAMILIES.values():
        if family.model_type == model_type:
            return family
    known = ", ".join(family.model_type for family in FAMILIES.values())
    if model_type is None:
        raise UserError("config.json: model_type: missing; it names the model's family (supported: %s)" % known)
    raise UserError("config.json: model_type: %r is not supported (supported: %s)" % (model_type, known))


def dims_of(config: Dict[str, Any]) -> Dims:
    """Every size and switch of the model. Raises UserError naming each key that is not implemented."""
    dims = family_of(config).dims_from_hf(config)
    if dims.blocks > MOST_BLOCKS:
        raise UserError("config.json: %d blocks; a file that was damaged or forged (at most %d)" % (dims.blocks, MOST_BLOCKS))
    return dims


def _no_constant(text: str) -> float:
    raise ValueError("%s is not a number" % text)
