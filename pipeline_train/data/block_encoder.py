"""A block of a data file -> encoded samples and counts: all that a worker process does."""

from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional

import numpy as np

from ..errors import UserError
from .encode import Sequence, TextCodec
from .files import Block
from .records import SHOWN, Record, Tally, checked
from .template import TemplateRefused

LOST_SHOWN = 5


class Encoded(NamedTuple):
    """``ids`` int32 [n], ``learn`` bool [n], ``offsets`` int64 [s, 3] (see feed; the first id counted from this block's first).
    ``counts`` are added up over the blocks, ``shown`` are the first few of what is counted, each with its place in the file.
    ``error``: what ends the whole."""

    ids: np.ndarray
    learn: np.ndarray
    offsets: np.ndarray
    counts: Dict[str, int]
    shown: Dict[str, List[str]]
    error: Optional[UserError]


class BlockEncoder:
    """Over-long records are cut at seq_len + 1 ids (the last one a target only), dropped or refused; pretrain texts go on in the
    next sample. ``learn`` "all": prompts too, up to a record's last answer. ``on_bad`` "fail": nothing behind the first bad record
    is encoded, only looked through."""

    def __init__(self, codec: TextCodec, path: Path, seq_len: int, learn: str, over_long: str, on_bad: str) -> None:
        self.codec, self.path, self.seq_len = codec, path, seq_len
        self.learn, self.over_long, self.on_bad = learn, over_long, on_bad

    def encode(self, block: Block, check_only: bool = False) -> Encoded:
        part = _Part(self)
        tally = Tally("", self.on_bad)
        error: Optional[UserError] = None
        plans, records = [], []
        try:
            for record in checked(self.path, block, tally):
                if check_only or (tally.bad and self.on_bad == "fail"):
                    continue
                try:
                    plans.append(self.codec.spans.plan(record))
                except TemplateRefused as refused:
                    tally.records -= 1
                    part.counts["refused"] = part.counts.get("refused", 0) + 1
                    tally.add_bad(record.where, "the chat template refuses it: %s" % refused)
                    continue
                records.append(record)
        except UserError as raised:
            error = raised
        for record, sequence in zip(records, self.codec.spans.sequences(plans)):
            part.add(record, sequence)
        return part.done(tally, error)


class _Part:
    """What one block has given so far."""

    def __init__(self, encoder: BlockEncoder) -> None:
        self.codec, self.seq_len, self.over_long = encoder.codec, encoder.seq_len, encoder.over_long
        self.all = encoder.learn == "all"
        self.ids: List[int] = []
        self.learn: List[bool] = []
        self.answers: List[bool] = []  # of ``ids``, what is an answer or a text
        self.offsets: List[List[int]] = []
        self.counts: Dict[str, int] = {}
        self.shown: Dict[str, List[str]] = {"too_long": [], "lost": []}

    def add(self, record: Record, sequence: Sequence) -> None:
        self._count("kind." + record.kind)
        if record.kind == "pretrain":
            self._add_text(sequence, record.line)
        else:
            self._add_answers(sequence, record)

    def _count(self, name: str, place: str = "", most: int = 0) -> None:
        self.counts[name] = self.counts.get(name, 0) + 1
        if place and len(self.shown[name]) < most:
            self.shown[name].append(place)

    def _add_text(self, sequence: Sequence, line: int) -> None:
        positions = len(sequence.ids) - 1
        if positions < 1:
            self._count("nothing_to_learn")
            return
        if positions > self.seq_len:
            self._count("continued")
        start = self._keep(sequence, sequence.learn)
        for cut in range(0, positions, self.seq_len):
            self.offsets.append([start + cut, min(self.seq_len, positions - cut), line])

    def _add_answers(self, sequence: Sequence, record: Record) -> None:
        positions = whole = len(sequence.ids) - 1
        answers = sequence.learn
        if self.all and answers:
            sequence = Sequence(sequence.ids, [False] + [True] * positions)
        if positions > self.seq_len:
            if self.over_long == "drop":
                self._count("dropped")
                return
            if self.over_long == "fail":
                self._count("too_long", "%s: %d tokens" % (record.where, positions), SHOWN)
                return
            self._count("truncated")
            sequence = _cut(sequence, self.seq_len + 1)
        if not any(sequence.learn):
            self._count("nothing_to_learn")
            if whole > self.seq_len:
                self._count("lost", "%s (%d tokens)" % (record.where, whole), LOST_SHOWN)
            return
        self.offsets.append([self._keep(sequence, answers), len(sequence.ids) - 1, record.line])

    def _keep(self, sequence: Sequence, answers: List[bool]) -> int:
        start = len(self.ids)
        self.ids += sequence.ids
        self.learn += sequence.learn
        self.answers += answers[: len(sequence.ids)]
        return start

    def done(self, tally: Tally, error: Optional[UserError]) -> Encoded:
        ids, learn, answers = np.array(self.ids, np.int32), np.array(self.learn, np.bool_), np.array(self.answers, np.bool_)
        self.counts.update({"unused.%s" % key: number for key, number in tally.unused.items()})
        self.counts.update(records=tally.records, bad=tally.bad, blank_inputs=tally.blank_inputs, learnt_tokens=int(learn.sum()))
        # An answer's end token with a token of the answer behind it stands inside it; so in a text.
        stops: Any = np.isin(ids[:-1], self.codec.stop_ids) & answers[:-1] & answers[1:]
        self.counts["stops_inside"] = int(stops.sum())
        offsets = np.array(self.offsets, np.int64).reshape(-1, 3)
        return Encoded(ids, learn, offsets, self.counts, dict(self.shown, bad=tally.messages), error)


def _cut(sequence: Sequence, ids: int) -> Sequence:
    """The first ids of a sequence up to its last learnt one: what follows could only be padding."""
    learn = sequence.learn[:ids]
    while learn and not learn[-1]:
        learn.pop()
    return Sequence(sequence.ids[: len(learn)], learn)
