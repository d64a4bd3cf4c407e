"""How a checkpoint comes to be on disk, and how an old one goes: the order of the steps is what a crash cannot break.

    .tmp-step_000400   being written, or being deleted: never looked at, cleared away by the next save or start
    .old-step_000400   the folder that a new step_000400 takes the place of; put back by the next start if that was cut short
    kept-step_000400-1 whole, but not of what this run has become: never looked at, never deleted
    step_000400        whole

A folder gets its name step_* by one rename, after all its files, its manifest and its directory are on disk. Only when that
rename is on disk too does ``latest`` point at it, and only then does an older one go, which loses its name by one rename as well.

Without a shared disk every node has such a folder. Each of the steps seal, publish and settle is done on every node before the
next one begins anywhere, so that the checkpoint before goes only when the new one is whole everywhere.
"""

import contextlib
import hashlib
import logging
import os
import shutil
from pathlib import Path
from typing import Any, Dict, Iterable, Optional

from . import host, manifest, manifest_where, run_folder
from .config_schema import RunConfig
from .errors import RunFailed, UserError
from .families import FAMILIES, Dims

log = logging.getLogger("pipedock")
BLOCK = 4096  # what a file or a folder may take beyond its bytes
KEPT = "kept-"  # before the name of a checkpoint that another run, or this one before a resume, has left
SLACK = 1 << 20  # manifest, config and the file system's own


def folder(out: Path, step: int) -> Path:
    return out / "checkpoints" / ("step_%06d" % step)


def aside_of(final: Path) -> Path:
    return final.with_name(run_folder.ASIDE + final.name)


def nbytes(dims: Dims, optimizer: str, layers: Optional[Iterable[int]] = None) -> int:
    """Disk space of one checkpoint, or of a node's part with these ``layers``, tokenizer files not counted: fp32 weights and
    moments."""
    kept = list(range(dims.layers) if layers is None else layers)
    values = sum(FAMILIES[dims.family].layer_params(dims, layer) for layer in kept)
    return 4 * values * (1 + len(manifest.MOMENTS[optimizer])) + 2 * BLOCK * len(kept) + SLACK


def check_room(
    run: RunConfig, dims: Dims, where: str, saves: int, say: run_folder.Say, layers: Optional[Iterable[int]] = None,
    resume: Optional[Path] = None,
) -> None:  # fmt: skip
    """Before the work begins: whether the ``saves`` to come fit on the disk of run.out, if need be without those that train.keep
    no longer keeps beside ``resume``. ``layers``: this node's, without a shared disk (scattered.layers_here). Raises UserError when
    not even one does; says so when not as many as train.keep wants."""
    out = Path(run.run.out)
    needed, free = nbytes(dims, run.optim.type, layers), shutil.disk_usage(str(out)).free
    if free < needed and resume is not None:
        prune(resume, run.train.keep)
        free = shutil.disk_usage(str(out)).free
    if free < needed:
        raise UserError("%s: run.out: %s: a checkpoint needs %s, only %s are free on that disk. Make room, or name another folder."
                        % (where, out, host.size(needed), host.size(free)))  # fmt: skip
    there = len(run_folder.checkpoints(out / "checkpoints"))
    more = min(run.train.keep + 1, there + saves) - there  # a new one is written before the oldest goes
    if free < more * needed:
        say("%s: run.out: %s: train.keep: %d takes up to %s more on that disk, only %s are free; a save that does not fit ends "
            "the run" % (where, out, run.train.keep, host.size(more * needed), host.size(free)))  # fmt: skip


def begin(final: Path, needed: int) -> None:
    """Make room and an empty folder aside for ``final``. Raises RunFailed when the disk has not ``needed`` bytes left."""
    aside = aside_of(final)
    try:
        for left in final.parent.glob(run_folder.ASIDE + "*"):
            shutil.rmtree(str(left))
        if not final.parent.exists():
            final.parent.mkdir()
            sync(final.parent.parent)
        aside.mkdir()
        free = shutil.disk_usage(str(aside)).free
        if free < needed:
            aside.rmdir()
            raise RunFailed("%s: a checkpoint needs %s, only %s are free on that disk; make room or lower train.keep. %s"
                            % (final, host.size(needed), host.size(free), left_of(final.parent)))  # fmt: skip
    except OSError as error:
        raise unwritable(aside, final.parent, error) from None


def complete(final: Path, document: Dict[str, Any], beside: Path) -> None:
    """Add copies of the files in ``beside`` and the manifest to the folder aside, and give it its name. Raises OSError."""
    document["files"].update(copy_beside(final, beside))
    seal(final, document)
    publish(final)
    settle(final)


def copy_beside(final: Path, beside: Path) -> Dict[str, Any]:
    """The first step: copies of the files in ``beside``; -> their entries in the manifest."""
    return {path.name: copy(path, aside_of(final) / path.name) for path in sorted(beside.iterdir()) if path.is_file()}


