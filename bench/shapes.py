"""Geometries to measure, by name: config.json's content. Standard library only."""

import difflib
import json
from pathlib import Path
from typing import Any, Dict, Optional

from pipeline_train.errors import UserError

LLAMA: Dict[str, Any] = {"model_type": "llama", "max_position_embeddings": 4096, "tie_word_embeddings": False}
BLOOM: Dict[str, Any] = {"model_type": "bloom", "vocab_size": 250880, "hidden_dropout": 0.0, "attention_dropout": 0.0}


def _llama(hidden: int, ffn: int, heads: int, blocks: int, vocab: int = 32000) -> Dict[str, Any]:
    return dict(LLAMA, vocab_size=vocab, hidden_size=hidden, intermediate_size=ffn, num_hidden_layers=blocks,
                num_attention_heads=heads)  # fmt: skip


SHAPES: Dict[str, Dict[str, Any]] = {
    "llama-7b": _llama(4096, 11008, 32, 32),
    "llama-13b": _llama(5120, 13824, 40, 40),
    "llama-30b": _llama(6656, 17920, 52, 60),
    "llama-65b": _llama(8192, 22016, 64, 80),
    "llama-1b": dict(_llama(2048, 5632, 32, 22), num_key_value_heads=4),  # TinyLlama's
    "llama-tiny": _llama(256, 688, 4, 4, 2048),
    "bloom-560m": dict(BLOOM, hidden_size=1024, n_layer=24, n_head=16),
    "bloom-7b": dict(BLOOM, hidden_size=4096, n_layer=30, n_head=32),
    "bloom-tiny": dict(BLOOM, vocab_size=4096, hidden_size=256, n_layer=4, n_head=4),
}


def model_of(name: str, blocks: Optional[int] = None) -> Dict[str, Any]:
    """A name of SHAPES, or a config.json or a folder with one; with ``blocks`` transformer blocks instead of its own. Raises
    UserError."""
    from pipeline_train import families

    if name in SHAPES:
        config = dict(SHAPES[name])
    elif Path(name).exists():
        path = Path(name)
        config = families.read_config(str(path)) if path.is_dir() else _read(path)
    else:
        near = difflib.get_close_matches(name, SHAPES, 1)
        hint = "did you mean %s?" % near[0] if near else "expected a config.json, a folder with one, or %s" % ", ".join(SHAPES)
        raise UserError("--model %s: %s" % (name, hint))
    if blocks is not None:
        if blocks < 1:
            raise UserError("--blocks %d: must be at least 1" % blocks)
        key = next(key for key in ("num_hidden_layers", "n_layer") if key in config)
        config[key] = blocks
    families.dims_of(config)  # raises what is wrong with it
    return config


def _read(path: Path) -> Dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError("--model %s: cannot be read as JSON: %s" % (path, getattr(error, "strerror", None) or error)) from None
    if not isinstance(found, dict):
        raise UserError("--model %s: is no config.json" % path)
    return found
