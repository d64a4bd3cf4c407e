"""The sizes that servers divide, of any config.json. Standard library only.

Servers load models of which we train none, and keys that our own blocks refuse: so this reads a few sizes under all the names they
have, and leaves the rest to ``families``.
"""

from typing import Any, Dict, NamedTuple, Optional

from pipeline_train.errors import UserError
from pipeline_train.families import FAMILIES, Dims, ModelFamily, dims_of

NAMES = {
    "heads": ("num_attention_heads", "n_head", "n_heads", "num_heads"),
    "kv_heads": ("num_key_value_heads", "num_kv_heads", "n_head_kv"),
    "hidden": ("hidden_size", "n_embed", "n_embd", "d_model"),
    "head_dim": ("head_dim",),
    "ffn": ("intermediate_size", "ffn_dim", "n_inner", "d_ff"),
    "blocks": ("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
    "vocab": ("vocab_size",),
    "positions": ("max_position_embeddings", "max_sequence_length", "n_positions", "max_seq_len", "seq_length"),
}


class Sizes(NamedTuple):
    """What config.json says, None where it does not. ``dims``: of a family of ours, None when unknown or not implemented, and
    then ``refused`` is why. ``dtype``: "fp16", "bf16", "fp32" or None, what the weights were saved in."""

    model_type: str
    family: Optional[ModelFamily]
    dims: Optional[Dims]
    refused: str
    heads: Optional[int]
    kv_heads: Optional[int]
    hidden: Optional[int]
    head_dim: Optional[int]
    ffn: Optional[int]
    blocks: Optional[int]
    vocab: Optional[int]
    positions: Optional[int]
    tied: Optional[bool]
    dtype: Optional[str]
    quantized: bool


MOST = 10**12  # far above any size of a model
DTYPES = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32"}


def sizes_of(config: Dict[str, Any]) -> Sizes:
    """Raises UserError for a size that is no positive whole number, or of another universe."""
    found = {name: _number(config, keys) for name, keys in NAMES.items()}
    model_type = str(config.get("model_type") or "")
    family = next((f for f in FAMILIES.values() if f.model_type == model_type), None)
    dims, refused = None, ""
    if family is not None:
        try:
            dims = dims_of(config)
        except UserError as error:
            refused = str(error)
    if dims is not None:
        found.update(heads=dims.heads, kv_heads=dims.kv_heads, hidden=dims.hidden, head_dim=dims.head_dim, ffn=dims.ffn,
                     blocks=dims.blocks, vocab=dims.vocab, positions=dims.max_positions)  # fmt: skip
    tied = dims.tied if dims is not None else config.get("tie_word_embeddings")
    dtype = DTYPES.get(str(config.get("dtype") or config.get("torch_dtype")))
    quantized = bool(config.get("quantization_config"))
    return Sizes(model_type, family, dims, refused, tied=tied, dtype=dtype, quantized=quantized, **found)


def _number(config: Dict[str, Any], keys: Any) -> Optional[int]:
    for key in keys:
        value = config.get(key)
        if value is not None:
            wrong = isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < MOST
            if wrong or value != int(value):
                raise UserError("config.json: %s: expected a positive whole number, got %s" % (key, repr(value)[:60]))
            return int(value)
    return None
