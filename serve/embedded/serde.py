"""Request bodies: JSON to checked Python values, with the messages the original server's parser (serde) gives.

A body that is not JSON is a 400, a JSON body of the wrong shape a 422; both answer plain text that says where.
The document is parsed by the standard library; only when something is wrong are line and column searched.
"""

import json
import re
from json.decoder import WHITESPACE, scanstring  # type: ignore[attr-defined]
from typing import Any, Callable, Dict, NamedTuple, NoReturn, Optional, Tuple, Union

Path = Tuple[Union[str, int], ...]
Check = Callable[[Any, Path], Any]
HALF = re.compile(r"\\u[dD][89a-fA-F]")  # an escape that makes sense only as one of two


class BodyError(Exception):
    """A request whose body cannot be used: HTTP ``status`` and the plain ``text`` of the answer."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status, self.text = status, text


class Mismatch(Exception):
    """A value of the wrong type at ``path``; ``whole``: it is an object that lacks something."""

    def __init__(self, path: Path, message: str) -> None:
        super().__init__(message)
        self.path, self.message = path, message


class Field(NamedTuple):
    """One key of an object. ``default`` None and not ``nullable`` means that null is refused but absence is fine."""

    check: Check
    nullable: bool = False
    required: bool = False
    default: Any = None
    alias: str = ""


def parse(body: bytes, check: Check) -> Any:
    """-> the checked value; BodyError 400 or 422 otherwise."""
    text, value = _load(body)
    try:
        return check(value, ())
    except Mismatch as error:
        where = _dotted(error.path)
        line, column = _line_column(text, _end_of(text, error.path))
        message = "%s%s at line %d column %d" % (where + ": " if where else "", error.message, line, column)
        raise BodyError(422, "Failed to deserialize the JSON body into the target type: " + message) from None


def struct(name: str, fields: Dict[str, Field]) -> Check:
    """An object with known keys; others are ignored, as the original does. -> a dict with every field."""
    names = {alias: key for key, field in fields.items() for alias in (key, field.alias) if alias}

    def check(value: Any, path: Path) -> Dict[str, Any]:
        if not isinstance(value, dict):
            _refuse(value, path, "struct " + name)
        found: Dict[str, Any] = {}
        for key, item in value.items():
            if key not in names:
                continue
            field = fields[names[key]]
            if names[key] in found:
                raise Mismatch(path + (key,), "duplicate field `%s`" % names[key])
            found[names[key]] = None if item is None and field.nullable else field.check(item, path + (key,))
        for key, field in fields.items():
            if key not in found:
                if field.required:
                    raise Mismatch(path, "missing field `%s`" % key)
                found[key] = field.default
        return found

    return check


def sequence(item: Check) -> Check:
    def check(value: Any, path: Path) -> list:
        if not isinstance(value, list):
            _refuse(value, path, "a sequence")
        return [item(one, path + (number,)) for number, one in enumerate(value)]

    return check


def string(value: Any, path: Path) -> str:
    if not isinstance(value, str):
        _refuse(value, path, "a string")
    return value


def boolean(value: Any, path: Path) -> bool:
    if not isinstance(value, bool):
        _refuse(value, path, "a boolean")
    return value


def number(value: Any, path: Path) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        _refuse(value, path, "f32")
    try:
        return float(value)
    except OverflowError:  # an integer of more than 308 digits
        return float("inf") if value > 0 else float("-inf")


def integer(kind: str, low: int, high: int) -> Check:
    def check(value: Any, path: Path) -> int:
        if isinstance(value, bool) or not isinstance(value, int):
            _refuse(value, path, kind)
        if not low <= value <= high:
            raise Mismatch(path, "invalid value: integer `%d`, expected %s" % (value, kind))
        return value

    return check


i32 = integer("i32", -(2**31), 2**31 - 1)
u32 = integer("u32", 0, 2**32 - 1)
u64 = integer("u64", 0, 2**64 - 1)
usize = integer("usize", 0, 2**64 - 1)


def anything(value: Any, path: Path) -> Any:
    return value


def one_of(expected: str, *checks: Check) -> Check:
    """The first of ``checks`` that accepts the value, as serde's untagged enums do."""

    def check(value: Any, path: Path) -> Any:
        for each in checks:
            try:
                return each(value, path)
            except Mismatch:
                continue
        raise Mismatch(path, "data did not match any variant of untagged enum " + expected)

    return check


