"""What lies in a model folder: names of files, of the tensors in them, bytes. Standard library only."""

import json
import os
from typing import Any, Dict, FrozenSet, List, Optional, Tuple

from pipeline_train import families
from pipeline_train.errors import UserError

from .question import Files


def look(model_dir: str) -> Tuple[Dict[str, Any], Files, int]:
    """-> (config.json, what there is, bytes of the weights). Raises UserError when it is no model folder or cannot be read."""
    if not os.path.isdir(model_dir):
        raise UserError("--model %s: no such folder" % model_dir)
    names = tuple(sorted(os.listdir(model_dir)))
    if "manifest.json" in names and "layer_000.safetensors" in names:
        raise UserError("--model %s: pipeline weights; export them first: pipedock to-hf --input %s --output DIR" % (
            model_dir, model_dir))  # fmt: skip
    config = families.read_config(model_dir)
    files = Files(names)
    tensors = [_tensors(os.path.join(model_dir, name)) for name in files.ending(".safetensors")]
    weights = files.ending(".safetensors") or files.ending(".bin")
    nbytes = sum(os.path.getsize(os.path.join(model_dir, name)) for name in weights)
    return config, Files(names, _union(tensors)), nbytes


def _union(parts: List[Optional[FrozenSet[str]]]) -> Optional[FrozenSet[str]]:
    if not parts or any(part is None for part in parts):
        return None
    return frozenset().union(*[part for part in parts if part is not None])


def _tensors(path: str) -> Optional[FrozenSet[str]]:
    """The names in the header of a .safetensors file; None when it is not whole."""
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(min(length, os.path.getsize(path))))
    except (OSError, ValueError):
        return None
    return frozenset(name for name in header if name != "__metadata__") if isinstance(header, dict) else None
