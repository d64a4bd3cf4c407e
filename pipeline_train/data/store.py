"""A data file -> encoded files (see feed.py), once, in the process that starts the run, before any other does."""

import hashlib
import json
from pathlib import Path
from typing import Any, Dict, List

import numpy as np

from ..config import RunConfig
from ..errors import UserError
from ..families import Dims
from . import packing
from .arrays import GrowingArray, load
from .encode import Sequence, TextCodec
from .records import Record, Tally, listing, read
from .template import TemplateRefused

BUFFER = 1 << 20  # ids held in memory before they are written


def default_seq_len(raw: Dict[str, Any], dims: Dims) -> int:
    """data.seq_len when run.yaml has none: the model's positions; bloom has no limit, its config may name its training length."""
    return int(dims.max_positions or raw.get("seq_length") or 2048)


def prepare(config: RunConfig, codec: TextCodec, which: str, folder: Path, seq_len: int) -> Dict[str, Any]:
    """Encode ``data.train`` ("train") or ``data.eval`` ("eval") into ``folder``; returns what <which>.json holds.

    Over-long records are cut at seq_len + 1 ids (the last one a target only), dropped or refused, as data.over_long says; pretrain
    texts go on in the next sample. Raises UserError: bad records, none at all, nothing to learn.
    """
    path = config.data.train if which == "train" else config.data.eval
    if path is None:
        raise UserError("run.yaml: data.eval: is not set")
    tally = Tally(path, config.data.on_bad)
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with Encoder(config, codec, seq_len, folder, which) as encoder:
            for record in read(path, config.data.on_bad, tally):
                encoder.add(record, tally)
            return encoder.finish(tally)
    except OSError as error:  # the data file's own are reported by read
        raise UserError("%s: the encoded data cannot be written: %s" % (folder, error.strerror or error)) from None


