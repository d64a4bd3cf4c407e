"""The bloom family: layer norms, ALiBi, tanh GELU, fused per-head-interleaved QKV, embedding norm. Standard library only.

Facts from transformers' ``configuration_bloom.py`` and ``modeling_bloom.py`` and from the config.json files of bigscience.
"""

from typing import Any, Dict

from ..errors import UserError
from .base import HARMLESS, ConfigReader, Dims, ModelFamily, ParamSlot, ServingFacts

# Keys that bigscience's files carry over from Megatron-DeepSpeed and that transformers does not compute with.
UNUSED = frozenset(
    (
        "offset_alibi",  # a shift of all positions; softmax cancels it
        "skip_bias_add",  # where Megatron adds the bias, not whether
        "skip_bias_add_qkv",
        "masked_softmax_fusion",  # choice of kernel
        "bias_dropout_fusion",  # choice of kernel
        "seq_length",  # the length it was trained at; ALiBi has no limit
        "n_positions",
    )
)


def dims_from_hf(config: Dict[str, Any]) -> Dims:
    """config.json of any age -> Dims. Raises UserError naming the key that is not implemented."""
    reader = ConfigReader(config)
    reader.only("hidden_dropout", 0.0)
    reader.only("attention_dropout", 0.0)
    reader.only("attention_softmax_in_fp32", True)
    if reader.number("pretraining_tp", default=1) > 1:
        reader.only("slow_but_exact", False)  # sums the output projection in pretraining_tp slices: other rounding
    reader.get("slow_but_exact")
    hidden = reader.number("hidden_size", "n_embed")
    heads = reader.number("n_head", "num_attention_heads")
    if hidden % heads:
        raise UserError("config.json: hidden_size: %d is not a multiple of %d heads" % (hidden, heads))
    reader.only("n_inner", 4 * hidden)
    dims = Dims(
        family="bloom",
        vocab=reader.number("vocab_size"),
        hidden=hidden,
        blocks=reader.number("n_layer", "num_hidden_layers"),
        heads=heads,
        kv_heads=heads,
        head_dim=hidden // heads,
        ffn=4 * hidden,
        max_positions=None,
        norm_eps=reader.number("layer_norm_epsilon", default=1e-5, kind=float),
        tied=reader.flag("tie_word_embeddings", True),
        post_norm_residual=reader.flag("apply_residual_connection_post_layernorm"),
        init_std=reader.number("initializer_range", default=0.02, kind=float),
    )
    reader.finish(HARMLESS | UNUSED)
    return dims


def _affine(layer: str, prefix: str, name: str, *shape: str) -> tuple:
    """The weight and bias slots of one module; the bias has the weight's first axis."""
    slots = (("weight", shape), ("bias", shape[:1]))
    return tuple(ParamSlot(layer, "%s.%s" % (name, what), "%s%s.%s" % (prefix, name, what), axes) for what, axes in slots)


def _block(name: str, *shape: str) -> tuple:
    return _affine("block", "transformer.h.{i}.", name, *shape)


FAMILY = ModelFamily(
    name="bloom",
    model_type="bloom",
    architecture="BloomForCausalLM",
    tiny={
        "model_type": "bloom",
        "vocab_size": 131,
        "hidden_size": 64,
        "n_layer": 6,
        "n_head": 4,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    exports_tied_head=True,
    slots=(
        ParamSlot("embed", "word_embeddings.weight", "transformer.word_embeddings.weight", ("vocab", "hidden")),
        *_affine("embed", "transformer.", "word_embeddings_layernorm", "hidden"),
        *_block("input_layernorm", "hidden"),
        # Rows in HF's order: for each head its query, key and value rows.
        *_block("self_attention.query_key_value", "qkv_size", "hidden"),
        *_block("self_attention.dense", "hidden", "q_size"),
        *_block("post_attention_layernorm", "hidden"),
        *_block("mlp.dense_h_to_4h", "ffn", "hidden"),
        *_block("mlp.dense_4h_to_h", "hidden", "ffn"),
        *_affine("head", "transformer.", "ln_f", "hidden"),
        ParamSlot("head", "lm_head.weight", "lm_head.weight", ("vocab", "hidden")),
    ),
    tied=("transformer.word_embeddings.weight", "lm_head.weight"),
    dims_from_hf=dims_from_hf,
    ignorable=(
        # A mask buffer of transformers 4.20's development versions; 4.30 still lists it as one to ignore.
        r"^(transformer\.)?h\.\d+\.self_attention\.scale_mask_softmax\.causal_mask$",
    ),
    optional_prefix="transformer.",
    facts=ServingFacts(flash_attention=False, tgi_bare_prefix="transformer.", head_from_embedding=True),
)
