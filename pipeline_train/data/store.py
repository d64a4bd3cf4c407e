"""A data file -> encoded files (see feed.py), once, in the process that starts the run, before any other does."""

import json
import os
from pathlib import Path
from typing import Any, Dict, Optional

from ..config import RunConfig
from ..errors import UserError
from ..families import Dims
from . import cache, totals
from .encode import TextCodec
from .making import Work
from .progress import Progress, Say, say_line


def default_seq_len(raw: Dict[str, Any], dims: Dims) -> int:
    """data.seq_len when run.yaml has none: the model's positions; bloom has no limit, its config may name its training length."""
    return int(dims.max_positions or raw.get("seq_length") or 2048)


def prepare(config: RunConfig, codec: TextCodec, which: str, folder: Path, seq_len: int, say: Say = say_line) -> Dict[str, Any]:
    """Encode ``data.train`` ("train") or ``data.eval`` ("eval") into ``folder``; returns what <which>.json holds.

    What was encoded before, here or in the cache, from the same bytes by the same rules, is taken from there once its hashes are
    found right; what was begun is gone on with. Raises UserError: bad records, none at all, nothing to learn, a full disk;
    RunFailed: a process was killed.
    """
    name = config.data.train if which == "train" else config.data.eval
    if name is None:
        raise UserError("run.yaml: data.eval: is not set")
    folder = Path(folder)
    work = Work(config, codec, name, seq_len, Progress(name, say), say)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with work.progress:
            facts = work.known(folder, which) or work.made(folder, which)
        found = totals.document(facts, name, seq_len, codec.notes)
        found.update(over_long=config.data.over_long, hash=work.hash(facts), codec=codec.identity(), key=work.key, facts=facts)
        text = json.dumps(found, ensure_ascii=False, indent=1)
        # A file name that is no text becomes \\udc80 and so on, which JSON reads as it was.
        (folder / (which + ".json")).write_bytes((text + "\n").encode("utf-8", "backslashreplace"))
    except OSError as error:  # the data file's own are UserErrors
        where = error.filename or work.place or folder
        raise UserError("%s: the encoded data cannot be written: %s" % (where, error.strerror or error)) from None
    return found


def scratch(config: RunConfig) -> Optional[str]:
    """Where a folder that is to have encoded files for a moment gets them without a copy; None: anywhere."""
    names = [name for name in (config.data.train, config.data.eval) if name is not None and os.path.isfile(name)]
    root = cache.root_of(config.data.cache, max([os.path.getsize(name) for name in names] or [0]))
    return str(root) if root is not None and cache.usable(root, config.data.cache) else None
