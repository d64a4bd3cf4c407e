"""What each server needs of an export, as one table with its sources. Standard library only.

Sources (file:line at the tag, of huggingface/text-generation-inference unless another project is named):

    tgi-0.8   S/models/flash_llama.py:44,57-62@v0.8.2 .bin files and the slow LlamaTokenizer for llama with flash attention;
              S/cli.py:139-151 safetensors as well, or the folder must be writable; no tied llama head: lm_head.weight is looked
              up by name (the same file); its transformers (fork 6900982, 4.30 in development) has no grouped queries, no rotary
              base or scaling, no biases, no head_dim in LlamaConfig, and ignores the keys; bloom:
              S/models/bloom.py:149-153,257-259, either key layout with lm_head.weight
    tgi-3     S/models/causal_lm.py:560-568 and S/utils/weights.py:177-192@v3.3.7: bloom under bare keys only;
              custom_modeling/bloom_modeling.py:823-827: its head is always the embedding, a lm_head.weight in the file is not read;
              R/server.rs:1607-1689: chat template from tokenizer_config.json, chat_template.jinja is not read
    vllm      vllm-project/vllm, vllm/model_executor/models/bloom.py, BloomForCausalLM.load_weights: skips lm_head.weight, and a
              head that is not tied would keep its random start; keys with or without "transformer."
    hf        transformers 4.30 to 5: refuses bare bloom keys beside lm_head.weight as corrupted; ties again, silently, unless
              config.json says tie_word_embeddings false; the tokenizers of 4.30 reads merges as "a b" only, later ones both

Here S is server/text_generation_server, R is router/src.
"""

from dataclasses import dataclass, replace
from typing import Any, Dict, List, Tuple

from pipeline_train.errors import UserError
from pipeline_train.families import FAMILIES, Dims, ModelFamily, ParamSlot


@dataclass(frozen=True)
class Target:
    """One row of the table. What differs between families is in their ServingFacts."""

    name: str
    bare: bool = False  # keys without ServingFacts.tgi_bare_prefix
    head: str = "own"  # "own": as it is; "always": a tied one is written too; "embedding": ServingFacts.head_from_embedding counts
    flash_bins: bool = False  # families served by flash attention need pytorch_model.bin and tokenizer.model
    merges: str = ""  # of tokenizer.json, as "a b" ("joined", or "joined if possible"): tokenizers before 0.20 reads no pairs
    only: Tuple[Tuple[str, Any], ...] = ()  # (Dims field, the one value that the server computes)
    multi_head_only: bool = False  # no grouped queries, heads that fill the hidden size


TARGETS: Dict[str, Target] = {
    target.name: target
    for target in (
        Target("hf", merges="joined if possible"),
        Target(
            "tgi-0.8",
            head="always",
            flash_bins=True,
            merges="joined",
            only=(("rope_theta", 10000.0), ("rope_scaling", None), ("attn_bias", False), ("mlp_bias", False)),
            multi_head_only=True,
        ),
        Target("tgi-3", bare=True, head="embedding"),
        Target("vllm", head="embedding"),
    )
}


def find(name: str) -> Target:
    """Raises UserError naming those there are."""
    if name not in TARGETS:
        raise UserError("--target %s: not one of those there are: %s" % (name, ", ".join(TARGETS)))
    return TARGETS[name]


def check(target: Target, dims: Dims) -> None:
    """Refuse what the server would load and compute wrongly, or not load. Raises UserError with every reason.

    Whether an untied head is a reason depends on its values: see ``head_must_equal``.
    """
    wrong = []
    for key, value in target.only:
        if getattr(dims, key) != value:
            wrong.append("%s is %s, it computes %s" % (key, getattr(dims, key), value))
    if target.multi_head_only and dims.kv_heads != dims.heads:
        wrong.append("%d key-value heads for %d heads, it has no grouped queries" % (dims.kv_heads, dims.heads))
    if target.multi_head_only and dims.q_size != dims.hidden:
        wrong.append("head_dim is %d, it computes %d" % (dims.head_dim, dims.hidden // dims.heads))
    if wrong:
        raise UserError(
            "--target %s: this server cannot compute this model: %s. Use --target tgi-3 or vllm" % (target.name, "; ".join(wrong))
        )


def check_run(name: str, dims: Dims) -> None:
    """Refuse, before a model is trained, a target that its export cannot be for. Raises UserError."""
    target = find(name)
    check(target, dims)
    if head_must_equal(target, FAMILIES[dims.family]) and not dims.tied:
        raise UserError(
            "export.target: %s: this run trains a head of its own (tie_word_embeddings is false), and this server takes the "
            "embedding for the head of every %s. Use hf or tgi-0.8" % (name, dims.family)
        )


def head_must_equal(target: Target, family: ModelFamily) -> bool:
    """Whether the server takes the head from the embedding, whatever the files and config.json say."""
    return target.head == "embedding" and family.facts.head_from_embedding


def exported_dims(target: Target, family: ModelFamily, dims: Dims) -> Dims:
    """What config.json of the export says: a head that the server takes from the embedding is a tied one."""
    return replace(dims, tied=True) if head_must_equal(target, family) else dims


def exported(target: Target, family: ModelFamily, dims: Dims) -> List[Tuple[str, int, ParamSlot]]:
    """(name in the file, layer, slot) of every tensor that the export holds, in file order.

    A tied head is left out where the family's loaders rebuild it from the embedding, and written where servers look for it.
    """
    if head_must_equal(target, family):
        has_head = False
    else:
        has_head = not dims.tied or target.head == "always" or family.exports_tied_head
    found = []
    for layer in range(dims.layers):
        for slot in family.layer_slots(dims, layer):
            if slot.hf != family.tied[1] or has_head:
                found.append((_name(target, family, slot, layer), layer, slot))
    return found


def needs_bins(target: Target, family: ModelFamily) -> bool:
    return target.flash_bins and family.facts.flash_attention


def notes(target: Target, family: ModelFamily, files: List[str]) -> List[str]:
    """What the user should know about the export. ``files``: those beside the weights."""
    if needs_bins(target, family) and "tokenizer.model" not in files:
        return [
            "there is no tokenizer.model: with flash attention (T4 and newer) this server loads a llama's slow tokenizer only, "
            "and will not start"
        ]
    return []


def _name(target: Target, family: ModelFamily, slot: ParamSlot, layer: int) -> str:
    name, prefix = family.hf_name(slot, layer), family.facts.tgi_bare_prefix
    return name[len(prefix) :] if target.bare and prefix and name.startswith(prefix) else name
