"""What a model family is, as data. Standard library only.

Layers are counted as the pipeline counts them, here and nowhere else:

    0 = embed,  1..L = blocks,  L+1 = norm + head        layer = file number = HF block + 1
"""

from dataclasses import dataclass, field
from typing import Any, Callable, Dict, FrozenSet, List, Optional, Tuple

from ..errors import UserError


@dataclass(frozen=True)
class RopeScaling:
    """Rotary frequency scaling. ``kind`` is "linear" or "llama3"; the llama3 fields are as in Llama 3.1's config.json."""

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192


@dataclass(frozen=True)
class Dims:
    """Everything that decides shapes and arithmetic of one model; sizes in elements."""

    family: str
    vocab: int
    hidden: int
    blocks: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    max_positions: Optional[int]  # None: no hard limit (ALiBi)
    norm_eps: float
    tied: bool
    rope_theta: float = 10000.0
    rope_scaling: Optional[RopeScaling] = None
    attn_bias: bool = False
    mlp_bias: bool = False
    post_norm_residual: bool = False  # bloom's apply_residual_connection_post_layernorm
    init_std: float = 0.02

    @property
    def layers(self) -> int:
        """Pipeline layers: embed + blocks + head."""
        return self.blocks + 2

    @property
    def q_size(self) -> int:
        return self.heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.kv_heads * self.head_dim

    @property
    def qkv_size(self) -> int:
        return self.q_size + 2 * self.kv_size

    def kind_of(self, layer: int) -> str:
        """ "embed", "block" or "head" for a layer index in [0, layers)."""
        if not 0 <= layer < self.layers:
            raise IndexError("layer %d of %d" % (layer, self.layers))
        return "embed" if layer == 0 else "head" if layer == self.layers - 1 else "block"


@dataclass(frozen=True)
class ParamSlot:
    """One parameter of a layer: our name in the layer's state_dict, its HF name, its shape by the names of Dims fields."""

    layer: str  # "embed" | "block" | "head"
    name: str
    hf: str  # "{i}" stands for the HF block number
    shape: Tuple[str, ...]
    when: str = ""  # the Dims flag that must be true for this parameter to exist; "" = always

    def size(self, dims: Dims) -> Tuple[int, ...]:
        return tuple(int(getattr(dims, axis)) for axis in self.shape)


@dataclass(frozen=True)
class ServingFacts:
    """What a server must know about the family before it starts (tgi-contract, sections 4 and 5)."""

    flash_attention: bool  # TGI serves it through flash attention kernels
    tgi_bare_prefix: str = ""  # the key prefix that TGI 2.2+ does not accept
    head_from_embedding: bool = False  # TGI 0.9+ and vLLM compute the head with the embedding, whatever the files hold


@dataclass(frozen=True)
class ModelFamily:
    """A family as verified facts; every derived quantity is a pure function of these."""

    name: str
    model_type: str  # config.json's model_type
    slots: Tuple[ParamSlot, ...]
    tied: Tuple[str, str]  # (HF name of the embedding, HF name of the head) that are one tensor when Dims.tied
    dims_from_hf: Callable[[Dict[str, Any]], Dims]
    ignorable: Tuple[str, ...]  # regular expressions of HF keys that are safe to leave unread, each for a named reason
    optional_prefix: str  # a prefix that old files lack ("transformer." for bloom, "" for none)
    facts: ServingFacts
    architecture: str = ""  # the transformers class name written into an export's config.json
    tiny: Dict[str, Any] = field(default_factory=dict, hash=False)  # config.json of the small model that --self-test trains
    exports_tied_head: bool = False  # an export carries the head's own copy even when tied (servers of the family look for it)

    def layer_slots(self, dims: Dims, layer: int) -> List[ParamSlot]:
        """The parameters of one pipeline layer, in state_dict order."""
        kind = dims.kind_of(layer)
        return [s for s in self.slots if s.layer == kind and (not s.when or getattr(dims, s.when))]

    def hf_name(self, slot: ParamSlot, layer: int) -> str:
        return slot.hf.format(i=layer - 1)

    def layer_params(self, dims: Dims, layer: int) -> int:
        """Parameters held by a stage that owns this layer (a tied head holds its own copy)."""
        total = 0
        for slot in self.layer_slots(dims, layer):
            n = 1
            for size in slot.size(dims):
                n *= size
            total += n
        return total


