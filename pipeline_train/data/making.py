"""How encoded files come to be: found where an earlier start left them, taken from the cache, gone on with, or made."""

import contextlib
import hashlib
import itertools
import json
import os
import shutil
from pathlib import Path
from typing import IO, Any, Dict, Optional, Tuple

import numpy as np

from ..config import RunConfig
from ..errors import UserError
from . import arrays, cache, files, packing, pool, totals
from .block_encoder import BlockEncoder
from .encode import TextCodec
from .journal import Journal
from .progress import Progress, Say
from .totals import Totals

VERSION = 2  # of what is made of the same records by the same tokenizer: part of the key and of the data hash
PIECE = 1 << 20  # bytes hashed at once


class Work:
    """One data file. ``key`` is known after ``known``: a hash of the file's bytes and of all that decides what is made of them."""

    def __init__(self, config: RunConfig, codec: TextCodec, name: str, seq_len: int, progress: Progress, say: Say) -> None:
        self.data, self.codec, self.name, self.seq_len = config.data, codec, name, seq_len
        self.progress, self.say, self.path = progress, say, Path(name)
        self.key = ""
        self.place: Optional[Path] = None  # where it is made
        next(files.blocks(self.path), None)  # a file that is none, or of no known format, is told of before it is read through
        self.state = _state(self.path)
        self.size = self.state[0]

    def known(self, folder: Path, which: str) -> Optional[Dict[str, Any]]:
        """The facts of what an earlier start has left in ``folder``."""
        self.key = self._key()
        with contextlib.suppress(OSError):
            facts = totals.unsealed((folder / (which + ".json")).read_bytes(), self.key, "facts")
            if facts is not None and self._whole(folder, which + ".", facts):
                return facts
        return None

    def made(self, folder: Path, which: str) -> Dict[str, Any]:
        """From the cache, or into it and from there; without one, by way of a folder beside the target."""
        aside = folder / (which + ".encoding")
        root = cache.root_of(self.data.cache, self.size, self.say)
        kept = root is not None and cache.usable(root, self.data.cache, self.say)
        self.place = root if root is not None and kept else aside
        self.place.mkdir(exist_ok=True)
        try:
            with cache.alone(self.place, self.key, self.say) as entry:
                facts = self._kept(entry) or self._make(entry)
                cache.place(entry, folder, which, move=not kept)
                os.utime(str(entry))
        except UserError:
            shutil.rmtree(str(aside), ignore_errors=True)  # one that was interrupted stays, to be gone on with
            raise
        if kept:
            cache.prune(self.place, self.key)
        shutil.rmtree(str(aside), ignore_errors=True)
        return facts

    def hash(self, facts: Dict[str, Any]) -> str:
        """Of all that is trained on, and of what made it."""
        parts = [facts["sha256"][name] for name in ("ids", "learn", "offsets")]
        return _digest(parts + [self.codec.identity(), self.seq_len, VERSION, packing.VERSION])

    def _key(self) -> str:
        found = hashlib.sha256()
        self.progress.start("reading", self.size)
        try:
            with self.path.open("rb") as file:
                self._hash(file, found, 0)
        except OSError as error:
            raise UserError("%s: cannot be read: %s" % (self.name, error.strerror or error)) from None
        rules = [self.path.suffix.lower(), self.seq_len, self.data.on_bad, self.data.over_long, VERSION, packing.VERSION]
        if self.data.learn != "answers":
            rules.append(self.data.learn)  # the default has no part in it: what was encoded before there was a choice is found
        return _digest([found.hexdigest(), self.codec.fingerprint()] + rules)[:32]

    def _hash(self, file: IO[bytes], found: Any, done: int) -> int:
        """Hash the rest of a file; ``done`` bytes before it count for the bar. -> those and its own."""
        for piece in iter(lambda: file.read(PIECE), b""):
            found.update(piece)
            done += len(piece)
            self.progress.at(done)
        return done

    def _whole(self, folder: Path, prefix: str, facts: Dict[str, Any]) -> bool:
        """Whether the arrays are those that were written, to the last byte."""
        names = {name: folder / ("%s%s.npy" % (prefix, name)) for name in facts["sha256"]}
        try:
            self.progress.start("checking", sum(os.path.getsize(str(path)) for path in names.values()))
            done = 0
            for name, path in names.items():
                found = hashlib.sha256()
                head = facts["heads"][name].encode("latin-1")
                with path.open("rb") as file:
                    if file.read(len(head)) != head:
                        return False
                    done = self._hash(file, found, done)
                if found.hexdigest() != facts["sha256"][name]:
                    return False
        except OSError:
            return False
        return True

    def _kept(self, entry: Path) -> Optional[Dict[str, Any]]:
        if not os.path.lexists(str(entry)):
            return None
        facts = None
        with contextlib.suppress(OSError):
            facts = totals.unsealed((entry / cache.DONE).read_bytes(), self.key)
        if facts is not None and self._whole(entry, "", facts):
            self.say("%s: was encoded before; taken from %s" % (self.name, entry))
            return facts
        self.say("%s: is damaged; %s is encoded again" % (entry, self.name))
        cache.remove(entry)
        return None

    def _make(self, entry: Path) -> Dict[str, Any]:
        part = entry.with_name(entry.name + ".part")
        cache.begun(part)
        found = Totals(self.seq_len, self.data.on_bad)
        journal = Journal(part, found)
        try:
            self._encode(journal, found)
            found.check(self.name, self.data.over_long)
            if _state(self.path) != self.state:
                raise UserError("%s: was changed while it was read; start again" % self.name)
            hashes = journal.finish()
        except UserError:
            shutil.rmtree(str(part))
            raise
        finally:
            journal.close()
        hashes.update(_pack(part, found))
        heads = {name: arrays.head(part / (name + ".npy")).decode("latin-1") for name in hashes}
        facts = totals.sealed(dict(found.facts(), sha256=hashes, heads=heads), self.key)
        (part / cache.DONE).write_text(json.dumps(facts), encoding="utf-8")
        journal.path.unlink()
        os.replace(str(part), str(entry))
        return facts

    def _encode(self, journal: Journal, found: Totals) -> None:
        encoder = BlockEncoder(self.codec, self.path, self.seq_len, self.data.learn, self.data.over_long, self.data.on_bad)
        blocks = files.blocks(self.path)
        done = 0
        for block in itertools.islice(blocks, journal.blocks):
            done = block.stop
            counted = "%d %%" % (100 * done // self.size) if block.line else "%d records" % done
        if done:
            self.say("%s: goes on where it was stopped, with %s encoded" % (self.name, counted))
        processes = pool.cores() if self.size >= cache.SMALL else 0
        self.progress.start("encoding", self.size, done)
        with contextlib.closing(pool.encoded(blocks, encoder, lambda: found.failed, processes)) as parts:
            for block, part in parts:
                if found.failed:
                    found.add_checked(part)
                elif part.error is not None:
                    raise part.error
                else:
                    journal.add(part)
                self.progress.at(block.stop, "" if block.line else "records")


def _pack(folder: Path, found: Totals) -> Dict[str, str]:
    """Writes packing's arrays; -> a hash of each."""
    lengths = np.empty(int(found.lengths.sum()), np.int32)
    begin = 0
    for rows in arrays.pieces(folder / "offsets.npy"):
        lengths[begin : begin + len(rows)] = rows[:, 1]
        begin += len(rows)
    hashes = {}
    for name, array in packing.pack(lengths, found.seq_len)._asdict().items():
        np.save(str(folder / (name + ".npy")), array)
        hashes[name] = hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()
    return hashes


def _state(path: Path) -> Tuple[int, int]:
    try:
        found = path.stat()
    except OSError as error:
        raise UserError("%s: cannot be read: %s" % (path, error.strerror or error)) from None
    return found.st_size, found.st_mtime_ns


def _digest(parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode("utf-8")).hexdigest()
