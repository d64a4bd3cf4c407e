"""What an export says about itself: the mark that it is one, and the proof that it is the trained model. Standard library only.

pipedock-export.json    what was exported; --overwrite replaces only folders that have it
*.safetensors           carry the mark in their header, so that it goes wherever the weights go; whoever writes them anew drops it
proof.json              written by ``pipedock verify``: whether it holds, and size and sha256 of every file it was made of
"""

import json
import shlex
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional

from . import manifest, safetensors_header

NAME = "proof.json"
EXPORT = "pipedock-export.json"
MARK = {"pipedock": "export"}  # in the "__metadata__" of a safetensors header
# For people, not for loaders: may change after the proof
FOR_READERS = ("README.md", "*.png", "*.svg", ".gitattributes", ".gitignore")

Say = Callable[[str], None]


def files(folder: Path) -> Dict[str, Any]:
    """Size and sha256 of every file of an export that a loader may read, the proof itself left out."""
    return {name: manifest.file_entry(folder / name) for name in names(folder)}


def names(folder: Path) -> List[str]:
    """Those files, also in folders below."""
    readers = {path for pattern in FOR_READERS for path in folder.glob(pattern)}
    paths = [p for p in sorted(folder.rglob("*")) if p.is_file() and p != folder / NAME and p not in readers]
    return [p.relative_to(folder).as_posix() for p in paths]


def stamps(folder: Path) -> Dict[str, Any]:
    """What changes when one of them is written to: size, time and inode. Raises OSError."""
    found = {name: (folder / name).stat() for name in names(folder)}
    return {name: [stat.st_size, stat.st_mtime_ns, stat.st_ino] for name, stat in found.items()}


def foreign_code(folder: str) -> Optional[str]:
    """A file of Python in a model folder that transformers runs when it loads the model, whether it was told to trust it or not
    (4.57, generation/utils.py, load_custom_generate); None where there is none. ``folder`` may be a hub name."""
    path = Path(folder) / "custom_generate" / "generate.py"
    return str(path) if path.exists() else None


def is_export(folder: Path) -> bool:
    """Whether pipedock wrote the folder's weights: by its page, or by the mark in any of their headers."""
    return (folder / EXPORT).is_file() or any(_marked(path) for path in folder.glob("*.safetensors"))


def objection(folder: Path, say: Say = lambda line: None) -> Optional[str]:
    """Why the folder must not be taken for the trained model, in one line; None when its proof holds for the files as they are, and
    for a folder that never was an export. Reads every file; ``say`` is told so first."""
    path = folder / NAME
    again = "run pipedock verify --checkpoint RUN --export %s" % shlex.quote(str(folder))
    if not path.is_file():
        if is_export(folder):
            return "%s: is an export of pipedock without a proof; %s" % (folder, again)
        return None
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        holds, entries = document["holds"], dict(document["files"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return "%s: unreadable; %s" % (path, again)
    if holds is not True:
        return "%s: says that this export does not equal the trained model; export it again, then %s" % (path, again)
    say("%s: comparing %d files with %s" % (folder, len(entries), NAME))
    changed = _changed(folder, entries)
    return None if changed is None else "%s since it was proved; %s" % (changed, again)


def held(folder: Path) -> Optional[Dict[str, Any]]:
    """The proof, if there is one, it holds, and the files are still those it was made of."""
    if objection(folder) is not None:
        return None
    try:
        document = json.loads((folder / NAME).read_text(encoding="utf-8"))
    except OSError:
        return None
    return document if {"step", "manifest", "checkpoint"} <= set(document) else None


def _changed(folder: Path, entries: Dict[str, Any]) -> Optional[str]:
    """The first file that is not what the proof was made of; sizes are looked at before anything is read."""
    if not entries:
        return "%s: no file is listed there that has not changed" % (folder / NAME)
    for full in (False, True):
        for name, entry in sorted(entries.items()):
            path = folder / name
            try:
                same = manifest.file_entry(path) == entry if full else path.stat().st_size == entry["size"]
            except OSError:
                return "%s: is gone" % path
            except (KeyError, TypeError, ValueError):  # a name that no file can have
                same = False
            if not same:
                return "%s: changed" % path
    for name in names(folder):
        hidden = name.startswith(".") or "/." in name  # what a download leaves; no loader looks
        if name not in entries and not hidden:
            return "%s: was added" % (folder / name)
    return None


def _marked(path: Path) -> bool:
    """Whether the header of a safetensors file has the mark."""
    try:
        header, _ = safetensors_header.read(path)
        return bool(MARK.items() <= header["__metadata__"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return False