def _refuse(value: Any, path: Path, expected: str) -> NoReturn:
    if value is None:
        what = "null"
    elif isinstance(value, bool):
        what = "boolean `%s`" % str(value).lower()
    elif isinstance(value, int):
        what = "integer `%d`" % value
    elif isinstance(value, float):
        what = "floating point `%r`" % value
    elif isinstance(value, str):
        what = "string %s" % json.dumps(value, ensure_ascii=False)
    else:
        what = "sequence" if isinstance(value, list) else "map"
    raise Mismatch(path, "invalid type: %s, expected %s" % (what, expected))


def _dotted(path: Path) -> str:
    text = "".join("[%d]" % part if isinstance(part, int) else "." + part for part in path)
    return text[1:] if text.startswith(".") else text


SYNTAX = [  # the standard library's message -> the original's, at the end of the text and elsewhere
    ("Unterminated string", "EOF while parsing a string", "EOF while parsing a string"),
    ("Invalid control character", "", "control character (\\u0000-\\u001F) found while parsing a string"),
    ("Invalid \\", "EOF while parsing a string", "invalid escape"),
    ("Expecting property name", "EOF while parsing an object", "key must be a string"),
    ("Illegal trailing comma", "", "trailing comma"),
    ("Expecting ':'", "EOF while parsing an object", "expected `:`"),
    ("Expecting ','", "EOF while parsing an object", "expected `,` or `}`"),
    ("Extra data", "", "trailing characters"),
    ("", "EOF while parsing a value", "expected value"),
]


def _load(body: bytes) -> Tuple[str, Any]:
    try:
        text = body.decode("utf-8")
        value = json.loads(text, parse_constant=_no_constant, parse_float=_finite)
        half = HALF.search(text)
        if half:
            _whole_characters(text, value, half.start())
        return text, value
    except UnicodeDecodeError as error:
        _syntax(body[: error.start].decode("utf-8"), error.start, "invalid unicode code point")
    except json.JSONDecodeError as error:
        at_end = not text[error.pos :].strip() or error.msg.startswith("Unterminated")
        eof, elsewhere = next(pair for start, *pair in SYNTAX if error.msg.startswith(start))
        _syntax(text, len(text) if at_end and eof else error.pos + 1, eof if at_end and eof else elsewhere)
    except RecursionError:
        _syntax(text, 128, "recursion limit exceeded")
    except ValueError as error:  # parse_constant, parse_float, or an integer longer than Python converts
        known = re.fullmatch(r"expected value|number out of range", str(error))
        _syntax(text, 1, str(error) if known else "number out of range")


def _whole_characters(text: str, value: Any, position: int) -> None:
    """Half a surrogate pair is a character that no encoding can carry: refused wherever it stands, as serde does."""
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        _syntax(text, position + 6, "lone leading surrogate in hex escape")


def _no_constant(name: str) -> NoReturn:
    raise ValueError("expected value")


def _finite(digits: str) -> float:
    value = float(digits)
    if value in (float("inf"), float("-inf")):
        raise ValueError("number out of range")
    return value


def _syntax(text: str, position: int, message: str) -> NoReturn:
    line, column = _line_column(text, position)
    raise BodyError(400, "Failed to parse the request body as JSON: %s at line %d column %d" % (message, line, column))


def _line_column(text: str, position: int) -> Tuple[int, int]:
    """Lines from 1; the column is the number of bytes of the line up to ``position``."""
    before = text[:position]
    return before.count("\n") + 1, len(before[before.rfind("\n") + 1 :].encode("utf-8", "replace"))


def _end_of(text: str, path: Path) -> int:
    """Index just behind the value at ``path`` in a valid JSON ``text``."""
    decode = json.JSONDecoder().raw_decode
    position = _skip(text, 0)
    for part in path:  # every container on the way was entered at its bracket
        position = _skip(text, position + 1)
        seen = 0
        while True:
            key: Optional[Union[str, int]] = seen
            if isinstance(part, str):
                key, position = scanstring(text, position + 1)
                position = _skip(text, _skip(text, position) + 1)
            if key == part:
                break
            position = _skip(text, _skip(text, decode(text, position)[1]) + 1)
            seen += 1
    return decode(text, position)[1]


def _skip(text: str, position: int) -> int:
    return WHITESPACE.match(text, position).end()
