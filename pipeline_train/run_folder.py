"""Whose run a folder is: its lock, the checkpoint to go on from, and whether it is still the same run."""

import contextlib
import errno
import fcntl
import os
import shutil
from dataclasses import fields
from pathlib import Path
from typing import IO, Any, Callable, Dict, List, Optional, Tuple

import msgspec
import yaml

from . import families, manifest, manifest_values, metrics
from .config_schema import RunConfig
from .errors import UserError
from .families import Dims

Say = Callable[[str], None]  # takes a line for the user

_locks: Dict[str, IO[str]] = {}  # open until this process ends: closing the file gives the lock up
OURS = {".lock", "metrics.jsonl", "resolved", "checkpoints"}  # any of these makes a folder a run's
ASIDE, OLD = ".tmp-", ".old-"  # see checkpoint_folder
PROBE = ASIDE + "probe"
FRESH = "Start it with --resume auto, or give run.out another folder."


def take(out: Path, where: str, say: Say) -> None:
    """Make ``out`` this process's alone until it ends, and clear away a save that was cut short. ``where`` names run.yaml.

    Raises UserError for a folder that cannot be made or that another train is using."""
    try:
        names = {path.name for path in out.iterdir()} if out.is_dir() else set()
        if names and not names & OURS:
            raise UserError("%s: run.out: %s: holds other files (%s); give the run a folder of its own"
                            % (where, out, ", ".join(sorted(names)[:3])))  # fmt: skip
        out.mkdir(parents=True, exist_ok=True)
        before = _locks.pop(str(out.resolve()), None)
        if before is not None:
            before.close()
        file = open(str(out / ".lock"), "a+", encoding="ascii")  # not "w": that would erase the holder's number
    except OSError as error:
        raise UserError("%s: run.out: %s: cannot be made: %s" % (where, out, error.strerror)) from None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.seek(0)
        holder = file.read().strip() or "unknown"
        file.close()
        if error.errno in (errno.EAGAIN, errno.EACCES):
            raise UserError(
                "%s: another pipedock train (pid %s) is using this folder. Wait for it, or give run.out another one."
                % (out, holder)
            ) from None
        say("%s: cannot be locked (%s); do not start a second train on it" % (out, error.strerror))
    else:
        _locks[str(out.resolve())] = file
        file.truncate(0)
        file.write("%d\n" % os.getpid())
        file.flush()
    try:
        _clear(out / "checkpoints")
        _check_writable(out)
    except OSError as error:
        raise UserError("%s: run.out: %s: cannot be written: %s" % (where, error.filename or out, error.strerror)) from None


def _check_writable(out: Path) -> None:
    """What training writes into only later: better now than at the first save. Raises OSError."""
    for parent in (out, out / "checkpoints"):
        if parent == out or os.path.lexists(str(parent)):
            (parent / PROBE).mkdir(exist_ok=True)  # a start that was killed here has left it
            (parent / PROBE).rmdir()
    if os.path.lexists(str(out / "metrics.jsonl")):
        with open(str(out / "metrics.jsonl"), "ab"):
            pass


def _clear(parent: Path) -> None:
    """Delete what a save that was cut short has left, and put back the folder it was about to replace."""
    for left in parent.glob(OLD + "*"):
        place = parent / left.name[len(OLD) :]
        if place.exists():
            shutil.rmtree(str(left), ignore_errors=True)
        else:
            with contextlib.suppress(OSError):  # then an older checkpoint is the newest
                os.replace(str(left), str(place))
    for left in parent.glob(ASIDE + "*"):
        shutil.rmtree(str(left), ignore_errors=True)


def old_of(checkpoint: Path) -> Path:
    """Where a checkpoint goes while another one takes its place."""
    return checkpoint.with_name(OLD + checkpoint.name)


def checkpoints(parent: Path) -> List[Path]:
    """The step_<number> folders in <out>/checkpoints, newest first; whether they are whole is not looked at. Raises UserError
    when that cannot be read."""
    try:
        found = [path for path in manifest.step_folders(parent) if manifest_values.STEP.fullmatch(path.name) and path.is_dir()]
    except OSError as error:
        raise manifest.Unreadable(parent, error) from None
    return sorted(found, key=step_of, reverse=True)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name[len("step_") :])


def find(out: Path, resume: Optional[str], say: Say) -> Optional[Path]:
    """The checkpoint to resume from: the newest whose files all have the size and the hash their manifest says. Of nodes without a
    shared disk each has its own: see scattered.find_together.

    Raises UserError for a used folder without --resume, or --resume without a checkpoint; also when checkpoints that metrics.jsonl
    tells of are gone, and when one cannot be read: it may be the newest."""
    saved = used(out, resume)
    if not saved and resume == "newest":
        raise UserError("%s: --resume: no checkpoint to continue from. %s" % (out, FRESH))
    for folder in saved:
        try:
            check_whole(folder)
        except manifest.Unreadable:
            raise
        except UserError as error:
            say("passed over: %s" % error)
        else:
            return folder
    if saved:
        raise UserError("%s: --resume: none of its %d checkpoints is whole. Give run.out another folder." % (out, len(saved)))
    return None


