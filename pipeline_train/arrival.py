"""Files of a checkpoint that come from other nodes: what is lacking, and how one is written. Standard library only.

.gather-<file>            in a checkpoint's folder: a file on its way; it gets its name when its size and sha256 are right
.gather-rsync/            in a checkpoint's folder: files that rsync brings
.gather-step_000400/      beside checkpoints: one that this node has lost, until all its files are here
"""

import contextlib
import hashlib
import os
import shutil
import stat
from pathlib import Path
from typing import Any, Dict, List

from . import host
from .errors import RunFailed

ASIDE = ".gather-"
PIECE = 1 << 22  # bytes read and hashed at once


def lacking(folder: Path, document: Dict[str, Any], optimizer: bool = True) -> List[str]:
    """The listed files that are not in the folder with their size, in order; without ``optimizer`` only what an export reads."""
    return [name for name, entry in sorted(document["files"].items())
            if (optimizer or not name.startswith("optim_")) and not _has(folder / name, entry["size"])]  # fmt: skip


def _has(path: Path, size: int) -> bool:
    try:
        found = os.lstat(str(path))
    except OSError:
        return False
    return stat.S_ISREG(found.st_mode) and found.st_size == size


def check_room(folder: Path, document: Dict[str, Any], names: List[str]) -> None:
    """Whether these files fit on the disk. Raises RunFailed."""
    needed = sum(document["files"][name]["size"] for name in names)
    try:
        free = shutil.disk_usage(str(folder)).free
    except OSError as error:
        raise unwritable(folder, error) from None
    if free < needed:
        raise RunFailed("%s: the missing files need %s, only %s are free on that disk; make room"
                        % (folder, host.size(needed), host.size(free)))  # fmt: skip


class Arrival:
    """A file that is written from the front, then accepted or refused. ``entry``: its size and sha256 in the manifest."""

    def __init__(self, folder: Path, name: str, entry: Dict[str, Any]) -> None:
        self.path, self.aside, self.entry = folder / name, folder / (ASIDE + name), entry
        self.digest, self.written = hashlib.sha256(), 0
        try:
            with contextlib.suppress(FileNotFoundError):  # of a time before, whatever it is
                self.aside.unlink()
            self.file = open(str(self.aside), "xb")
        except OSError as error:
            raise unwritable(self.aside, error) from None

    def write(self, data: bytes) -> None:
        """Raises RunFailed when the disk does not take it, or when it is longer than the manifest says."""
        self.written += len(data)
        self.digest.update(data)
        try:
            if self.written <= self.entry["size"]:
                self.file.write(data)
        except OSError as error:
            self.drop()
            raise unwritable(self.aside, error) from None

    def accept(self, sender: str) -> None:
        """All has come: give it its name. Raises RunFailed when it is not the file that was saved."""
        if {"size": self.written, "sha256": self.digest.hexdigest()} != {key: self.entry[key] for key in ("size", "sha256")}:
            self.drop()
            raise refused(self.path, sender)
        try:
            with self.file:
                self.file.flush()
                os.fsync(self.file.fileno())
            os.replace(str(self.aside), str(self.path))
        except OSError as error:
            self.drop()
            raise unwritable(self.path, error) from None

    def drop(self) -> None:
        with contextlib.suppress(OSError):
            self.file.close()
        with contextlib.suppress(OSError):
            self.aside.unlink()


def refused(path: Path, sender: str) -> RunFailed:
    return RunFailed("%s: what came from %s is not what was saved (its size or sha256 is not that of manifest.json); is its disk "
                     "or the network damaged? If it stays so, name an older checkpoint" % (path, sender))  # fmt: skip


def unwritable(path: Path, error: OSError) -> RunFailed:
    return RunFailed("%s: cannot be written: %s" % (path, error.strerror or error))
