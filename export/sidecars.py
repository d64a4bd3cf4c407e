"""Everything beside the weights: config.json, generation config, tokenizer files, chat template. Standard library only."""

import json
import shutil
from pathlib import Path
from typing import Any, Dict, List

from pipeline_train.errors import UserError
from pipeline_train.families import Dims, ModelFamily

PATTERNS = (
    "tokenizer*.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt",
    "generation_config.json", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
TEMPLATE_FOLDER = "additional_chat_templates"  # named templates, as transformers 4.5x writes them
OLD_CLASSES = {"LLaMATokenizer": "LlamaTokenizer"}  # the first converter's name, which no released transformers knows
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
TORCH_NAMES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


def names(folder: Path) -> List[str]:
    """The sidecar files of a folder, but no GGUF that calls itself tokenizer.model: transformers saves the whole 98 MB
    model under that name when the tokenizer came out of one."""
    found = sorted({p.name for pattern in PATTERNS for p in folder.glob(pattern) if p.is_file()})
    return [name for name in found if not (name == "tokenizer.model" and _is_gguf(folder / name))]


def copy(source: Path, target: Path, merges: str = "") -> List[str]:
    """Copy them, byte for byte (but for merges that are to be joined). Returns their names. Raises UserError when one cannot be
    read."""
    copied = names(source)
    try:
        for name in copied:
            if name == "tokenizer.json" and merges:
                (target / name).write_bytes(tokenizer_core(source, merges))
            else:
                shutil.copyfile(str(source / name), str(target / name))
        templates = [p for p in sorted((source / TEMPLATE_FOLDER).glob("*.jinja")) if p.is_file()]
        for path in templates:
            (target / TEMPLATE_FOLDER).mkdir(exist_ok=True)
            shutil.copyfile(str(path), str(target / TEMPLATE_FOLDER / path.name))
    except OSError as error:
        raise UserError("%s: cannot be copied: %s" % (error.filename or source, error.strerror or error)) from None
    return copied


def tokenizer_core(folder: Path, merges: str) -> bytes:
    """tokenizer.json as an export of this folder has it. ``merges``: "joined": pairs written as "a b", which every tokenizers
    reads, and which is all that it reads before 0.20; a token with a blank in it cannot be written so, and raises UserError, or,
    with "joined if possible", leaves the file as it is; "": as it is."""
    path = folder / "tokenizer.json"
    if not merges:
        return path.read_bytes()
    core = read_json(path)
    model = core.get("model")
    pairs = model.get("merges") if isinstance(model, dict) else None
    if not isinstance(pairs, list) or all(isinstance(pair, str) for pair in pairs):
        return path.read_bytes()
    if not all(isinstance(pair, list) and len(pair) == 2 and not any(" " in str(token) for token in pair) for pair in pairs):
        if merges != "joined":
            return path.read_bytes()
        raise UserError("%s: merges tokens with a blank in them, which the tokenizers library of this target cannot read" % path)
    core["model"]["merges"] = [" ".join(pair) for pair in pairs]
    return (json.dumps(core, indent=2, ensure_ascii=False) + "\n").encode("utf-8")


def export_config(config: Dict[str, Any], family: ModelFamily, dims: Dims, dtype: str) -> Dict[str, Any]:
    """config.json of an export: the model's own, with class, tying and dtype ("F32", "BF16", "F16") made true.

    A file of transformers 5 names the rotary base in rope_parameters only; 4 would silently use 10000, so both spellings go in.
    """
    out = dict(config)
    out["architectures"] = [family.architecture]
    out["tie_word_embeddings"] = dims.tied
    out["torch_dtype"] = TORCH_NAMES[dtype]  # the spelling that every version reads
    if "dtype" in out:
        out["dtype"] = TORCH_NAMES[dtype]
    rope = config.get("rope_parameters")
    if rope:
        out["rope_theta"] = dims.rope_theta
        if dims.rope_scaling is not None:
            out["rope_scaling"] = {key: value for key, value in rope.items() if key != "rope_theta"}
    return out


def finish(folder: Path, config: Dict[str, Any]) -> None:
    """Write config.json; a generation config where there is none; mend tokenizer_config.json (template, class name).

    chat_template.jinja is what transformers reads first, tokenizer_config.json all that TGI 3.3 reads: they must agree.
    """
    write_json(folder / "config.json", config)
    if not (folder / "generation_config.json").exists():
        write_json(folder / "generation_config.json", generation_config(folder, config))
    tokenizer = folder / "tokenizer_config.json"
    if tokenizer.exists() and tokenizer_settings(folder) != read_json(tokenizer):
        write_json(tokenizer, tokenizer_settings(folder))


def generation_config(folder: Path, config: Dict[str, Any]) -> Dict[str, Any]:
    """A folder's own generation config, or the one made from config.json where there is none."""
    path = folder / "generation_config.json"
    if path.exists():
        return read_json(path)
    ids = {key: config[key] for key in TOKEN_IDS if config.get(key) is not None}
    return dict(ids, _from_model_config=True)


def tokenizer_settings(folder: Path) -> Dict[str, Any]:
    """tokenizer_config.json as an export of this folder has it: the template that counts, a class that exists."""
    settings = read_json(folder / "tokenizer_config.json")
    jinja = folder / "chat_template.jinja"
    if jinja.exists():
        try:
            settings["chat_template"] = jinja.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise UserError("%s: cannot be read as text: %s" % (jinja, getattr(error, "strerror", None) or "not UTF-8")) from None
    name = settings.get("tokenizer_class")
    if isinstance(name, str) and name in OLD_CLASSES:
        settings["tokenizer_class"] = OLD_CLASSES[name]
    return settings


def read_json(path: Path) -> Dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError("%s: cannot be read: %s" % (path, error)) from None
    if not isinstance(document, dict):
        raise UserError("%s: expected a JSON object" % path)
    return document


def write_json(path: Path, document: Dict[str, Any]) -> None:
    path.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _is_gguf(path: Path) -> bool:
    with open(str(path), "rb") as file:
        return file.read(4) == b"GGUF"