def used(out: Path, resume: Optional[str]) -> List[Path]:
    """The folders among which a resume may choose, newest first. Raises UserError for a used folder without --resume, and when none
    is there although metrics.jsonl tells of some."""
    started = (out / "metrics.jsonl").exists() and (out / "metrics.jsonl").stat().st_size > 0
    saved = checkpoints(out / "checkpoints")
    if resume is None and saved:
        raise UserError("%s: already holds a run. Continue it with --resume, or give run.out another folder." % out)
    if resume is None and started:
        raise UserError("%s: already holds a run, which has saved no checkpoint. %s" % (out, FRESH))
    if resume is not None and not saved:
        _check_never_saved(out)
    return saved


def whole_steps(out: Path) -> List[Tuple[int, str]]:
    """The steps of the checkpoints that are whole here by their sizes, newest first, each with the sha256 of its manifest. Hashes
    of files are not read. Raises Unreadable."""
    found = []
    for folder in checkpoints(out / "checkpoints"):
        try:
            check_whole(folder, hashes=False)
            found.append((step_of(folder), manifest.file_entry(folder / manifest.NAME)["sha256"]))
        except manifest.Unreadable:
            raise
        except (UserError, FileNotFoundError):
            continue
    return found


def check_whole(checkpoint: Path, hashes: bool = True) -> None:
    """Whether a run can resume from it. Raises UserError naming what is wrong; Unreadable when that cannot be known."""
    document = manifest.read(checkpoint)
    manifest.check_training(checkpoint, document)
    if hashes:
        manifest.check_hashes(checkpoint, document)
    dims = families.dims_of(families.read_config(str(checkpoint)))
    for key in ("family", "layers", "tied"):
        said, known = manifest_values.short(document[key]), manifest_values.short(getattr(dims, key))
        if said != known:
            raise UserError("%s: %s: %s, but config.json beside it says %s; use another checkpoint"
                            % (checkpoint / manifest.NAME, key, said, known))  # fmt: skip


def _check_never_saved(out: Path) -> None:
    """Before a run starts again because no checkpoint is there: metrics.jsonl must not tell of one. Raises UserError."""
    path, saves = out / "metrics.jsonl", 0
    try:
        with open(str(path), "rb") as file:
            for line in file:
                saves += b'"save"' in line and (metrics.parsed(line) or {}).get("kind") == "save"
    except FileNotFoundError:
        return
    except OSError as error:
        raise UserError("%s: cannot be read: %s" % (path, error.strerror)) from None
    if saves:
        raise UserError(
            "%s: metrics.jsonl tells of %d saves, but checkpoints/ %s: is its disk mounted? To start again, give run.out another "
            "folder or delete metrics.jsonl" % (out, saves, "holds none" if (out / "checkpoints").exists() else "is not there")
        )


def same_model(checkpoint: Path, dims: Dims) -> None:
    """Raises UserError naming the first thing in which model.path is no longer the model that the checkpoint was made of."""
    before = families.dims_of(families.read_config(str(checkpoint)))
    changed = [f.name for f in fields(Dims) if getattr(before, f.name) != getattr(dims, f.name)]
    if changed:
        was, now = getattr(before, changed[0]), getattr(dims, changed[0])
        name, step = "model.path (%s of config.json)" % ", ".join(changed), manifest.read(checkpoint)["step"]
        raise UserError("%s Change it back, or start a new run.out." % _changed(name, step, was, now))


def same_run(run: RunConfig, document: Dict[str, Any], facts: Dict[str, Any], allow_changed_data: bool = False) -> List[str]:
    """A resumed run counts steps through the same data with the same optimizer; ``facts``: what is known of it so far (see
    prepare). -> what changed, a line each, if that is allowed. Raises UserError naming what changed if it is not."""
    before = dict(document["training"]["feed"], optimizer=document["training"]["optimizer"])
    now = dict(facts, optimizer=run.optim.type)
    keys = {
        "optimizer": "optim.type", "seq_len": "data.seq_len", "rows_per_step": "batch.global", "pack": "data.pack",
        "seed": "run.seed", "data": "data.train, data.learn, data.over_long, data.on_bad or the tokenizer",
    }  # fmt: skip
    changed = [key for key in keys if key in now and before.get(key) != now[key]]
    lines = [_changed(keys[key], document["step"], before.get(key), now[key]) for key in changed]
    if "optimizer" in changed:
        raise UserError("%s Change it back, or start a new run.out." % lines[0])
    if changed and not allow_changed_data:
        raise UserError("%s Change it back, go on with other data by --allow-changed-data, or start a new run.out." % lines[0])
    return lines


def _changed(name: str, step: int, before: Any, now: Any) -> str:
    return "--resume: %s changed since the checkpoint at step %d (%s, now %s)." % (name, step, before, now)


def say_changes(run: RunConfig, out: Path, say: Say) -> None:
    """What may change at a resume, but not unnoticed: optim, train, model.dtype, run.compile, run.fp8."""
    try:
        last = yaml.safe_load((out / "resolved" / "run.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return  # cut off, or another program's: the run does not depend on it
    now = msgspec.to_builtins(run)
    for section, names in (("optim", now["optim"]), ("train", now["train"]), ("model", ("dtype",)), ("run", ("compile", "fp8"))):
        old = last.get(section) if isinstance(last, dict) else None
        for name in names:
            if isinstance(old, dict) and name in old and old[name] != now[section][name]:
                say("--resume: %s.%s was %s, is %s from here on" % (section, name, old[name], now[section][name]))
