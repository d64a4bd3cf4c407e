"""What lies in a model folder: names of files, of the tensors in them, bytes. Standard library only."""

import json
import os
import shlex
from typing import Any, Dict, FrozenSet, Iterable, List, Optional, Tuple

from pipeline_train import families
from pipeline_train.errors import UserError

from . import tensors
from .question import Files

EMBEDDINGS = ("word_embeddings.weight", "transformer.word_embeddings.weight")  # bloom's, where a head of its own is a question


def look(model_dir: str) -> Tuple[Dict[str, Any], Files, int]:
    """-> (config.json, what there is, bytes of the weights). Reads headers, and both tensors of a bloom that has a head beside its
    embedding. Raises UserError when it is no model folder or cannot be read."""
    names = listed(model_dir)
    config, plain = families.read_config(model_dir), Files(names)
    wholes = plain.ending(".safetensors")
    spans = [tensors.of_safetensors(os.path.join(model_dir, name)) for name in wholes]
    missing = tuple(_missing(model_dir, names))
    bins = [tensors.of_bin(os.path.join(model_dir, name)) for name in plain.ending(".bin")]
    files = Files(
        names,
        _union(spans),
        _union(bins),
        missing,
        tuple(name for name, found in zip(wholes, spans) if found is None and name not in missing),
        _same_head(spans),
        _merge_pairs(os.path.join(model_dir, "tokenizer.json")),
        _chat_template(model_dir, names),
    )
    return config, files, sum(_size(os.path.join(model_dir, name)) for name in wholes or plain.ending(".bin"))


def listed(model_dir: str) -> Tuple[str, ...]:
    """The names in a model folder. Raises UserError when it is none, cannot be read, or holds the pipeline's own weights."""
    if not os.path.isdir(model_dir):
        raise UserError("--model %s: no such folder" % model_dir)
    try:
        names = tuple(sorted(os.listdir(model_dir)))
    except OSError as error:
        raise UserError("--model %s: cannot be read: %s" % (model_dir, error.strerror)) from None
    exported = any(name.startswith("model") and name.endswith(".safetensors") for name in names)
    if not exported and ("manifest.json" in names or "checkpoints" in names):
        quoted = shlex.quote(model_dir)
        raise UserError(
            "--model %s: pipeline weights; export them first: pipedock to-hf --input %s --output DIR" % (model_dir, quoted)
        )
    return names


def _union(parts: List[Any]) -> Optional[FrozenSet[str]]:
    """All names, None when those of one file are not known."""
    if not parts or any(part is None for part in parts):
        return None
    return frozenset(name for part in parts for name in part)


def _size(path: str) -> int:
    try:
        return os.path.getsize(path)
    except OSError:
        return 0


def _missing(folder: str, names: Tuple[str, ...]) -> Iterable[str]:
    """Weights that an index names and that are not there, and links whose file is gone."""
    for name in names:
        if name.endswith((".safetensors", ".bin")) and not os.path.exists(os.path.join(folder, name)):
            yield name
    for index in names:
        if index.endswith(".index.json"):
            listed = (_json(os.path.join(folder, index)) or {}).get("weight_map")
            for name in sorted({str(file) for file in listed.values()} if isinstance(listed, dict) else ()):
                if name not in names:
                    yield name


def _same_head(spans: List[Optional[Dict[str, "tensors.Span"]]]) -> Optional[bool]:
    found = {name: span for part in spans if part is not None for name, span in part.items()}
    embedding = next((found[name] for name in EMBEDDINGS if name in found), None)
    if embedding is None or "lm_head.weight" not in found:
        return None
    return tensors.same_bytes(embedding, found["lm_head.weight"])


def _merge_pairs(path: str) -> bool:
    """Whether a byte-pair tokenizer's merges are lists, as tokenizers writes them since 0.20, and not "a b"."""
    model = (_json(path) or {}).get("model")
    merges = model.get("merges") if isinstance(model, dict) else None
    return isinstance(merges, list) and bool(merges) and isinstance(merges[0], list)


def _chat_template(folder: str, names: Tuple[str, ...]) -> str:
    """See Files.chat_template. TGI 3.3's order: tokenizer_config.json, chat_template.json, processor_config.json."""
    for name in ("tokenizer_config.json", "chat_template.json", "processor_config.json"):
        if name in names and (_json(os.path.join(folder, name)) or {}).get("chat_template"):
            return "read"
    return "jinja" if "chat_template.jinja" in names else ""


def _json(path: str) -> Optional[Dict[str, Any]]:
    """A JSON object; None when there is none, or none that can be read: the server will say what it thinks of it."""
    try:
        with open(path, encoding="utf-8") as file:
            found = json.load(file)
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None
