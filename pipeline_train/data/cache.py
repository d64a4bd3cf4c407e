"""Encoded data that is kept: a folder for each key, alone for one process while it is made or used.

    <root>/<key>/          complete: arrays and facts.json        <root>/<key>.part/   in the making (see journal)
    <root>/<key>.lock      held while either is made, read or removed

A run gets its files by hard links where it can, which cost no space, and copies elsewhere; so an entry may go at any time.
"""

import contextlib
import fcntl
import os
import shutil
import time
from pathlib import Path
from typing import IO, Callable, Iterator, Optional, Union

from ..errors import UserError

Say = Callable[[str], None]

SMALL = 4 << 20  # bytes of a data file that is encoded in seconds, by one process, and not worth keeping
MOST_BYTES = 64 << 30  # of all that is kept
MOST_S = 30 * 86400.0  # seconds since it was used last
DONE = "facts.json"


def root_of(setting: Union[bool, str], size: int) -> Optional[Path]:
    """Where data of ``size`` bytes is kept, for ``data.cache``: auto, off, or a folder. None: nowhere."""
    auto = setting in ("auto", True)
    if setting in ("off", False) or (auto and size < SMALL):
        return None
    if not auto:
        return Path(str(setting))
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "pipedock" / "data"


def usable(root: Path, setting: Union[bool, str], say: Optional[Say] = None) -> bool:
    """Makes the folder. One that was asked for and cannot be made is a UserError."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        if os.access(str(root), os.W_OK):
            return True
        why = "is not writable"
    except OSError as error:
        why = error.strerror or str(error)
    if setting not in ("auto", True):
        raise UserError("data.cache: %s: %s" % (root, why))
    if say is not None:
        say("%s: %s; the encoded data is not kept there" % (root, why))
    return False


@contextlib.contextmanager
def alone(root: Path, key: str, say: Say) -> Iterator[Path]:
    """The folder <root>/<key>, which need not be there, while no other process makes, reads or removes it."""
    file = _lock(root / (key + ".lock"), lambda: say("%s: another process is encoding this data; waiting for it" % (root / key)))
    try:
        yield root / key
    finally:
        if file is not None:
            file.close()


def _lock(path: Path, wait: Optional[Callable[[], None]] = None) -> Optional[IO[bytes]]:
    """Held until it is closed. Without ``wait``, which is called before waiting, None when another process holds it."""
    while True:
        file = path.open("ab")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if wait is None:
                file.close()
                return None
            wait()
            fcntl.flock(file, fcntl.LOCK_EX)
        with contextlib.suppress(FileNotFoundError):
            if os.fstat(file.fileno()).st_ino == path.stat().st_ino:
                return file
        file.close()  # removed by the one we waited for


def place(entry: Path, folder: Path, prefix: str, move: bool) -> None:
    """The arrays of an entry under <folder>/<prefix>.<name>: moved, or linked, or copied where no link can be made."""
    for path in sorted(entry.glob("*.npy")):
        target = folder / (prefix + "." + path.name)
        if move:
            os.replace(str(path), str(target))
            continue
        aside = target.with_name(target.name + ".part")
        with contextlib.suppress(FileNotFoundError):
            aside.unlink()
        try:
            os.link(str(path), str(aside))
        except OSError:
            shutil.copyfile(str(path), str(aside))
        os.replace(str(aside), str(target))


def prune(root: Path, key: str) -> None:
    """Remove what was not used for long, and the least lately used of more than MOST_BYTES; never ``key``."""
    found = []
    for path in root.glob("*.lock"):
        folders = [folder for folder in (path.with_suffix(""), path.with_suffix(".part")) if folder.is_dir()]
        size = sum(file.stat().st_size for folder in folders for file in folder.iterdir())
        found.append((max([folder.stat().st_mtime for folder in folders] or [path.stat().st_mtime]), size, path, folders))
    total = 0
    for used, size, path, folders in sorted(found, reverse=True, key=lambda one: one[0]):
        total += size
        if path.stem == key or (total <= MOST_BYTES and time.time() - used <= MOST_S):
            continue
        file = _lock(path)
        if file is not None:
            for folder in folders:
                shutil.rmtree(str(folder), ignore_errors=True)
            path.unlink()
            file.close()
            total -= size
