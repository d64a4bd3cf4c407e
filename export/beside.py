"""Everything of an export but its weights, held against the checkpoint: files, settings, chat template, token ids, strays."""

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any, Dict, List, Optional, Set

from pipeline_train.data.template import TemplateRefused, render
from pipeline_train.weights import Source

from . import sidecars
from .prompts import TEXTS, load_tokenizer

SAME_BYTES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja")
# What some loader would take for the weights, or lay over them
WEIGHTS = ("*.safetensors", "*.bin", "*.index.json", "*.pt", "*.pth", "*.gguf", "*.h5", "*.msgpack", "adapter_config.json")
CHAT = [{"role": "user", "content": "What is 2 + 2?"}, {"role": "assistant", "content": "4"}, {"role": "user", "content": "你好"}]


def strays(target: Source, more: Set[str]) -> List[str]:
    """Weight files that are no part of the export; ``more`` are, besides those that are read."""
    likely = {path.name for pattern in WEIGHTS for path in target.folder.glob(pattern)}
    found = sorted(likely - target.files() - more)
    return ["%s: is no part of the export, and another loader could take it for the weights; remove it" % name for name in found]


def identity(source: Source, target: Source) -> List[str]:
    """config.json: the class to load, and the ids that begin and end a text."""
    failures = []
    said, expected = target.config.get("architectures"), [source.family.architecture]
    if said != expected:
        failures.append("config.json: architectures is %s, expected %s" % (json.dumps(said), json.dumps(expected)))
    for key in sidecars.TOKEN_IDS:
        ours, theirs = (json.dumps(side.config[key]) if key in side.config else "missing" for side in (source, target))
        if ours != theirs:
            failures.append("config.json: %s is %s in the checkpoint, %s in the export" % (key, ours, theirs))
    return failures


def files(source: Source, folder: Path, merges: str) -> List[str]:
    """Tokenizer, template and generation config came along, the vocabulary byte for byte, and nothing was added."""
    ours, theirs = sidecars.names(source.folder), sidecars.names(folder)
    failures = ["%s: missing in the export" % name for name in ours if name not in theirs]
    added = [name for name in theirs if name not in ours and name != "generation_config.json"]
    failures += ["%s: is in the export but not in the checkpoint" % name for name in added]
    for name in sorted(set(ours) & set(theirs)):
        if name in SAME_BYTES:
            core = name == "tokenizer.json"
            ours_are = sidecars.tokenizer_core(source.folder, merges) if core else (source.folder / name).read_bytes()
            if ours_are != (folder / name).read_bytes():
                failures.append("%s: differs from the checkpoint's" % name)
        elif name not in ("tokenizer_config.json", "generation_config.json"):
            failures += _differing(name, sidecars.read_json(source.folder / name), sidecars.read_json(folder / name))
    if "tokenizer_config.json" in ours and "tokenizer_config.json" in theirs:
        settings = sidecars.tokenizer_settings(source.folder), sidecars.read_json(folder / "tokenizer_config.json")
        failures += _differing("tokenizer_config.json", *settings)
    if "generation_config.json" in theirs:
        generation = sidecars.generation_config(source.folder, source.config), sidecars.read_json(folder / "generation_config.json")
        failures += _differing("generation_config.json", *generation)
    elif "generation_config.json" not in ours:
        failures.append("generation_config.json: missing in the export")
    if _templates(source.folder) != _templates(folder):
        failures.append("%s: differs from the checkpoint's" % sidecars.TEMPLATE_FOLDER)
    return failures


def tokenization(source: Path, folder: Path, texts: Optional[List[str]]) -> List[str]:
    """Both folders' tokenizers give the same ids, for texts and for a chat prompt, and know the same special tokens.

    ``source``: the checkpoint's folder. Raises RunFailed when a tokenizer does not load.
    """
    if not any(name.startswith("tokenizer") for name in sidecars.names(folder)):
        return []
    theirs = load_tokenizer(folder, "the export")
    with tempfile.TemporaryDirectory() as mended:
        ours = load_tokenizer(_loadable(source, Path(mended)), "the checkpoint")
    known = [{key: getattr(t, key) for key in sidecars.TOKEN_IDS} for t in (ours, theirs)]
    for side, tokenizer in zip(known, (ours, theirs)):
        side["all_special_ids"] = sorted(tokenizer.all_special_ids)
    failures = [
        "tokenizer: %s is %s in the checkpoint, %s in the export" % (key, a, known[1][key])
        for key, a in known[0].items()
        if a != known[1][key]
    ]
    special = "".join("a%s b" % token for token in ours.all_special_tokens)
    chats = [_chat(source, ours), _chat(folder, theirs)]
    if chats[0] != chats[1]:
        failures.append("chat template: renders another prompt in the export: %.60r, not %.60r" % (chats[1], chats[0]))
    for text in list(TEXTS if texts is None else texts) + [special] + [chat for chat in chats[:1] if chat is not None]:
        for added in (True, False):
            a, b = (list(t(text, add_special_tokens=added)["input_ids"]) for t in (ours, theirs))
            if a != b:
                failures.append("tokenizer: %.40r gives %s in the checkpoint, %s in the export" % (text, a[:8], b[:8]))
                return failures
    return failures


def _differing(name: str, ours: Dict[str, Any], theirs: Dict[str, Any]) -> List[str]:
    missing = object()
    keys = sorted(key for key in set(ours) | set(theirs) if ours.get(key, missing) != theirs.get(key, missing))
    return ["%s: differs from the checkpoint's: %s" % (name, ", ".join(keys[:5]))] if keys else []


def _templates(folder: Path) -> Dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / sidecars.TEMPLATE_FOLDER).glob("*") if path.is_file()}


def _loadable(folder: Path, mended: Path) -> Path:
    """The folder itself, or its tokenizer files under a class name that exists."""
    path = folder / "tokenizer_config.json"
    if not path.exists() or sidecars.read_json(path).get("tokenizer_class") not in sidecars.OLD_CLASSES:
        return folder
    sidecars.copy(folder, mended)
    shutil.copyfile(str(folder / "config.json"), str(mended / "config.json"))
    sidecars.write_json(mended / path.name, sidecars.tokenizer_settings(folder))
    return mended


def _chat(folder: Path, tokenizer: Any) -> Optional[str]:
    """A conversation through the folder's chat template; None without a template, or one that refuses it."""
    jinja, settings = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    template: Any = None
    if jinja.exists():
        template = jinja.read_text(encoding="utf-8")
    elif settings.exists():
        template = sidecars.read_json(settings).get("chat_template")
    if not isinstance(template, str):
        return None
    tokens = {name: str(token) for name, token in tokenizer.special_tokens_map.items() if not isinstance(token, list)}
    try:
        return render(template, CHAT, True, tokens)
    except TemplateRefused:
        return None
