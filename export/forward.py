"""The two forward passes that the proof compares: the pipeline's own blocks, layer by layer, and plain transformers.

Both in fp32, on the same values: the weights rounded to the export's dtype and widened again.
"""

import random
import re
from pathlib import Path
from typing import Any, Dict, Iterator, List, Tuple

import torch

from pipeline_train import models
from pipeline_train.errors import RunFailed
from pipeline_train.families import Dims, ModelFamily
from pipeline_train.models import attention
from pipeline_train.weights import Source

from .to_hf import cast

TEXTS = (
    "The quick brown fox jumps over the lazy dog, 3.14159 times.",
    "### Human: What is the capital of France?\n### Assistant:",
    "def add(a, b):\n    return a + b\n",
    "你好，世界。今天天气怎么样？",
)
RANDOM_LENGTH = 128

# What is compared, in the order of the data: (layer, "embed" | "block" | "norm" | "logits") -> one tensor per prompt
States = Dict[Tuple[int, str], List[torch.Tensor]]


def random_ids(dims: Dims) -> List[int]:
    """Fixed ids drawn from every part of the vocabulary, as many as the model and RANDOM_LENGTH allow."""
    draw = random.Random(20240229)
    length = min(RANDOM_LENGTH, dims.max_positions or RANDOM_LENGTH)
    ids = [min(dims.vocab - 1, int((i + draw.random()) * dims.vocab / length)) for i in range(length)]
    draw.shuffle(ids)
    return ids


def load_tokenizer(folder: Path, what: str) -> Any:
    """AutoTokenizer of a folder, tried once. Raises RunFailed when it does not load or work; ``what`` names the folder."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder))
        tokenizer(TEXTS[0])
    except Exception as error:  # the tokenizers library raises Exception itself
        raise RunFailed("AutoTokenizer cannot use %s: %s" % (what, _first_line(error))) from error
    return tokenizer


def text_ids(folder: Path, texts: List[str], dims: Dims) -> List[List[int]]:
    """The texts through the export's own tokenizer. Raises RunFailed when it does not load or does not fit the model."""
    tokenizer = load_tokenizer(folder, "the export")
    rows = [list(tokenizer(text)["input_ids"]) for text in texts]
    over = max((i for row in rows for i in row), default=0)
    if over >= dims.vocab:
        raise RunFailed("the tokenizer gives id %d, but the embedding has %d rows" % (over, dims.vocab))
    if len({tuple(row) for row in rows if row}) < len(set(texts)):  # an empty vocabulary loads without complaint
        raise RunFailed("the tokenizer gives no ids, or the same ones for different texts; its files are not whole")
    return [row[: dims.max_positions] for row in rows]


def hf_states(folder: Path, prompts: List[List[int]], source: Source) -> States:
    """AutoModelForCausalLM on the export, fp32, eager attention. Raises RunFailed when it does not load exactly or ties wrongly."""
    dims, family = source.dims, source.family
    model = _load(folder, family)
    if _shared(model) != dims.tied:
        raise RunFailed("transformers %s, the checkpoint %s" % (_ties(_shared(model)), _ties(dims.tied)))
    states: States = {}
    norm = family.hf_name(family.layer_slots(dims, dims.layers - 1)[0], dims.layers - 1).rsplit(".", 1)[0]
    # hidden_states has every block's input and the final norm's output; only the last block's output is missing from it.
    hook = dict(model.named_modules())[norm].register_forward_pre_hook(
        lambda module, args: states.setdefault((dims.blocks, "block"), []).append(args[0].detach())
    )
    with torch.no_grad():
        for ids in prompts:
            out = model(input_ids=torch.tensor([ids]), output_hidden_states=True, use_cache=False)
            for layer, hidden in enumerate(out.hidden_states[:-1]):
                states.setdefault((layer, dims.kind_of(layer)), []).append(hidden)
            states.setdefault((dims.layers - 1, "norm"), []).append(out.hidden_states[-1])
            states.setdefault((dims.layers - 1, "logits"), []).append(out.logits)
    hook.remove()
    return states


def our_states(
    source: Source, dtypes: Dict[Tuple[int, str], str], prompts: List[List[int]]
) -> Iterator[Tuple[Tuple[int, str], List]]:
    """((layer, what), one tensor per prompt), in order; one layer's weights in memory at a time.

    ``dtypes``: (layer, slot name) -> the export's dtype of that tensor.
    """
    hidden = [torch.tensor([ids]) for ids in prompts]
    for layer in range(source.dims.layers):
        module = models.build_layer(source.dims, layer)
        tensors = source.layer(layer)
        for name in list(tensors):
            tensors[name] = cast(tensors[name], dtypes[layer, name], name).float()
        module.load_state_dict(tensors)
        del tensors
        kind = source.dims.kind_of(layer)
        with torch.no_grad():
            if kind == "head":
                yield (layer, "norm"), [module.final_norm(h) for h in hidden]  # type: ignore[operator]
                yield (layer, "logits"), [module(h) for h in hidden]
            else:
                places = [(torch.arange(h.shape[1])[None], torch.ones(h.shape[:2], dtype=torch.int64)) for h in hidden]
                # The fused kernel's rounding grows to 1.7e-5 over the 30 blocks of a trained SmolLM2, whose states reach 2e4.
                with attention.spelled_out():
                    hidden = [module(h, *(place if kind == "block" else ())) for h, place in zip(hidden, places)]
                yield (layer, kind), hidden


def difference(ours: List[torch.Tensor], theirs: List[torch.Tensor]) -> Dict[str, float]:
    """{"diff": max |ours - theirs|, "max": max |theirs|, "relative": the largest diff / max of one prompt}; NaN stays NaN."""
    worst, diff, largest = -1.0, 0.0, 0.0
    for a, b in zip(ours, theirs):
        d, m = float((a - b).abs().max()), float(b.abs().max())
        relative = d / m if m > 0 else d
        if not relative <= worst:  # also true for NaN, which then stays
            worst, diff, largest = relative, d, m
        if worst != worst:
            break
    return {"diff": diff, "max": largest, "relative": worst}


def _load(folder: Path, family: ModelFamily) -> Any:
    """The model, if transformers had a value for every parameter and a parameter for every value."""
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(str(folder))
        config._attn_implementation = "eager"
        # By the configuration, since the argument's name differs between versions. Widening to fp32 is exact.
        setattr(config, "dtype" if hasattr(config, "dtype") else "torch_dtype", torch.float32)
        loaded: Any = AutoModelForCausalLM.from_pretrained(str(folder), config=config, output_loading_info=True)
    except Exception as error:  # safetensors' errors derive from Exception alone
        raise RunFailed("AutoModelForCausalLM cannot load the export: %s" % _first_line(error)) from error
    model, info = loaded
    # transformers 4.30 counts among the missing what it computes itself: rotary buffers, a head that it ties.
    harmless = family.ignorable + ((re.escape(family.tied[1]),) if _shared(model) else ())
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        keys = [key for key in map(str, info[what]) if not any(re.match(pattern, key) for pattern in harmless)]
        if keys:
            raise RunFailed("transformers reports %s: %s" % (what.replace("_", " "), ", ".join(sorted(keys)[:5])))
    return model.float().eval()


def _shared(model: Any) -> bool:
    return model.get_input_embeddings().weight.data_ptr() == model.get_output_embeddings().weight.data_ptr()


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).split("\n")[0][:200]


def _ties(tied: bool) -> str:
    return "ties the head to the embedding" if tied else "keeps the head apart"
