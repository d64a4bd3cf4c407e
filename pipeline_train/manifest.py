"""A folder of layer files and the page that says what is in it. Standard library only.

    layer_000.safetensors ...   the weights of one pipeline layer each; keys are the slot names of ``families``
    optim_000.safetensors ...   training checkpoints only
    config.json, tokenizer ...  whatever a plain HF folder would have beside its weights
    manifest.json               written last: a folder without it is not complete

Two kinds: "checkpoint" (fp32 master weights, written by training) and "from-hf" (any dtype, bit-equal to the HF files).
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any, Dict, List, Optional, Union

from .errors import UserError

FORMAT = "pipedock-layers/1"
KINDS = ("checkpoint", "from-hf")
DTYPES = ("fp32", "bf16", "fp16")
NAME = "manifest.json"
MOMENTS = {"adamw": ("exp_avg", "exp_avg_sq"), "lion": ("exp_avg",)}  # what optim_XXX.safetensors holds per parameter

# key -> what it must be; "step" and "run_name" are None in a from-hf folder
KEYS: Dict[str, Any] = {
    "format": str, "kind": str, "family": str, "run_dtype": str, "layer_dtype": str, "tied": bool, "layers": int,
    "step": (int, type(None)), "files": dict, "versions": dict, "run_name": (str, type(None)),
}  # fmt: skip
# A checkpoint also has "training": what only a resumed run reads

PathLike = Union[str, Path]


def layer_file(layer: int) -> str:
    """The file of pipeline layer ``layer`` (0 = embed, 1..L = blocks, L+1 = norm + head)."""
    return "layer_%03d.safetensors" % layer


def optim_file(layer: int) -> str:
    """The optimizer state of the same layer, in training checkpoints."""
    return "optim_%03d.safetensors" % layer


def file_entry(path: PathLike) -> Dict[str, Any]:
    """{"size", "sha256"} of a file, as the manifest lists it."""
    digest = hashlib.sha256()
    with open(str(path), "rb") as file:
        for block in iter(lambda: file.read(1 << 22), b""):
            digest.update(block)
    return {"size": os.path.getsize(str(path)), "sha256": digest.hexdigest()}


def write(folder: PathLike, document: Dict[str, Any]) -> None:
    """Write ``<folder>/manifest.json`` (aside, fsynced, renamed). The last thing a writer does: it makes the folder complete."""
    _check_keys(document, "manifest.json")
    path = Path(folder) / NAME
    aside = path.with_name(NAME + ".partial")
    with open(str(aside), "w", encoding="utf-8") as file:
        file.write(json.dumps(document, indent=1, sort_keys=True) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(str(aside), str(path))


def read(folder: PathLike) -> Dict[str, Any]:
    """The manifest of a complete folder. Every listed file must be there with its size; hashes are not read.

    Raises UserError, one line, when the folder, the manifest or a listed file is missing, unreadable or of another size.
    """
    path = Path(folder) / NAME
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(
            "%s: no manifest.json, so this is not a complete checkpoint; name a run, one of its checkpoints or a from-hf folder"
            % folder
        ) from None
    except (OSError, ValueError, RecursionError) as error:  # RecursionError: JSON nested too deep
        raise UserError("%s: cannot be read (%s); use another checkpoint" % (path, error)) from None
    _check_keys(document, str(path))
    for name, entry in document["files"].items():
        _check_file(Path(folder), name, entry)
    for layer in range(document["layers"]):
        if layer_file(layer) not in document["files"]:
            raise UserError("%s: lists no %s although the model has %d layers" % (path, layer_file(layer), document["layers"]))
    return document


def check_hashes(folder: PathLike, document: Optional[Dict[str, Any]] = None, optimizer: bool = True) -> None:
    """Read every file that the manifest lists and compare its sha256.

    ``document``: the manifest, if it was read already; ``optimizer`` False leaves out what only a resumed run reads.
    Raises UserError, one line, naming the first file whose content is not what was written, and what ``read`` raises.
    """
    document = read(folder) if document is None else document
    for name, entry in sorted(document["files"].items()):
        if name.startswith("optim_") and not optimizer:
            continue
        path = Path(folder) / name
        try:
            found = file_entry(path)
        except OSError as error:
            raise UserError("%s: cannot be read: %s; use another checkpoint" % (path, error.strerror)) from None
        if found["sha256"] != entry.get("sha256"):
            raise UserError(
                "%s: its content is not what was written (its sha256 is not that of manifest.json); use another checkpoint" % path
            )


def is_layer_folder(folder: PathLike) -> bool:
    return os.path.isfile(str(Path(folder) / NAME))


def find_checkpoint(path: PathLike, passed_over: Optional[List[str]] = None) -> Path:
    """The layer folder that ``path`` means: itself, or the newest complete checkpoint of a run folder.

    ``passed_over`` collects one line for each newer checkpoint that is not complete. Raises UserError when there is none.
    """
    path = Path(path)
    if is_layer_folder(path):
        return path
    if not os.path.exists(str(path)):  # unlike Path.exists, False for a name that is too long
        raise UserError("%s: no such folder; name a run, one of its checkpoints or a from-hf folder" % path)
    parent = path if path.name == "checkpoints" else path / "checkpoints"
    steps = sorted(parent.glob("step_*"), key=_step_of, reverse=True)
    skipped = [] if passed_over is None else passed_over
    for folder in steps:
        try:
            read(folder)
        except UserError as error:
            skipped.append(str(error))
        else:
            return folder
    if steps:
        raise UserError("%s: no complete checkpoint among %d; the newest: %s" % (parent, len(steps), skipped[-len(steps)]))
    raise UserError("%s: holds no checkpoint (no manifest.json, no checkpoints/step_*)" % path)


def _step_of(folder: Path) -> int:
    digits = folder.name[len("step_") :]
    return int(digits) if digits.isdigit() else -1


def _check_keys(document: Any, where: str) -> None:
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        found = document.get("format") if isinstance(document, dict) else type(document).__name__
        raise UserError("%s: expected format %s, found %s; it was written by another version or program" % (where, FORMAT, found))
    for key, kind in KEYS.items():
        if key not in document or not isinstance(document[key], kind):
            raise UserError("%s: %s: missing or not what it should be (%r)" % (where, key, document.get(key)))
    if document["kind"] == "checkpoint" and not isinstance(document.get("training"), dict):
        raise UserError("%s: training: missing or not what it should be (%r)" % (where, document.get("training")))
    if document["kind"] not in KINDS:
        raise UserError("%s: kind: expected one of %s, found %r" % (where, ", ".join(KINDS), document["kind"]))
    if document["run_dtype"] not in DTYPES:
        raise UserError("%s: run_dtype: expected one of %s, found %r" % (where, ", ".join(DTYPES), document["run_dtype"]))


def _check_file(folder: Path, name: str, entry: Any) -> None:
    path = folder / name
    if os.path.basename(name) != name or not isinstance(entry, dict) or not isinstance(entry.get("size"), int):
        raise UserError("%s: files: %r is not a file of this folder with a size" % (folder / NAME, name))
    try:
        size = path.stat().st_size
    except (OSError, ValueError):  # ValueError: a NUL in the name
        raise UserError("%s: missing, although manifest.json lists it; the checkpoint is not complete" % path) from None
    if size != entry["size"]:
        raise UserError("%s: has %d bytes, manifest.json says %d; the file was cut off or changed" % (path, size, entry["size"]))
