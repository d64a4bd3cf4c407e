"""How each server finds its tensors in a folder, written down again from its own source: what an export must satisfy.

``found(server, folder, family)`` -> {transformers' name: the tensor that the server computes with}; raises Unservable as the server
would refuse. Sources: ``export/targets.py``.
"""

import json
from pathlib import Path
from typing import Any, Callable, Dict

import torch
from safetensors.torch import load_file

Tensors = Dict[str, Any]


class Unservable(Exception):
    pass


def safetensors_of(folder: Path) -> Tensors:
    state: Tensors = {}
    for path in folder.glob("*.safetensors"):
        state.update(load_file(str(path)))
    return state


def bins_of(folder: Path) -> Tensors:
    state: Tensors = {}
    for path in folder.glob("*.bin"):
        state.update(torch.load(str(path), map_location="cpu", weights_only=True))
    return state


def config_of(folder: Path) -> Dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def take(state: Tensors, name: str) -> Any:
    if name not in state:
        raise Unservable("weight %s does not exist" % name)
    return state[name]


def tgi_08_bloom_sharded(folder: Path, names: Any) -> Tensors:
    """S/models/bloom.py@v0.8.2: a prefix is added or cut off as the model's parameters need; the head is filled by a tensor named
    exactly word_embeddings.weight or lm_head.weight."""
    state = safetensors_of(folder)
    found: Tensors = {}
    for key, tensor in state.items():
        name = key if key.startswith(("transformer.", "lm_head.")) else "transformer." + key
        if name not in names:
            raise Unservable("unexpected %s" % key)
        found[name] = tensor
        if key == "word_embeddings.weight" and "lm_head.weight" not in state:
            found["lm_head.weight"] = tensor
    if set(names) - set(found):
        raise Unservable("found uninitialized parameters in model: %s" % sorted(set(names) - set(found)))
    return found


def tgi_08_llama_flash(folder: Path, names: Any) -> Tensors:
    """S/models/flash_llama.py@v0.8.2: .bin files; safetensors must be there too (the download step converts otherwise, in
    place)."""
    state = bins_of(folder)
    if not state or not safetensors_of(folder):
        raise Unservable("needs *.bin and *.safetensors")
    return {name: take(state, name) for name in names}


def tgi_bloom(prefixes: Any) -> Callable[[Path, Any], Tensors]:
    """bloom_modeling.py from 0.9.0: the head is the embedding; which prefixes are tried depends on the version."""

    def find(folder: Path, names: Any) -> Tensors:
        state = safetensors_of(folder)
        prefix = next((p for p in prefixes if p + "word_embeddings.weight" in state), prefixes[0])
        inner = {name: take(state, prefix + name[len("transformer.") :]) for name in names if name != "lm_head.weight"}
        return dict(inner, **{"lm_head.weight": inner["transformer.word_embeddings.weight"]})

    return find


def tgi_3_llama(folder: Path, names: Any) -> Tensors:
    """flash_llama_modeling.py:636-651@v3.3.7."""
    state, tied = safetensors_of(folder), config_of(folder).get("tie_word_embeddings", False)
    found = {name: take(state, name) for name in names if name != "lm_head.weight"}
    return dict(found, **{"lm_head.weight": found["model.embed_tokens.weight"] if tied else take(state, "lm_head.weight")})


def vllm_bloom(folder: Path, names: Any) -> Tensors:
    """The prefix is added where it is missing, lm_head.weight is skipped: a head that is not tied stays as it was made."""
    state = safetensors_of(folder)
    found = {
        key if key.startswith("transformer.") else "transformer." + key: t for key, t in state.items() if key != "lm_head.weight"
    }
    if not config_of(folder).get("tie_word_embeddings", True):
        raise Unservable("lm_head.weight keeps its random start")
    return dict({name: take(found, name) for name in names if name != "lm_head.weight"},
                **{"lm_head.weight": found["transformer.word_embeddings.weight"]})  # fmt: skip


SERVERS = {
    ("tgi-0.8", "bloom"): {"0.8.2 sharded": tgi_08_bloom_sharded},
    ("tgi-0.8", "llama"): {"0.8.2 flash": tgi_08_llama_flash},
    ("tgi-3", "bloom"): {
        "0.9.0 to 1.1.0": tgi_bloom([""]),
        "1.1.1 to 2.1.1": tgi_bloom(["", "transformer."]),
        "2.2.0 to 3.3.7": tgi_bloom([""]),
    },
    ("tgi-3", "llama"): {"3.3.7": tgi_3_llama},
    ("vllm", "bloom"): {"main of 2026": vllm_bloom},
    ("vllm", "llama"): {"main of 2026": tgi_3_llama},  # models/llama.py: the same rule
}
