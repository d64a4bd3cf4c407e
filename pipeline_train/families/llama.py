"""The llama family: RMS norm, rotary positions, gated SiLU MLP, grouped-query attention. Standard library only.

Facts from transformers' ``configuration_llama.py`` and ``modeling_llama.py`` (4.28 to 5) and from published config.json files.
"""

from typing import Any, Dict, Optional, Tuple

from ..errors import UserError
from .base import HARMLESS, ConfigReader, Dims, ModelFamily, ParamSlot, RopeScaling, ServingFacts

THETA = 10000.0  # transformers' default where a file names no base

# Keys of published llama files that transformers does not compute with.
UNUSED = frozenset(
    (
        "max_sequence_length",  # LLaMA and vicuna files of 2023; read below for the length only
        "is_llama_config",  # SmolLM, from nanotron's converter
        "transformers.js_config",  # how to load the ONNX copy in a browser
    )
)


def dims_from_hf(config: Dict[str, Any]) -> Dims:
    """config.json as written by transformers 4 or 5 -> Dims. Raises UserError naming the key that is not implemented."""
    reader = ConfigReader(config)
    reader.only("hidden_act", "silu")
    reader.only("pretraining_tp", 1)
    reader.only("attention_dropout", 0.0)
    reader.only("rope_interleaved", False)
    reader.only("partial_rotary_factor", 1.0)
    hidden = reader.number("hidden_size")
    heads = reader.number("num_attention_heads")
    kv_heads = reader.number("num_key_value_heads", default=heads)
    head_dim = _head_dim(reader, hidden, heads)
    if heads % kv_heads:
        raise UserError(
            "config.json: num_key_value_heads: %d query heads cannot share %d key-value heads evenly" % (heads, kv_heads)
        )
    theta, scaling = _rope(reader)
    dims = Dims(
        family="llama",
        vocab=reader.number("vocab_size"),
        hidden=hidden,
        blocks=reader.number("num_hidden_layers"),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        ffn=reader.number("intermediate_size"),
        max_positions=_max_positions(reader),
        norm_eps=reader.number("rms_norm_eps", default=1e-6, kind=float),
        tied=reader.flag("tie_word_embeddings", False),
        rope_theta=theta,
        rope_scaling=scaling,
        attn_bias=reader.flag("attention_bias"),
        mlp_bias=reader.flag("mlp_bias"),
        init_std=reader.number("initializer_range", default=0.02, kind=float),
    )
    reader.finish(HARMLESS | UNUSED)
    return dims