class Encoder:
    """Writes the samples of one file; as a context it removes unfinished files."""

    def __init__(self, config: RunConfig, codec: TextCodec, seq_len: int, folder: Path, which: str) -> None:
        self.config, self.codec, self.seq_len, self.folder, self.which = config, codec, seq_len, folder, which
        self.over_long = config.data.over_long
        self.files = {
            "ids": GrowingArray(folder / (which + ".ids.npy"), np.int32),
            "learn": GrowingArray(folder / (which + ".learn.npy"), np.bool_),
            "offsets": GrowingArray(folder / (which + ".offsets.npy"), np.int64, 3),
        }
        self.ids: List[int] = []
        self.learn: List[bool] = []
        self.offsets: List[List[int]] = []
        self.written = self.learnt = self.stops_inside = 0
        self.counts = {"truncated": 0, "dropped": 0, "continued": 0, "nothing_to_learn": 0}
        self.kinds: Dict[str, int] = {}
        self.too_long: List[str] = []
        self.lost: List[str] = []  # records whose prompt alone fills seq_len
        self.hashes = {name: hashlib.sha256() for name in self.files}

    def __enter__(self) -> "Encoder":
        return self

    def __exit__(self, *raised: Any) -> None:
        for file in self.files.values():
            file.abandon()

    def add(self, record: Record, tally: Tally) -> None:
        try:
            sequence = self.codec.encode(record)
        except TemplateRefused as error:
            tally.records -= 1
            tally.add_bad(record.where[len(tally.path) :], "the chat template refuses it: %s" % error)
            return
        self.kinds[record.kind] = self.kinds.get(record.kind, 0) + 1
        if record.kind == "pretrain":
            self._add_text(sequence, record.line)
        else:
            self._add_answers(sequence, record)
        if len(self.ids) >= BUFFER:
            self._flush()

    def _add_text(self, sequence: Sequence, line: int) -> None:
        positions = len(sequence.ids) - 1
        if positions < 1:
            self.counts["nothing_to_learn"] += 1
            return
        self.counts["continued"] += positions > self.seq_len
        start = self._keep(sequence)
        for cut in range(0, positions, self.seq_len):
            self.offsets.append([start + cut, min(self.seq_len, positions - cut), line])

    def _add_answers(self, sequence: Sequence, record: Record) -> None:
        positions = whole = len(sequence.ids) - 1
        if positions > self.seq_len:
            if self.over_long == "drop":
                self.counts["dropped"] += 1
                return
            if self.over_long == "fail":
                self.too_long.append("%s: %d tokens" % (record.where, positions))
                return
            self.counts["truncated"] += 1
            sequence = _cut(sequence, self.seq_len + 1)
        if not any(sequence.learn):
            self.counts["nothing_to_learn"] += 1
            if whole > self.seq_len:
                self.lost.append("%s (%d tokens)" % (record.where, whole))
            return
        self.offsets.append([self._keep(sequence), len(sequence.ids) - 1, record.line])

    def _keep(self, sequence: Sequence) -> int:
        start = self.written + len(self.ids)
        self.ids.extend(sequence.ids)
        self.learn.extend(sequence.learn)
        return start

    def _flush(self) -> None:
        ids = self._write("ids", self.ids)
        learn = self._write("learn", self.learn)
        self._write("offsets", self.offsets)
        self.written += len(ids)
        self.learnt += int(learn.sum())
        # A learnt end token with a learnt token behind it stands inside an answer or a text.
        self.stops_inside += int((np.isin(ids[:-1], self.codec.stop_ids) & learn[:-1] & learn[1:]).sum())
        self.ids, self.learn, self.offsets = [], [], []

    def _write(self, name: str, rows: List[Any]) -> np.ndarray:
        array = self.files[name].append(rows)
        self.hashes[name].update(array.tobytes())
        return array

    def _hash(self) -> str:
        """Of all that is trained on, and of what made it."""
        parts = [h.hexdigest() for h in self.hashes.values()] + [self.codec.identity(), self.seq_len, packing.VERSION]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode("utf-8")).hexdigest()

    def finish(self, tally: Tally) -> Dict[str, Any]:
        data = self.config.data
        if self.too_long:
            head = "%s: %d records over data.seq_len (%d) and data.over_long is fail:" % (
                tally.path,
                len(self.too_long),
                self.seq_len,
            )
            raise UserError(listing(head, self.too_long, len(self.too_long)))
        self._flush()
        if not self.learnt:
            raise UserError(
                "%s: nothing to learn in %d records (%s). Answers are learnt, and all of a pretrain text; a prompt longer than "
                "data.seq_len (%d) leaves no room for its answer." % (tally.path, tally.records, _said(self.counts), self.seq_len)
            )
        for file in self.files.values():
            file.close()
        lengths = np.asarray(load(self.folder / (self.which + ".offsets.npy"))[:, 1])
        for name, array in packing.pack(lengths, self.seq_len)._asdict().items():
            np.save(str(self.folder / ("%s.%s.npy" % (self.which, name))), array)
        result = {
            "file": tally.path, "records": tally.records, "bad": tally.bad, "bad_lines": tally.messages, "kinds": self.kinds,
            "samples": len(lengths), "tokens": int(lengths.sum()), "learnt_tokens": self.learnt, "seq_len": self.seq_len,
            "over_long": data.over_long, **self.counts, "lengths": _lengths(lengths), "hash": self._hash(),
            "codec": self.codec.identity(), "warnings": self._warnings(tally),
        }  # fmt: skip
        text = json.dumps(result, ensure_ascii=False, indent=1)
        # A file name that is no text becomes \udc80 and so on, which JSON reads as it was.
        (self.folder / (self.which + ".json")).write_bytes((text + "\n").encode("utf-8", "backslashreplace"))
        return result

    def _warnings(self, tally: Tally) -> List[str]:
        found = list(self.codec.notes)
        if tally.blank_inputs:
            found.append('%s: "input": "" counts as no input (%d records)' % (tally.path, tally.blank_inputs))
        if self.lost:
            more = ", and %d more" % (len(self.lost) - 5) if len(self.lost) > 5 else ""
            found.append(
                "%d records are lost: within data.seq_len (%d) there is no room for an answer: %s%s"
                % (len(self.lost), self.seq_len, ", ".join(self.lost[:5]), more)
            )
        if self.stops_inside:
            found.append(
                "%s: %d learnt texts hold an end token of the model in their middle; it would learn to stop there"
                % (tally.path, self.stops_inside)
            )
        return found


def _cut(sequence: Sequence, ids: int) -> Sequence:
    """The first ids of a sequence up to its last learnt one: what follows could only be padding."""
    learn = sequence.learn[:ids]
    while learn and not learn[-1]:
        learn.pop()
    return Sequence(sequence.ids[: len(learn)], learn)


def _lengths(lengths: np.ndarray) -> Dict[str, float]:
    """Positions of a sample."""
    low, middle, high = np.percentile(lengths, [0, 50, 95])
    return {
        "min": int(low),
        "median": float(middle),
        "mean": round(float(lengths.mean()), 1),
        "p95": float(high),
        "max": int(lengths.max()),
    }


def _said(counts: Dict[str, int]) -> str:
    return ", ".join("%d %s" % (n, name.replace("_", " ")) for name, n in counts.items())
