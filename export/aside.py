"""An output folder that appears whole or not at all: written as ``.<name>.partial`` beside its place, then renamed."""

import contextlib
import errno
import fcntl
import json
import os
import shutil
from pathlib import Path
from typing import Any, Dict, Iterable, Iterator

from pipeline_train.errors import RunFailed, UserError
from pipeline_train.proof import EXPORT


@contextlib.contextmanager
def output_folder(output: str, needed: int, overwrite: bool = False, apart_from: Iterable[str] = ()) -> Iterator[Path]:
    """Yield an empty folder that becomes ``output`` at the end; an error leaves nothing behind.

    ``needed``: bytes that will be written, checked against the free space. Raises UserError when ``output`` is there and not
    empty (``overwrite`` replaces an export of ours) or cannot be made, RunFailed when writing fails.
    """
    begin(output, needed, overwrite, apart_from)
    with published(output) as partial:
        yield partial


def begin(output: str, needed: int, overwrite: bool = False, apart_from: Iterable[str] = ()) -> Path:
    """Make the empty folder that ``published`` takes. Raises UserError, see ``output_folder`` and ``check_free``."""
    check_free(output, overwrite, apart_from)
    partial, final = partial_of(output), _final(output)
    try:
        partial.parent.mkdir(parents=True, exist_ok=True)
        _claim(partial, output)
        if _old_of(final).exists() and not os.path.lexists(str(final)):  # killed between the two names of _replace
            os.replace(str(_old_of(final)), str(final))
            check_free(output, overwrite)
        check_room(output, needed)
    except (UserError, OSError) as error:
        abandon(output)
        if isinstance(error, UserError):
            raise
        raise UserError("%s: cannot be made: %s: %s" % (output, error.filename or partial, error.strerror or error)) from None
    return partial


@contextlib.contextmanager
def published(output: str) -> Iterator[Path]:
    """The folder that ``begin`` made becomes ``output`` at the end, when all its files are on the disk; an error removes it. Raises
    RunFailed when writing fails."""
    partial = partial_of(output)
    try:
        yield partial
        _sync(partial)
        _replace(partial, _final(output))
    except OSError as error:
        raise RunFailed("%s: writing failed: %s" % (output, error.strerror or error)) from None
    finally:
        abandon(output)


def abandon(output: str) -> None:
    """Nothing of an export that is not done stays; what another process is writing does. May be called when there is none."""
    partial = partial_of(output)
    mine = _CLAIMED.pop(str(partial), None)
    try:
        number = _lock(partial) if mine is None else mine
    except OSError:
        return
    if mine is None or _is(number, partial):  # not renamed: that is the export
        shutil.rmtree(str(partial), ignore_errors=True)
    os.close(number)


_CLAIMED: Dict[str, int] = {}  # folders that this process writes, by path: a descriptor that holds the lock


def _claim(partial: Path, output: str) -> None:
    """Make the folder, or take over and empty what a killed process has left; only one process has it at a time, for as long as it
    lives. Raises UserError when another one does, OSError."""
    while True:
        with contextlib.suppress(FileExistsError):
            partial.mkdir()
        try:
            number = _lock(partial)
        except FileNotFoundError:  # removed in the meantime
            continue
        except BlockingIOError:
            raise UserError("%s: another pipedock is writing it; wait for its end, or name another folder" % output) from None
        if _is(number, partial):
            break
        os.close(number)
    _CLAIMED[str(partial)] = number
    for path in partial.iterdir():
        shutil.rmtree(str(path)) if path.is_dir() and not path.is_symlink() else path.unlink()


