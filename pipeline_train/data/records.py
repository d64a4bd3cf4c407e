"""Lines of a training file -> Records, or messages that name the file, the line, the field and what was expected.

Seven shapes, mixed freely in one file:

    {"type": "pretrain", "text"}                                  alpaca    {"instruction", "input"?, "output"}
    {"type": "instruct", "instruct", "input"?, "output"}          ShareGPT  {"conversations": [{"from", "value"}]}
    {"type": "conversation", "rounds": [["ask" | "ans", text]]}   OpenAI    {"messages": [{"role", "content"}]}
    {"type": "ref_qa", "reference", "rounds"}

"system" may stand in all but pretrain and instruct, and "history": [[question, answer]] in alpaca.

Files: .jsonl and .ndjson (streamed), .json (a list, or objects one after another), .json5 and .jsonc (package json5), .parquet
(package pyarrow).
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Union

from ..errors import UserError
from .files import Block, blocks, values
from .shapes import BadRecord, recognise, unused

SHOWN = 20  # bad lines spelled out in one message


@dataclass(frozen=True)
class Record:
    """One valid record.

    ``kind`` is "pretrain", "instruct", "conversation" or "ref_qa"; ``fields`` holds, by kind: text | instruct, input (None when
    absent), output | rounds as (who, text) pairs with who "ask" or "ans", and system (None when absent) | reference and rounds.
    ``where`` is "file:line".
    """

    kind: str
    fields: Dict[str, Any]
    where: str

    @property
    def line(self) -> int:
        """The number in ``where``: the line, or the row of a Parquet file."""
        return int(re.findall(r"\d+", self.where)[-1])


class Tally:
    """What was found in one file: ``records`` good ones, ``bad`` ones with the first messages, ``blank_inputs`` for one warning,
    ``unused`` for another: key -> records."""

    def __init__(self, path: Union[str, Path], on_bad: str = "fail") -> None:
        self.path = str(path)
        self.on_bad = on_bad
        self.records = 0
        self.bad = 0
        self.messages: List[str] = []
        self.blank_inputs = 0
        self.unused: Dict[str, int] = {}

    def add_bad(self, place: str, message: str) -> None:
        """``place``: as in data.files."""
        self.bad += 1
        if len(self.messages) < SHOWN:
            line = "%s%s: %s" % (self.path, place, message)
            self.messages.append(line.encode("utf-8", "backslashreplace").decode("utf-8"))  # half a surrogate pair can be in it

    def count_unused(self, key: str) -> None:
        key = key[:40] if key.isprintable() else ascii(key)[:40]
        if key in self.unused or len(self.unused) < SHOWN:
            self.unused[key] = self.unused.get(key, 0) + 1

    def finish(self) -> None:
        """Raises UserError when bad lines are not to be skipped, or when nothing is left."""
        if self.bad and (self.on_bad == "fail" or not self.records):
            head = "%s: %d bad record%s" % (self.path, self.bad, "" if self.bad == 1 else "s")
            head += " (data.on_bad: skip leaves them out):" if self.records else " and no good one:"
            raise UserError(listing(head, self.messages, self.bad))
        if not self.records:
            raise UserError("%s: holds no records" % self.path)


def listing(head: str, messages: List[str], total: int) -> str:
    """A line for the file, one for each of the first bad records, and how many more there are."""
    more = ["... and %d more" % (total - SHOWN)] if total > SHOWN else []
    return "\n".join([head] + messages[:SHOWN] + more)


def read(path: Union[str, Path], on_bad: str = "fail", tally: Optional[Tally] = None) -> Iterator[Record]:
    """Every good record of a file, in order. ``on_bad`` "fail": a UserError at the end lists the bad lines, up to 20 of them,
    and nothing is yielded after the first; "skip": they are counted in ``tally``. A file that cannot be read at all, or holds no
    good record, is a UserError in both."""
    tally = tally if tally is not None else Tally(path, on_bad)
    for block in blocks(Path(path)):
        for record in checked(Path(path), block, tally):
            if not tally.bad or tally.on_bad == "skip":
                yield record
    tally.finish()


def checked(path: Path, block: Block, tally: Tally) -> Iterator[Record]:
    """Every good record of a block, counted in ``tally`` as the bad ones are."""
    for place, value in values(path, block, tally.add_bad):
        try:
            kind, fields = recognise(value)
        except BadRecord as error:
            tally.add_bad(place, str(error))
            continue
        if kind == "instruct" and fields["input"] is not None and not fields["input"].strip():
            fields["input"] = None
            tally.blank_inputs += 1
        tally.records += 1
        for key in unused(value):
            tally.count_unused(key)
        yield Record(kind, fields, tally.path + place)
