"""A data file -> blocks -> decoded values, each with its place. The packages json5 and pyarrow are needed for their files only.

Places are what follows the file's name in a message: ":5" (a line), ": record 5", ": row 5".
"""

import itertools
from pathlib import Path
from typing import Callable, Iterator, List, NamedTuple, Optional

import msgspec

from ..errors import UserError
from .json_text import Value, blanks, decode_line, following, listed

AddBad = Callable[[str, str], None]  # (place, message) of a line that is skipped or refused

BOM = b"\xef\xbb\xbf"
BYTES = 1 << 20  # of lines in a block
VALUES = 1000  # in a block of a format that cannot be cut


class Block(NamedTuple):
    """A part of a file that can be encoded without the others: the lines from byte ``start`` up to byte ``stop``, of which the
    first has the number ``line``; or ``values``, of a format that cannot be cut."""

    start: int
    stop: int
    line: int
    values: Optional[List[Value]]


def blocks(path: Path) -> Iterator[Block]:
    """The same for the same bytes. A file that cannot be read on from some point is a UserError."""
    readers = {".jsonl": _lines, ".ndjson": _lines, ".json": _json, ".json5": _json5, ".jsonc": _json5, ".parquet": _parquet}
    reader = readers.get(path.suffix.lower())
    if path.is_dir():
        raise UserError("%s: is a folder; name one file of it" % path)
    if not path.exists():
        raise UserError("%s: no such file" % path)
    if not path.is_file():  # opening a pipe would wait for a writer
        raise UserError("%s: is not a regular file; write the data into one" % path)
    if reader is None:
        raise UserError("%s: cannot tell its format; name it %s" % (path, ", ".join(readers)))
    try:
        with path.open("rb") as handle:
            start = handle.read(4)
        if start[:2] in (b"\xff\xfe", b"\xfe\xff"):
            raise UserError("%s: is UTF-16 text; save it as UTF-8" % path)
        if start[:2] == b"\x1f\x8b":
            raise UserError("%s: is packed by gzip; unpack it" % path)
        yield from reader(path)
    except OSError as error:
        raise UserError("%s: cannot be read: %s" % (path, error.strerror or error)) from None


def values(path: Path, block: Block, add_bad: AddBad) -> Iterator[Value]:
    """(place, value) for each record-to-be of a block. Lines that are no JSON go to ``add_bad``."""
    if block.values is not None:
        yield from block.values
        return
    try:
        with path.open("rb") as handle:
            handle.seek(block.start)
            lines = handle.read(block.stop - block.start).split(b"\n")
    except OSError as error:
        raise UserError("%s: cannot be read: %s" % (path, error.strerror or error)) from None
    for number, line in enumerate(lines, block.line):
        if number == 1 and line.startswith(BOM):
            line = line[len(BOM) :]
        if not line.strip():
            continue
        if number == 1 and line.lstrip().startswith(b"["):
            raise UserError("%s: is one JSON list, not a record per line; rename it to .json" % path)
        try:
            value = decode_line(line.rstrip(b"\r"))
        except ValueError as error:
            add_bad(":%d" % number, str(error))
        else:
            yield ":%d" % number, value


def _lines(path: Path) -> Iterator[Block]:
    start, number = 0, 1
    with path.open("rb") as handle:
        while True:
            lines = handle.read(BYTES)
            if not lines:
                return
            if not lines.endswith(b"\n"):
                lines += handle.readline()
            yield Block(start, start + len(lines), number, None)
            start += len(lines)
            number += lines.count(b"\n")


def _grouped(found: Iterator[Value]) -> Iterator[Block]:
    number = 0
    while True:
        some = list(itertools.islice(found, VALUES))
        if not some:
            return
        yield Block(number, number + len(some), 0, some)
        number += len(some)


def _json(path: Path) -> Iterator[Block]:
    text = _text(path)
    start = blanks(text, 0)
    if text[start : start + 1] == "[":
        yield from _grouped(listed(path, text, start + 1))
        return
    try:
        msgspec.json.decode(text[start:].partition("\n")[0].encode("utf-8"))
    except (msgspec.MsgspecError, RecursionError):
        yield from _grouped(following(path, text, start))
    else:
        yield from _lines(path)  # one record a line under the name .json is common


def _json5(path: Path) -> Iterator[Block]:
    try:
        import json5
    except ImportError:
        raise UserError("%s: reading it needs the package json5: pip install 'pipedock[json5]'" % path) from None
    try:
        value = json5.loads(_text(path))
    except RecursionError:
        raise UserError("%s: nested too deeply" % path) from None
    except ValueError as error:
        raise UserError("%s: not valid JSON5: %s" % (path, " ".join(str(error).replace("<string>:", "line ").split()))) from None
    items = value if isinstance(value, list) else [value]
    yield from _grouped((": record %d" % number, item) for number, item in enumerate(items, 1))


def _parquet(path: Path) -> Iterator[Block]:
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError("%s: reading it needs the package pyarrow: pip install 'pipedock[parquet]'" % path) from None
    number = 0
    try:
        for batch in pyarrow.parquet.ParquetFile(str(path)).iter_batches(batch_size=VALUES):
            # Columns of other shapes in the file are null in this row.
            rows = [{k: v for k, v in row.items() if v is not None} for row in batch.to_pylist()]
            places = range(number + 1, number + len(rows) + 1)
            yield Block(number, number + len(rows), 0, [(": row %d" % place, row) for place, row in zip(places, rows)])
            number += len(rows)
    except (ValueError, pyarrow.ArrowException) as error:
        raise UserError("%s: not a readable Parquet file (row %d): %s" % (path, number + 1, " ".join(str(error).split()))) from None


def _text(path: Path) -> str:
    raw = path.read_bytes()
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise UserError("%s:%d: not UTF-8 text (byte 0x%02x)" % (path, line, raw[error.start])) from None
