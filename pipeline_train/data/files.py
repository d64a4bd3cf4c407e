"""A data file -> its decoded values, each with "file:line". The packages json5 and pyarrow are needed for their files only."""

import json
import re
from pathlib import Path
from typing import Any, Callable, Iterator, Tuple

import msgspec

from ..errors import UserError

Value = Tuple[str, Any]
AddBad = Callable[[str, str], None]  # (where, message) of a line that is skipped or refused

BOM = b"\xef\xbb\xbf"
BLANK = re.compile(r"[ \t\r\n]*")
COMMENT = re.compile(r"[ \t\r\n]*(//|/\*)")
TRAILING_COMMA = re.compile(r"[ \t\r\n]*,?[ \t\r\n]*[\]}]")


def values(path: Path, add_bad: AddBad) -> Iterator[Value]:
    """(where, value) for each record-to-be. Undecodable JSONL lines go to ``add_bad``; a file that cannot be read on from some
    point is a UserError."""
    readers = {".jsonl": _jsonl, ".ndjson": _jsonl, ".json": _json, ".json5": _json5, ".jsonc": _json5, ".parquet": _parquet}
    reader = readers.get(path.suffix.lower())
    if path.is_dir():
        raise UserError("%s: is a folder; name one file of it" % path)
    if not path.exists():
        raise UserError("%s: no such file" % path)
    if reader is None:
        raise UserError("%s: cannot tell its format; name it %s" % (path, ", ".join(readers)))
    try:
        with path.open("rb") as handle:
            start = handle.read(4)
        if start[:2] in (b"\xff\xfe", b"\xfe\xff"):
            raise UserError("%s: is UTF-16 text; save it as UTF-8" % path)
        yield from reader(path, add_bad)
    except OSError as error:
        raise UserError("%s: cannot be read: %s" % (path, error.strerror or error)) from None


def _jsonl(path: Path, add_bad: AddBad) -> Iterator[Value]:
    with path.open("rb") as handle:
        for number, line in enumerate(handle, 1):
            if number == 1 and line.startswith(BOM):
                line = line[len(BOM) :]
            if not line.strip():
                continue
            if number == 1 and line.lstrip().startswith(b"["):
                raise UserError("%s: is one JSON list, not a record per line; rename it to .json" % path)
            where = "%s:%d" % (path, number)
            try:
                value = _line(line.rstrip(b"\r\n"))
            except ValueError as error:
                add_bad(where, str(error))
            else:
                yield where, value


def _line(line: bytes) -> Any:
    """One line's value. Raises ValueError with a message for the user."""
    try:
        return msgspec.json.decode(line)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        pass  # json takes what pandas writes (NaN) and huge integers, and says better what is wrong with the rest
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError("not UTF-8 text (byte 0x%02x at column %d)" % (line[error.start], error.start + 1)) from None
    try:
        return json.loads(text, parse_int=_int)
    except json.JSONDecodeError as error:
        raise ValueError(_not_json(text, error)) from None
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _json(path: Path, add_bad: AddBad) -> Iterator[Value]:
    text = _text(path)
    start = BLANK.match(text).end()  # type: ignore[union-attr]
    if text[start : start + 1] == "[":
        yield from _listed(path, text, start + 1)
        return
    try:
        msgspec.json.decode(text[start:].partition("\n")[0].encode("utf-8"))
    except (msgspec.MsgspecError, RecursionError):
        yield from _following(path, text, start)
    else:
        yield from _jsonl(path, add_bad)  # one record a line under the name .json is common


def _listed(path: Path, text: str, position: int) -> Iterator[Value]:
    """The items of a JSON list whose "[" ends at ``position``."""
    lines = _Lines(text)
    position = _blanks(text, position)
    while text[position : position + 1] != "]":
        where = "%s:%d" % (path, lines.at(position))
        value, position = _value(path, text, position)
        yield where, value
        position = _blanks(text, position)
        mark = text[position : position + 1]
        if mark == ",":
            position = _blanks(text, position + 1)
            if text[position : position + 1] != "]":
                continue
        if mark != "]":
            hint = _json5_hint(text, position) or (
                "the list is not closed" if not mark else 'expected "," or "]" after this record'
            )
            raise UserError("%s:%d: not valid JSON: %s" % (path, lines.at(position), hint))
    rest = _blanks(text, position + 1)
    if rest != len(text):
        hint = _json5_hint(text, rest) or "there is more after the list"
        raise UserError("%s:%d: not valid JSON: %s" % (path, lines.at(rest), hint))


def _following(path: Path, text: str, position: int) -> Iterator[Value]:
    """JSON objects one after another."""
    lines = _Lines(text)
    while position < len(text):
        where = "%s:%d" % (path, lines.at(position))
        value, position = _value(path, text, position)
        yield where, value
        position = _blanks(text, position)


def _value(path: Path, text: str, position: int) -> Tuple[Any, int]:
    try:
        return json.JSONDecoder(parse_int=_int).raw_decode(text, position)
    except json.JSONDecodeError as error:
        line = text.count("\n", 0, error.pos) + 1
        raise UserError("%s:%d: %s" % (path, line, _not_json(text, error))) from None
    except RecursionError:
        raise UserError("%s:%d: nested too deeply" % (path, text.count("\n", 0, position) + 1)) from None


def _json5(path: Path, add_bad: AddBad) -> Iterator[Value]:
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
    for number, item in enumerate(value if isinstance(value, list) else [value], 1):
        yield "%s: record %d" % (path, number), item


def _parquet(path: Path, add_bad: AddBad) -> Iterator[Value]:
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError("%s: reading it needs the package pyarrow: pip install 'pipedock[parquet]'" % path) from None
    number = 0
    try:
        for batch in pyarrow.parquet.ParquetFile(str(path)).iter_batches(batch_size=1024):
            for row in batch.to_pylist():
                number += 1
                # Columns of other shapes in the file are null in this row.
                yield "%s: row %d" % (path, number), {k: v for k, v in row.items() if v is not None}
    except (ValueError, pyarrow.ArrowException) as error:
        raise UserError("%s: not a readable Parquet file (row %d): %s" % (path, number + 1, " ".join(str(error).split()))) from None


def _text(path: Path) -> str:
    raw = path.read_bytes()
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise UserError("%s:%d: not UTF-8 text (byte 0x%02x)" % (path, line, raw[error.start])) from None


class _Lines:
    """Line numbers of growing positions, each newline counted once."""

    def __init__(self, text: str) -> None:
        self.text, self.line, self.counted = text, 1, 0

    def at(self, position: int) -> int:
        self.line += self.text.count("\n", self.counted, position)
        self.counted = position
        return self.line


def _blanks(text: str, position: int) -> int:
    return BLANK.match(text, position).end()  # type: ignore[union-attr]


def _not_json(text: str, error: json.JSONDecodeError) -> str:
    return "not valid JSON: %s" % (_json5_hint(text, error.pos) or "%s (column %d)" % (error.msg, error.colno))


def _json5_hint(text: str, position: int) -> str:
    """For text that is JSON5 at this position: what to do about it."""
    if COMMENT.match(text, position):
        return "comments are JSON5; rename the file to .json5"
    before = text[:position].rstrip()[-1:]
    if TRAILING_COMMA.match(text, position) and (before == "," or text[position : position + 1] == ","):
        return "a trailing comma is JSON5; rename the file to .json5"
    return ""


def _int(digits: str) -> Any:
    """Integers of thousands of digits make Python's int() refuse; nothing that is read needs them exactly."""
    return int(digits) if len(digits) < 1000 else float("inf")
