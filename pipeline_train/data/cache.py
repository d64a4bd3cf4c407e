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
from typing import IO, Callable, Iterator, List, Optional, Tuple, Union

from .. import host
from ..errors import UserError

Say = Callable[[str], None]

SMALL = 4 << 20  # bytes of a data file that is encoded in seconds, by one process, and not worth keeping
MOST_BYTES = 64 << 30  # of all that is kept
MOST_S = 30 * 86400.0  # seconds since it was used last
DONE = "facts.json"


def root_of(setting: Union[bool, str], size: int, say: Optional[Say] = None) -> Optional[Path]:
    """Where data of ``size`` bytes is kept, for ``data.cache``: auto, off, or a folder. None: nowhere."""
    auto = setting in ("auto", True)
    if setting in ("off", False) or (auto and size < SMALL):
        return None
    if not auto:
        return Path(str(setting))
    folder = host.cache_folder()
    if folder is None and say is not None:
        say("no home folder is known (set HOME, XDG_CACHE_HOME or data.cache); the encoded data is not kept for other runs")
    return folder / "data" if folder is not None else None


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


def begun(part: Path) -> None:
    """The folder of what is in the making, with files only: what stands there otherwise is not ours, and goes."""
    if part.is_symlink() or not part.is_dir():
        remove(part)
    part.mkdir(exist_ok=True)
    for path in part.iterdir():
        if path.is_symlink() or not path.is_file():
            remove(path)


def remove(path: Path) -> None:
    """A folder with all in it, or a file; nothing there is fine."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(str(path))
        return
    with contextlib.suppress(FileNotFoundError):
        path.unlink()


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
    """Remove what was not used for long, and the least lately used of more than MOST_BYTES; never ``key``. What another process
    moves or removes meanwhile, or what cannot be removed, is left for the next time."""
    found: List[Tuple[float, int, Path]] = []
    with contextlib.suppress(OSError):
        for path in sorted(root.glob("*.lock")):
            with contextlib.suppress(OSError):
                found.append(_measured(path))
    total = 0
    for used, size, path in sorted(found, reverse=True):
        total += size
        if path.stem == key or (total <= MOST_BYTES and time.time() - used <= MOST_S):
            continue
        with contextlib.suppress(OSError):
            file = _lock(path)
            if file is not None:
                with file:
                    for folder in _folders(path):
                        remove(folder)
                    path.unlink()
                total -= size


def _folders(lock: Path) -> List[Path]:
    return [path for path in (lock.with_suffix(""), lock.with_suffix(".part")) if os.path.lexists(str(path))]


def _measured(lock: Path) -> Tuple[float, int, Path]:
    """(when it was used last, bytes, ``lock``)"""
    folders = _folders(lock)
    files = [file for folder in folders for file in (folder.iterdir() if folder.is_dir() else (folder,))]
    return max(path.lstat().st_mtime for path in folders or [lock]), sum(file.lstat().st_size for file in files), lock
