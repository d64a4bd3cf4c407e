"""A folder of layer files and the page that says what is in it. Standard library only.

    layer_000.safetensors ...   the weights of one pipeline layer each; keys are the slot names of ``families``
    optim_000.safetensors ...   training checkpoints only
    config.json, tokenizer ...  whatever a plain HF folder would have beside its weights
    manifest.json               written last: a folder without it is not complete
    node                        only without a shared disk: whose part of the checkpoint this is, see manifest_where

Two kinds: "checkpoint" (fp32 master weights, written by training) and "from-hf" (any dtype, bit-equal to the HF files).
"""

import errno
import hashlib
import json
import os
import re
import stat
from pathlib import Path
from typing import Any, Dict, List, Optional, Set, Union

from . import manifest_values, manifest_where
from .errors import UserError
from .manifest_values import check_keys, check_step, short

FORMAT = manifest_values.FORMAT
NAME = "manifest.json"
MOMENTS = {"adamw": ("exp_avg", "exp_avg_sq"), "lion": ("exp_avg",)}  # what optim_XXX.safetensors holds per parameter
SHA256 = re.compile(r"[0-9a-f]{64}")
# Of a file that is not there, or is not one. Any other reason (no permission, a disk or a server that does not answer) says
# nothing about what the file holds.
NOT_THERE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP)

PathLike = Union[str, Path]