def _head_dim(reader: ConfigReader, hidden: int, heads: int) -> int:
    if reader.get("head_dim") is None and hidden % heads:
        raise UserError("config.json: hidden_size: %d is not a multiple of %d heads, and no head_dim is given" % (hidden, heads))
    head_dim = reader.number("head_dim", default=hidden // heads)
    if head_dim % 2:
        raise UserError("config.json: head_dim: %d is odd; rotary positions turn pairs, so it must be even" % head_dim)
    return head_dim


def _max_positions(reader: ConfigReader) -> int:
    """Files of 2023 name the length max_sequence_length; beside linear scaling it is the scaled, longer one."""
    positions = reader.number("max_position_embeddings", default=2048)
    return reader.number("max_sequence_length", default=positions)


def _rope(reader: ConfigReader) -> Tuple[float, Optional[RopeScaling]]:
    """The rotary base and scaling from ``rope_theta`` + ``rope_scaling`` (transformers 4) or ``rope_parameters`` (5).

    A file that carries both shapes must say the same thing twice.
    """
    found = {}
    for key in ("rope_parameters", "rope_scaling"):
        if reader.get(key) is not None:
            found[key] = _rope_section(reader.get(key), "%s: %s" % (reader.where, key))
    thetas = {"%s.rope_theta" % key: theta for key, (theta, _) in found.items() if theta is not None}
    if reader.get("rope_theta") is not None:
        thetas["rope_theta"] = reader.number("rope_theta", kind=float)
    for what, values in (("rope_theta", thetas), ("scaling", {key: scaling for key, (_, scaling) in found.items()})):
        if len(set(values.values())) > 1:
            said = " but ".join("%s says %s" % item for item in values.items())
            raise UserError("%s: two values of the rotary %s: %s" % (reader.where, what, said))
    scalings = [scaling for _, scaling in found.values()]
    return next(iter(thetas.values()), THETA), scalings[0] if scalings else None


def _rope_section(section: Any, where: str) -> Tuple[Optional[float], Optional[RopeScaling]]:
    """One rope dictionary -> (theta if it names one, scaling if it names any). Both spellings of the type are read."""
    if not isinstance(section, dict):
        raise UserError("%s: expected a dictionary or null, got %r" % (where, section))
    reader = ConfigReader(section, where)
    for key in ("rope_type", "type"):
        reader.only(key, "default", "linear", "llama3")
    kinds = [reader.get(key) for key in ("rope_type", "type") if reader.get(key) is not None]
    if len(set(kinds)) > 1:
        raise UserError("%s: rope_type is %r but type is %r; they name the same thing" % (where, kinds[0], kinds[1]))
    kind = kinds[0] if kinds else "default"
    reader.only("partial_rotary_factor", 1.0)
    theta = None if reader.get("rope_theta") is None else reader.number("rope_theta", kind=float)
    scaling = None
    unread = frozenset(("original_max_position_embeddings",))  # transformers computes with it for llama3 only
    if kind == "linear":
        scaling = RopeScaling("linear", reader.number("factor", kind=float))
    elif kind == "llama3":
        unread = frozenset()
        scaling = RopeScaling(
            "llama3",
            reader.number("factor", kind=float),
            reader.number("low_freq_factor", kind=float),
            reader.number("high_freq_factor", kind=float),
            reader.number("original_max_position_embeddings"),
        )
        if scaling.high_freq_factor <= scaling.low_freq_factor:
            raise UserError("%s: high_freq_factor: must be greater than low_freq_factor" % where)
    reader.finish(unread)
    return theta, scaling


def _block(name: str, *shape: str, when: str = "") -> ParamSlot:
    return ParamSlot("block", name, "model.layers.{i}." + name, shape, when)


FAMILY = ModelFamily(
    name="llama",
    model_type="llama",
    architecture="LlamaForCausalLM",
    tiny={
        "model_type": "llama",
        "vocab_size": 131,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    slots=(
        ParamSlot("embed", "embed_tokens.weight", "model.embed_tokens.weight", ("vocab", "hidden")),
        _block("input_layernorm.weight", "hidden"),
        _block("self_attn.q_proj.weight", "q_size", "hidden"),
        _block("self_attn.q_proj.bias", "q_size", when="attn_bias"),
        _block("self_attn.k_proj.weight", "kv_size", "hidden"),
        _block("self_attn.k_proj.bias", "kv_size", when="attn_bias"),
        _block("self_attn.v_proj.weight", "kv_size", "hidden"),
        _block("self_attn.v_proj.bias", "kv_size", when="attn_bias"),
        _block("self_attn.o_proj.weight", "hidden", "q_size"),
        _block("self_attn.o_proj.bias", "hidden", when="attn_bias"),
        _block("post_attention_layernorm.weight", "hidden"),
        _block("mlp.gate_proj.weight", "ffn", "hidden"),
        _block("mlp.gate_proj.bias", "ffn", when="mlp_bias"),
        _block("mlp.up_proj.weight", "ffn", "hidden"),
        _block("mlp.up_proj.bias", "ffn", when="mlp_bias"),
        _block("mlp.down_proj.weight", "hidden", "ffn"),
        _block("mlp.down_proj.bias", "hidden", when="mlp_bias"),
        ParamSlot("head", "norm.weight", "model.norm.weight", ("hidden",)),
        ParamSlot("head", "lm_head.weight", "lm_head.weight", ("vocab", "hidden")),
    ),
    tied=("model.embed_tokens.weight", "lm_head.weight"),
    dims_from_hf=dims_from_hf,
    ignorable=(
        # A buffer that transformers saved until 4.31; it follows from rope_theta and head_dim.
        r"^model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq$",
    ),
    optional_prefix="",
    facts=ServingFacts(flash_attention=True),
)
