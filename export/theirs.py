"""The reference: transformers' own code on the exported files, layer by layer in bounded memory, and as one model where that
fits."""

import copy
import os
import re
from pathlib import Path
from typing import Any, Dict, List, Set, Tuple

import torch

from pipeline_train import proof
from pipeline_train.errors import RunFailed
from pipeline_train.families import Dims, ModelFamily, ParamSlot
from pipeline_train.weights import Source

from .layerwise import Side
from .prompts import first_line

# (layer, "embed" | "block" | "norm" | "logits") -> one tensor per prompt
Everything = Dict[Tuple[int, str], List[torch.Tensor]]


class _Enough(Exception):
    """What was wanted from a forward pass is there."""


class Theirs(Side):
    """transformers' model class made from the export's config.json, but with one block and a vocabulary of 8: its embedding, block,
    norm and head get the export's tensors, layer after layer, and nothing else. Around them runs transformers' own forward pass,
    which makes masks, positions and ALiBi as it does for the whole model; eager attention.
    """

    def __init__(self, target: Source, tied: bool) -> None:
        """``tied``: whether embedding and head are one tensor in the checkpoint. Raises RunFailed."""
        super().__init__(target)
        self.module = _one_block(target.folder, tied)
        named = dict(self.module.named_modules())
        self._block = named[self._parent(self.family.layer_slots(self.dims, 1), 1)]
        self._norm = named[self.family.hf_name(self.family.layer_slots(self.dims, self.dims.layers - 1)[0], 0).rsplit(".", 1)[0]]
        self._check_names()

    def name_of(self, slot: ParamSlot, layer: int) -> str:
        return self.family.hf_name(slot, 1)

    def drop(self) -> None:
        """The module stays: the next layer takes the place of this one."""

    def run(self, layer: int, inputs: List, dtype: torch.dtype) -> List[torch.Tensor]:
        """As ``Ours.run``."""
        self.to(dtype)
        kind = self.dims.kind_of(layer)
        with torch.no_grad():
            if kind == "embed":
                return [self._caught(self._block, self.tokens(row)) for row in inputs]
            if kind == "head":
                return [self._norm(h) for h in inputs]
            return [self._through(h) for h in inputs]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """As ``Ours.logits``."""
        with torch.no_grad():
            return self.module.get_output_embeddings()(self._norm(hidden))[0]

    def _through(self, hidden: torch.Tensor) -> torch.Tensor:
        """The block's output for this input: it takes the place of what the embedding gave."""
        handle = self._block.register_forward_pre_hook(lambda module, args: (hidden,) + args[1:])
        try:
            return self._caught(self._norm, torch.zeros(hidden.shape[:2], dtype=torch.int64))
        finally:
            handle.remove()

    def _caught(self, module: Any, ids: torch.Tensor) -> torch.Tensor:
        """Run the model until it reaches ``module``; -> what that module was given."""
        caught: List[torch.Tensor] = []

        def stop(module: Any, args: Any) -> None:
            caught.append(args[0])
            raise _Enough

        handle = module.register_forward_pre_hook(stop)
        try:
            self.module(input_ids=ids, use_cache=False)
        except _Enough:
            pass
        finally:
            handle.remove()
        return caught[0]

    def _parent(self, slots: List[ParamSlot], layer: int) -> str:
        """The module that holds a layer's parameters: what their names begin with in common."""
        return ".".join(os.path.commonprefix([self.family.hf_name(slot, layer).split(".") for slot in slots]))

    def _check_names(self) -> None:
        """transformers has a place for every tensor of a block, and a tensor for every place."""
        layers = (0, 1, self.dims.layers - 1)
        ours = {self.name_of(slot, layer) for layer in layers for slot in self.family.layer_slots(self.dims, layer)}
        theirs = {name for name, _ in self.module.named_parameters()}
        for what, names in (("needs", theirs - ours), ("does not know", ours - theirs)):
            if names:
                raise RunFailed("transformers %s %s" % (what, ", ".join(sorted(names)[:5])))


def whole_model(folder: Path, prompts: List[List[int]], family: ModelFamily, dims: Dims) -> Everything:
    """AutoModelForCausalLM on the export, fp32, eager attention. Raises RunFailed when it does not load exactly or ties wrongly."""
    model = _load(folder, family)
    if _shared(model) != dims.tied:
        raise RunFailed("transformers %s, the checkpoint %s" % (_ties(_shared(model)), _ties(dims.tied)))
    states: Everything = {}
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
            states.setdefault((dims.layers - 1, "logits"), []).append(out.logits[0])
    hook.remove()
    return states


def _config(folder: Path) -> Any:
    from transformers import AutoConfig

    config: Any = AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
    config._attn_implementation = "eager"
    # By the configuration, since the argument's name differs between versions. Widening to fp32 is exact.
    setattr(config, "dtype" if hasattr(config, "dtype") else "torch_dtype", torch.float32)
    return config


def _one_block(folder: Path, tied: bool) -> Any:
    from transformers import AutoModelForCausalLM

    try:
        config = copy.deepcopy(_config(folder))
        if bool(config.tie_word_embeddings) != tied:
            raise RunFailed("transformers %s, the checkpoint %s" % (_ties(config.tie_word_embeddings), _ties(tied)))
        config.num_hidden_layers, config.vocab_size, config.pad_token_id, config.tie_word_embeddings = 1, 8, None, False
        return AutoModelForCausalLM.from_config(config).float().eval()
    except RunFailed:
        raise
    except Exception as error:  # whatever a configuration makes transformers raise
        raise RunFailed("transformers cannot make a block from the export's config.json: %s" % first_line(error)) from error


def _load(folder: Path, family: ModelFamily) -> Any:
    """The model, if transformers had a value for every parameter and a parameter for every value."""
    from transformers import AutoModelForCausalLM

    code = proof.foreign_code(str(folder))
    if code is not None:
        raise RunFailed("%s: is code that transformers would run; an export has none, remove it" % code)
    try:
        config = _config(folder)
        options: Dict[str, Any] = {"config": config, "output_loading_info": True, "trust_remote_code": False}
        loaded: Any = AutoModelForCausalLM.from_pretrained(str(folder), **options)
    except Exception as error:  # safetensors' errors derive from Exception alone
        raise RunFailed("AutoModelForCausalLM cannot load the export: %s" % first_line(error)) from error
    model, info = loaded
    # transformers 4.30 counts among the missing what it computes itself: rotary buffers, a head that it ties.
    harmless = family.ignorable + ((re.escape(family.tied[1]),) if _shared(model) else ())
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        keys: Set[str] = {key for key in map(str, info[what]) if not any(re.match(pattern, key) for pattern in harmless)}
        if keys:
            raise RunFailed("transformers reports %s: %s" % (what.replace("_", " "), ", ".join(sorted(keys)[:5])))
    return model.float().eval()


def _shared(model: Any) -> bool:
    return model.get_input_embeddings().weight.data_ptr() == model.get_output_embeddings().weight.data_ptr()


def _ties(tied: bool) -> str:
    return "ties the head to the embedding" if tied else "keeps the head apart"