def _lock(folder: Path) -> int:
    """A descriptor that locks the folder until it is closed. Raises BlockingIOError when another process does, OSError. Some
    network file systems know no locks: there nobody is kept out."""
    number = os.open(str(folder), os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            os.close(number)
            raise BlockingIOError(error.errno, error.strerror, str(folder)) from None
    return number


def _is(number: int, folder: Path) -> bool:
    """Is that descriptor the folder that has this name now?"""
    try:
        return os.path.samestat(os.fstat(number), os.stat(str(folder)))
    except FileNotFoundError:
        return False


def _final(output: str) -> Path:
    """A link to a folder stays one: what it points to is replaced."""
    return Path(os.path.realpath(output))


def partial_of(output: str) -> Path:
    final = _final(output)
    return final.parent / (".%s.partial" % final.name)


def write_marker(folder: Path, document: Dict[str, Any]) -> None:
    (folder / EXPORT).write_text(json.dumps(document, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def check_free(output: str, overwrite: bool = False, apart_from: Iterable[str] = ()) -> None:
    """Raise UserError unless ``output`` can be written: absent, empty, or with ``overwrite`` an export of ours.

    ``apart_from``: paths that ``output`` may neither be, nor lie in, nor hold.
    """
    final = _final(output)
    for other in apart_from:
        _check_apart(output, os.path.realpath(str(final)), other)
    _check_parent(output, final)
    if not os.path.lexists(str(final)):
        return
    if not final.is_dir():
        raise UserError("%s: exists and is not a folder; name another one" % output)
    try:
        empty = not any(final.iterdir())
    except OSError as error:
        raise UserError("%s: cannot be read: %s" % (output, error.strerror)) from None
    if empty:
        return
    if not overwrite:
        raise UserError("%s: exists and is not empty; name another folder or remove it" % output)
    if not (final / EXPORT).is_file():
        raise UserError("%s: is not an export of pipedock (no %s), so --overwrite leaves it alone" % (output, EXPORT))


def check_room(output: str, needed: int) -> None:
    """Raise UserError unless that many bytes are free where ``output`` will be."""
    folder = _final(output)
    while not folder.is_dir():
        folder = folder.parent
    free = shutil.disk_usage(str(folder)).free
    if free < needed:
        raise UserError("%s: needs %s, only %s are free there; make room, or name a folder of another disk"
                        % (output, _size(needed), _size(free)))  # fmt: skip


def _check_apart(output: str, real: str, other: str) -> None:
    theirs = os.path.realpath(other)
    if real == theirs:
        raise UserError("%s: is %s itself; name a folder of its own for the export" % (output, other))
    if real.startswith(os.path.join(theirs, "")):
        raise UserError("%s: lies inside %s; name a folder of its own for the export" % (output, other))
    if theirs.startswith(os.path.join(real, "")):
        raise UserError("%s: holds %s; name a folder of its own for the export" % (output, other))


def _check_parent(output: str, final: Path) -> None:
    """The folder can be made: each missing name is short enough, and the nearest folder that exists takes new files."""
    missing = [".%s.partial" % final.name]
    parent = final.parent
    while not os.path.lexists(str(parent)):
        missing.append(parent.name)
        parent = parent.parent
    if not os.path.isdir(str(parent)):
        raise UserError("%s: cannot be made: %s is not a folder" % (output, parent))
    if not os.access(str(parent), os.W_OK | os.X_OK):
        raise UserError("%s: cannot be made: no permission to write in %s" % (output, parent))
    if max(len(os.fsencode(name)) for name in missing) > os.pathconf(str(parent), "PC_NAME_MAX"):
        raise UserError("%s: cannot be made: its name is too long" % output)


def _size(nbytes: int) -> str:
    return "%.2f GiB" % (nbytes / 2**30) if nbytes >= 2**30 else "%.2f MiB" % (nbytes / 2**20)


def _sync(folder: Path) -> None:
    """Everything in a folder is on the disk: its name must not survive a power cut that its files do not."""
    for path in [p for p in folder.rglob("*") if p.is_file() or p.is_dir()] + [folder]:
        _sync_one(path)


def _sync_one(path: Path) -> None:
    number = os.open(str(path), os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def _old_of(final: Path) -> Path:
    return final.parent / (".%s.old" % final.name)


def _replace(partial: Path, final: Path) -> None:
    old = _old_of(final)
    shutil.rmtree(str(old), ignore_errors=True)
    if final.exists():
        os.replace(str(final), str(old))
    os.replace(str(partial), str(final))
    _sync_one(final.parent)
    shutil.rmtree(str(old), ignore_errors=True)
