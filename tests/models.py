"""Tiny random models for every test: a config dictionary, and the transformers folder made from it."""

import warnings
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Tuple, Union

from pipeline_train.random_model import make_model

BASE = {
    "llama": {
        "model_type": "llama",
        "vocab_size": 131,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "hidden_act": "silu",
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "bloom": {
        "model_type": "bloom",
        "vocab_size": 131,
        "hidden_size": 48,
        "n_layer": 3,
        "n_head": 4,
        "layer_norm_epsilon": 1e-5,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
}  # type: Dict[str, Dict[str, Any]]

LLAMA3_SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


class Variant(NamedTuple):
    """One row of the parity tests. ``since``: the first transformers that computes it (older ones ignore the key)."""

    name: str
    family: str
    overrides: Dict[str, Any]
    since: Tuple[int, int] = (4, 28)


VARIANTS = [
    Variant("llama-mha", "llama", {}),
    Variant("llama-tied", "llama", {"tie_word_embeddings": True}),
    Variant("llama-gqa", "llama", {"num_key_value_heads": 2}, (4, 31)),
    Variant("llama-mqa-tied", "llama", {"num_key_value_heads": 1, "tie_word_embeddings": True}, (4, 31)),
    Variant("llama-theta", "llama", {"rope_theta": 100000.0, "num_attention_heads": 3, "num_key_value_heads": 1}, (4, 33)),
    Variant("llama-head-dim", "llama", {"head_dim": 20, "num_key_value_heads": 2}, (4, 45)),
    Variant("llama-rope-llama3", "llama", {"rope_scaling": LLAMA3_SCALING, "rope_theta": 500.0}, (4, 43)),
    Variant("llama-rope-linear", "llama", {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}, (4, 43)),
    Variant("llama-attention-bias", "llama", {"attention_bias": True, "num_key_value_heads": 2}, (4, 35)),
    Variant("llama-mlp-bias", "llama", {"mlp_bias": True}, (4, 41)),
    Variant("bloom-4-heads", "bloom", {}),
    Variant("bloom-untied", "bloom", {"tie_word_embeddings": False}),
    Variant("bloom-3-heads", "bloom", {"n_head": 3}),
    Variant("bloom-6-heads", "bloom", {"n_head": 6, "tie_word_embeddings": False}),
    Variant("bloom-post-norm", "bloom", {"apply_residual_connection_post_layernorm": True}),
]


# Keys of a llama's config.json -> (the first transformers that computes them, what older ones compute instead).
SINCE = {
    "num_key_value_heads": ((4, 31), None),
    "rope_theta": ((4, 33), 10000.0),
    "attention_bias": ((4, 35), False),
    "mlp_bias": ((4, 41), False),
    "rope_scaling": ((4, 43), None),
    "head_dim": ((4, 45), None),
}  # type: Dict[str, Tuple[Tuple[int, int], Any]]


def computed(config: Dict[str, Any]) -> Dict[str, Any]:
    """``config``, or the nearest one that the installed transformers computes, with a warning that says what is lost: for tests
    of training, whose reference it is. What our layers make of these keys is held against golden values (tests/parity)."""
    import transformers

    version, out = tuple(int(part) for part in transformers.__version__.split(".")[:2]), dict(config)
    for key, (since, instead) in SINCE.items():
        if key in config and version < since:
            value = config["num_attention_heads"] if key == "num_key_value_heads" else instead
            if config[key] != value:
                text = "transformers %s does not compute %s=%s: here tested with %s" % (
                    transformers.__version__, key, config[key], value)  # fmt: skip
                warnings.warn(text, stacklevel=2)
            out[key] = value
    if out.get("head_dim", 0) is None:
        del out["head_dim"]
    return out


def tiny_config(family: str, **overrides: Any) -> Dict[str, Any]:
    """A config.json dictionary of a model with about 100k parameters; ``overrides`` replace or add keys."""
    return dict(BASE[family], **overrides)


def make_hf(directory: Union[str, Path], config: Dict[str, Any], seed: int = 0, tokenizer: Any = None) -> Any:
    """random_model.make_model; ``tokenizer`` (anything with save_pretrained) is saved beside it."""
    model = make_model(config, directory, seed)
    if tokenizer is not None:
        tokenizer.save_pretrained(str(directory))
    return model


def our_layers(model: Any, config: Optional[Dict[str, Any]] = None) -> Tuple[Any, List[Any]]:
    """A transformers model -> (Dims, our layers with copies of its weights), without going through files."""
    from pipeline_train import families, models

    config = model.config.to_dict() if config is None else config
    family, dims = families.family_of(config), families.dims_of(config)
    state, layers = model.state_dict(), []
    for layer in range(dims.layers):
        module = models.build_layer(dims, layer).to(model.dtype)
        module.load_state_dict({slot.name: state[family.hf_name(slot, layer)] for slot in family.layer_slots(dims, layer)})
        layers.append(module)
    return dims, layers


def our_forward(layers: List[Any], ids: Any, positions: Any, segments: Any) -> Tuple[List[Any], Any]:
    """-> (what transformers calls hidden_states: each block's input, then the final norm's output; logits)."""
    hidden = [layers[0](ids)]
    for block in layers[1:-1]:
        hidden.append(block(hidden[-1], positions, segments))
    logits = layers[-1](hidden[-1])
    hidden[-1] = layers[-1].final_norm(hidden[-1])
    return hidden, logits


def with_code(folder: Path, ran: Path) -> str:
    """Put code into a model folder that transformers 4.57 runs when it loads the model, and that makes ``ran``; -> its path."""
    path = folder / "custom_generate" / "generate.py"
    path.parent.mkdir()
    path.write_text("open(%r, 'w')\ndef generate(): pass\n" % str(ran))
    return str(path)