def seal(final: Path, document: Dict[str, Any], node: Optional[int] = None) -> None:
    """The manifest: the folder aside is whole. ``node``: whose part it is."""
    aside = aside_of(final)
    if node is not None:
        (aside / manifest_where.NODE).write_text("%d\n" % node, encoding="utf-8")
        sync(aside / manifest_where.NODE)
    manifest.write(aside, document)
    sync(aside)


def publish(final: Path) -> None:
    """The folder aside gets its name."""
    if final.exists():  # a resume passed it over and has come by again
        shutil.rmtree(str(run_folder.old_of(final)), ignore_errors=True)
        os.replace(str(final), str(run_folder.old_of(final)))
    os.replace(str(aside_of(final)), str(final))
    sync(final.parent)


def settle(final: Path) -> None:
    """``latest`` points at it, and what it has taken the place of goes."""
    parent = final.parent
    (parent / ".latest").write_text(final.name + "\n", encoding="utf-8")
    sync(parent / ".latest")
    os.replace(str(parent / ".latest"), str(parent / "latest"))
    sync(parent)
    shutil.rmtree(str(run_folder.old_of(final)), ignore_errors=True)


def abandon(final: Path) -> None:
    shutil.rmtree(str(aside_of(final)), ignore_errors=True)


def withdraw(final: Path) -> None:
    """Undo ``publish``, as far as it came: another node could not. What was about to be replaced comes back."""
    old = run_folder.old_of(final)
    with contextlib.suppress(OSError):  # a disk that has just failed; the resume asks every node
        if not aside_of(final).exists():
            os.replace(str(final), str(aside_of(final)))
        if old.exists() and not final.exists():
            os.replace(str(old), str(final))
        sync(final.parent)
    abandon(final)


def prune(written: Path, keep: int) -> None:
    """Delete what the run will not go back to: older checkpoints that are broken, all but the ``keep`` newest whole ones, and
    newer broken ones, which the resume passed over. Other names are not touched.

    A newer one that is whole is not this run's to delete: the resume did not see it. It must not be resumed from either, since
    the run went on without it: it gets a name that is not looked at. One that cannot be read is left where it is."""
    step, kept = run_folder.step_of(written), 1
    try:
        others = [found for found in run_folder.checkpoints(written.parent) if found != written]
    except UserError as error:
        log.warning("old checkpoints are not deleted: %s", error)
        return
    for found in others:
        newer = run_folder.step_of(found) > step
        try:
            whole = _whole(found, hashes=newer)
        except manifest.Unreadable as error:
            log.warning("not deleted: %s", error)
            continue
        if whole and not newer and kept < keep:
            kept += 1
            continue
        try:
            if whole and newer:
                _set_aside(found, step)
            else:
                os.replace(str(found), str(aside_of(found)))  # half deleted, it must not look like a checkpoint
                sync(found.parent)
                shutil.rmtree(str(aside_of(found)))
        except OSError as error:
            log.warning("%s: cannot be deleted: %s", found, error.strerror)


def _set_aside(found: Path, step: int) -> None:
    number = 1
    while os.path.lexists(str(found.with_name("%s%s-%d" % (KEPT, found.name, number)))):
        number += 1
    target = found.with_name("%s%s-%d" % (KEPT, found.name, number))
    os.replace(str(found), str(target))
    sync(found.parent)
    log.warning("%s: is whole and newer than step %d, which this run has saved: kept as %s, delete it yourself",
                found, step, target.name)  # fmt: skip


def _whole(found: Path, hashes: bool = False) -> bool:
    """Raises Unreadable."""
    try:
        run_folder.check_whole(found, hashes)
    except manifest.Unreadable:
        raise
    except UserError:
        return False
    return True


def copy(source: Path, target: Path) -> Dict[str, Any]:
    """Copy a file to disk; -> its entry in a manifest."""
    digest, written = hashlib.sha256(), 0
    with open(str(source), "rb") as reading, open(str(target), "wb") as writing:
        for block in iter(lambda: reading.read(1 << 22), b""):
            digest.update(block)
            written += writing.write(block)
        writing.flush()
        os.fsync(writing.fileno())
    return {"size": written, "sha256": digest.hexdigest()}


def sync(path: Path) -> None:
    """Data or directory entries on disk before anything that refers to them."""
    handle = os.open(str(path), os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def unwritable(path: Path, parent: Path, error: OSError) -> RunFailed:
    """``parent``: the folder of checkpoints."""
    return RunFailed("%s: cannot be written: %s. %s" % (path, error.strerror or error, left_of(parent)))


def left_of(parent: Path) -> str:
    """What a run that ends at a save can go on from."""
    try:
        saved = any(_whole(found) for found in run_folder.checkpoints(parent))
    except UserError:  # nor can it be read
        return "Look at that disk."
    return "The last checkpoint is whole." if saved else "Nothing was saved yet."