class Unreadable(UserError):
    """A file or folder that cannot be read now. It may be whole, so nothing is put in its place and no older one is taken."""

    def __init__(self, path: PathLike, error: OSError) -> None:
        super().__init__(
            "%s: cannot be read: %s. That does not make the checkpoint broken, so no other is taken instead: make it readable, or "
            "move it away to do without it" % (path, error.strerror or error)
        )


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
    check_keys(document, "manifest.json")
    path = Path(folder) / NAME
    aside = path.with_name(NAME + ".partial")
    with open(str(aside), "w", encoding="utf-8") as file:
        file.write(json.dumps(document, indent=1, sort_keys=True) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(str(aside), str(path))


def read(folder: PathLike) -> Dict[str, Any]:
    """The manifest of a complete folder. Every listed file must be there with its size; hashes are not read. A node's part of a
    checkpoint is complete with the files that the node wrote (manifest_where.require asks for more).

    Raises UserError, one line, when the folder, the manifest or a listed file is missing or of another size, or the manifest
    says what cannot be; Unreadable when it cannot be known whether that is so.
    """
    document = parse(folder)
    elsewhere = _elsewhere(Path(folder), document)
    for name, entry in document["files"].items():
        _check_file(Path(folder) / name, entry, name in elsewhere)
    return document


def parse(folder: PathLike) -> Dict[str, Any]:
    """The manifest alone, whatever else is in the folder. Raises UserError and Unreadable as ``read`` does."""
    path = Path(folder) / NAME
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(
            "%s: no manifest.json, so this is not a complete checkpoint; name a run, one of its checkpoints or a from-hf folder"
            % folder
        ) from None
    except OSError as error:
        raise _trouble(path, error) from None
    except (ValueError, RecursionError) as error:  # RecursionError: JSON nested too deep
        raise UserError("%s: cannot be read (%s); use another checkpoint" % (path, error)) from None
    check_keys(document, str(path))
    check_step(document, Path(folder).name, str(path))
    for name, entry in document["files"].items():
        _check_entry(path, name, entry)
    for layer in range(document["layers"]):
        if layer_file(layer) not in document["files"]:
            raise UserError("%s: lists no %s although the model has %d layers" % (path, layer_file(layer), document["layers"]))
    manifest_where.check(document, str(path))
    return document


def check_hashes(folder: PathLike, document: Optional[Dict[str, Any]] = None, optimizer: bool = True) -> None:
    """Read every file that the manifest lists and compare its sha256; one that only other nodes wrote may be missing.

    ``document``: the manifest, if it was read already; ``optimizer`` False leaves out what only a resumed run reads.
    Raises UserError, one line, naming the first file whose content is not what was written, and what ``read`` raises.
    """
    document = read(folder) if document is None else document
    elsewhere = _elsewhere(Path(folder), document)
    for name, entry in sorted(document["files"].items()):
        path = Path(folder) / name
        if name.startswith("optim_") and not optimizer or name in elsewhere and not os.path.lexists(str(path)):
            continue
        try:
            found = file_entry(path)
        except OSError as error:
            raise _trouble(path, error) from None
        if found["sha256"] != entry.get("sha256"):
            raise UserError(
                "%s: its content is not what was written (its sha256 is not that of manifest.json); use another checkpoint" % path
            )


def check_training(folder: PathLike, document: Dict[str, Any]) -> None:
    """Whether the manifest ``document`` has all that a resumed run reads, and lists every file that training writes.

    Raises UserError, one line, naming what is not so."""
    where = str(Path(folder) / NAME)
    manifest_values.check_training(document, where)
    if "config.json" not in document["files"]:
        raise UserError("%s: lists no config.json, which training writes" % where)
    for layer in range(document["layers"]):
        if optim_file(layer) not in document["files"]:
            raise UserError("%s: lists no %s although the model has %d layers" % (where, optim_file(layer), document["layers"]))


def is_layer_folder(folder: PathLike) -> bool:
    return os.path.isfile(str(Path(folder) / NAME))


def find_checkpoint(path: PathLike, passed_over: Optional[List[str]] = None) -> Path:
    """The layer folder that ``path`` means: itself, or the newest complete checkpoint of a run folder.

    ``passed_over`` collects one line for each newer checkpoint that is not complete. Raises UserError when there is none, or
    when a newer one cannot be read.
    """
    path = Path(path)
    if is_layer_folder(path):
        return path
    if not os.path.exists(str(path)):  # unlike Path.exists, False for a name that is too long
        raise UserError("%s: no such folder; name a run, one of its checkpoints or a from-hf folder" % path)
    parent = path if path.name == "checkpoints" else path / "checkpoints"
    steps = sorted(step_folders(parent), key=_step_of, reverse=True)
    skipped = [] if passed_over is None else passed_over
    for folder in steps:
        try:
            read(folder)
        except Unreadable:
            raise
        except UserError as error:
            skipped.append(str(error))
        else:
            return folder
    if steps:
        raise UserError("%s: no complete checkpoint among %d; the newest: %s" % (parent, len(steps), skipped[-len(steps)]))
    raise UserError("%s: holds no checkpoint (no manifest.json, no checkpoints/step_*)" % path)


def step_folders(parent: Path) -> List[Path]:
    """What is named step_* in ``parent``; nothing when that is not there. Raises Unreadable."""
    try:
        return [parent / name for name in os.listdir(str(parent)) if name.startswith("step_")]
    except OSError as error:
        if error.errno in NOT_THERE:
            return []
        raise Unreadable(parent, error) from None


def _step_of(folder: Path) -> int:
    digits = folder.name[len("step_") :]
    return int(digits) if digits.isdigit() else -1


def _trouble(path: Path, error: OSError) -> UserError:
    if error.errno in NOT_THERE:
        return UserError("%s: cannot be read: %s; use another checkpoint" % (path, error.strerror))
    return Unreadable(path, error)


def _elsewhere(folder: Path, document: Dict[str, Any]) -> Set[str]:
    """Files that only other nodes wrote, so that they may be missing here."""
    try:
        node = manifest_where.node_of(folder, document)
    except OSError as error:
        raise _trouble(folder / manifest_where.NODE, error) from None
    return set() if node is None else {name for name in document["files"] if node not in document["where"]["files"][name]}


def _check_entry(path: Path, name: str, entry: Any) -> None:
    """``path``: the manifest's. A name stays inside its folder."""
    known = entry if isinstance(entry, dict) else {}
    named = name.isprintable() and os.path.basename(name) == name and name not in ("", ".", "..", NAME, manifest_where.NODE)
    sha256 = known.get("sha256")
    if not (named and type(known.get("size")) is int and isinstance(sha256, str) and SHA256.fullmatch(sha256)):
        raise UserError("%s: files: %s is not a file of this folder with a size and a sha256" % (path, short(name)))


def _check_file(path: Path, entry: Dict[str, Any], elsewhere: bool) -> None:
    """``elsewhere``: it may be missing."""
    try:
        found = path.stat()
    except OSError as error:
        if error.errno not in NOT_THERE:
            raise Unreadable(path, error) from None
        if elsewhere:
            return
        raise UserError("%s: missing, although manifest.json lists it; the checkpoint is not complete" % path) from None
    if not stat.S_ISREG(found.st_mode):
        raise UserError("%s: is not a file, although manifest.json lists it; use another checkpoint" % path)
    if found.st_size != entry["size"]:
        raise UserError("%s: has %d bytes, manifest.json says %s; the file was cut off or changed"
                        % (path, found.st_size, short(entry["size"])))  # fmt: skip
