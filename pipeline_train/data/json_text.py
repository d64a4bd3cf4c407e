"""JSON text -> values, and what is wrong with it in words for the person who wrote it."""

import json
import re
from pathlib import Path
from typing import Any, Iterator, Tuple

import msgspec

from ..errors import UserError

Value = Tuple[str, Any]  # (place in the file, value); see data.files
BLANK = re.compile(r"[ \t\r\n]*")
COMMENT = re.compile(r"[ \t\r\n]*(//|/\*)")
TRAILING_COMMA = re.compile(r"[ \t\r\n]*,?[ \t\r\n]*[\]}]")


def decode_line(line: bytes) -> Any:
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


def listed(path: Path, text: str, position: int) -> Iterator[Value]:
    """The items of a JSON list whose "[" ends at ``position``."""
    lines = _Lines(text)
    position = blanks(text, position)
    while text[position : position + 1] != "]":
        where = ":%d" % lines.at(position)
        value, position = _value(path, text, position)
        yield where, value
        position = blanks(text, position)
        mark = text[position : position + 1]
        if mark == ",":
            position = blanks(text, position + 1)
            if text[position : position + 1] != "]":
                continue
        if mark != "]":
            hint = _json5_hint(text, position) or (
                "the list is not closed" if not mark else 'expected "," or "]" after this record'
            )
            raise UserError("%s:%d: not valid JSON: %s" % (path, lines.at(position), hint))
    rest = blanks(text, position + 1)
    if rest != len(text):
        hint = _json5_hint(text, rest) or "there is more after the list"
        raise UserError("%s:%d: not valid JSON: %s" % (path, lines.at(rest), hint))


def following(path: Path, text: str, position: int) -> Iterator[Value]:
    """JSON objects one after another."""
    lines = _Lines(text)
    while position < len(text):
        where = ":%d" % lines.at(position)
        value, position = _value(path, text, position)
        yield where, value
        position = blanks(text, position)


def _value(path: Path, text: str, position: int) -> Tuple[Any, int]:
    try:
        return json.JSONDecoder(parse_int=_int).raw_decode(text, position)
    except json.JSONDecodeError as error:
        line = text.count("\n", 0, error.pos) + 1
        raise UserError("%s:%d: %s" % (path, line, _not_json(text, error))) from None
    except RecursionError:
        raise UserError("%s:%d: nested too deeply" % (path, text.count("\n", 0, position) + 1)) from None


class _Lines:
    """Line numbers of growing positions, each newline counted once."""

    def __init__(self, text: str) -> None:
        self.text, self.line, self.counted = text, 1, 0

    def at(self, position: int) -> int:
        self.line += self.text.count("\n", self.counted, position)
        self.counted = position
        return self.line


def blanks(text: str, position: int) -> int:
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