class ConfigReader:
    """Reads a config.json so that nothing in it can change the arithmetic unnoticed.

    ``get`` marks a key as understood, ``only`` marks it and demands one value. ``finish`` refuses whatever is left
    and is not in ``harmless``: an unknown key must not load and be wrong.
    """

    def __init__(self, config: Dict[str, Any], where: str = "config.json") -> None:
        self.config = config
        self.where = where
        self.seen = set()  # type: set

    def get(self, key: str, default: Any = None) -> Any:
        self.seen.add(key)
        value = self.config.get(key)
        return default if value is None else value

    def number(self, key: str, *aliases: str, default: Any = None, kind: type = int) -> Any:
        """A positive int or float under ``key`` or one of its older names; two that disagree are refused."""
        names = (key,) + aliases
        found = [(n, self.get(n)) for n in names if self.get(n) is not None]
        if not found:
            if default is None:
                raise UserError("%s: %s: missing, a model of this family needs it" % (self.where, key))
            return default
        name, value = found[0]
        wrong = isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf")
        if wrong or (kind is int and value != int(value)):
            raise UserError("%s: %s: expected a positive %s, got %r" % (self.where, name, kind.__name__, value))
        for other, also in found[1:]:
            if also != value:
                raise UserError("%s: %s is %r but %s is %r; they name the same thing" % (self.where, name, value, other, also))
        return kind(value)

    def flag(self, key: str, default: bool = False) -> bool:
        value = self.get(key, default)
        if not isinstance(value, bool):
            raise UserError("%s: %s: expected true or false, got %r" % (self.where, key, value))
        return value

    def only(self, key: str, *allowed: Any) -> None:
        """Refuse any value but these (None and absence are fine)."""
        value = self.get(key)
        if value is not None and value not in allowed:
            raise UserError(
                "%s: %s: %r is not implemented (implemented: %s)" % (self.where, key, value, ", ".join(repr(a) for a in allowed))
            )

    def finish(self, harmless: FrozenSet[str]) -> None:
        left = sorted(k for k in self.config if k not in self.seen and k not in harmless and not k.startswith("_"))
        if left:
            raise UserError(
                "%s: %s: not implemented for this family; it could change the model's arithmetic, so it is not ignored"
                % (self.where, ", ".join(key if key.isprintable() else repr(key) for key in left))
            )


# Keys of any PretrainedConfig that say how to load, generate or train, never what the forward pass computes.
HARMLESS = frozenset(
    """architectures model_type transformers_version torch_dtype dtype use_cache name_or_path bos_token_id eos_token_id
    pad_token_id unk_token_id sep_token_id decoder_start_token_id return_dict output_hidden_states output_attentions
    torchscript use_bfloat16 pruned_heads chunk_size_feed_forward is_encoder_decoder is_decoder id2label label2id
    tokenizer_class prefix task_specific_params problem_type finetuning_task max_length min_length do_sample
    early_stopping num_beams temperature top_k top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size
    num_return_sequences bad_words_ids forced_bos_token_id forced_eos_token_id output_scores return_dict_in_generate
    remove_invalid_values diversity_penalty num_beam_groups encoder_no_repeat_ngram_size exponential_decay_length_penalty
    suppress_tokens begin_suppress_tokens tf_legacy_loss cross_attention_hidden_size add_cross_attention
    tie_encoder_decoder keys_to_ignore_at_inference gradient_checkpointing""".split()
)
