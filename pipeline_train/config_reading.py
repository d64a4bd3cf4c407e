"""Mappings against msgspec structs, with messages a user can act on: unknown keys by name, YAML's string floats, plain words."""

import difflib
import re
import reprlib
from typing import Any, Dict, List, Literal, Union

import msgspec
import yaml

from .errors import UserError


class NotYaml(ValueError):
    """The text is not YAML; the message is one line."""


class _Loader(yaml.SafeLoader):
    """Refuses a key that is given twice in one mapping, where PyYAML silently takes the last."""

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen = set()
        for key, _ in node.value:
            name = key.value if isinstance(key, yaml.ScalarNode) else None
            if name is not None and name in seen:
                raise yaml.constructor.ConstructorError(None, None, 'the key "%s" is given twice' % name, key.start_mark)
            seen.add(name)
        return super().construct_mapping(node, deep)


def read_yaml(text: str) -> Any:
    """YAML with safe constructors only, whose every complaint is NotYaml: PyYAML lets its constructors' errors through (bad dates,
    "!!int x", thousands of digits or brackets)."""
    try:
        return yaml.load(text, _Loader)
    except RecursionError:
        raise NotYaml("nested too deeply") from None
    except (yaml.YAMLError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as error:
        raise NotYaml(
            " ".join(str(error).replace(' in "<unicode string>", line', " in line").split()) or type(error).__name__
        ) from None


def _struct_of(annotation: Any) -> Any:
    """The Section behind an annotation such as Optional[Export], or None."""
    options = getattr(annotation, "__args__", None) or (annotation,)
    return next((o for o in options if isinstance(o, type) and issubclass(o, msgspec.Struct)), None)


def _fields(struct: Any) -> Dict[str, Any]:
    """Key in the file -> annotation."""
    hints = {}  # type: Dict[str, Any]
    for base in reversed(struct.__mro__):
        hints.update(getattr(base, "__annotations__", {}))
    return {outer: hints[inner] for outer, inner in zip(struct.__struct_encode_fields__, struct.__struct_fields__)}


def refuse_unknown(raw: Any, struct: Any, where: str, prefix: str) -> None:
    """Raise UserError for the first key at any depth that the struct does not have, with the nearest match."""
    if not isinstance(raw, dict):
        return  # msgspec says what was expected
    known = _fields(struct)
    for key, value in raw.items():
        if key not in known:
            near = difflib.get_close_matches(str(key), list(known), 1)
            hint = 'Did you mean "%s"?' % near[0] if near else "Known here: %s." % ", ".join(known)
            raise UserError("%s: %s%s: unknown key. %s" % (where, prefix, key, hint))
        child = _struct_of(known[key])
        if child is not None:
            refuse_unknown(value, child, where, "%s%s." % (prefix, key))


def number_strings(raw: Any, struct: Any) -> Any:
    """YAML 1.1 reads 1e-5 as a string; where a float belongs, take it as the number that was meant."""
    if not isinstance(raw, dict):
        return raw
    known, out = _fields(struct), dict(raw)
    for key, value in raw.items():
        annotation = known.get(key)
        child = _struct_of(annotation)
        if child is not None:
            # A section with nothing in it, its keys commented out, say: all defaults.
            out[key] = number_strings({} if value is None and annotation is child else value, child)
        elif annotation is float:
            out[key] = _as_number(value)
        elif annotation == List[float] and isinstance(value, list):
            out[key] = [_as_number(v) for v in value]
        elif annotation == Dict[str, Any] and isinstance(value, dict) and "zero_optimization" in value:
            out[key] = dict(value, zero_optimization=exponents(value["zero_optimization"]))
    return out


def exponents(value: Any) -> Any:
    """The same for ZeRO's keys, at any depth: only what can be nothing else, such as 5e8, and whole where it is whole. DeepSpeed's
    other sections have texts, such as job_name, that may look like it."""
    if isinstance(value, dict):
        return {key: exponents(below) for key, below in value.items()}
    if not isinstance(value, str) or not re.match(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]{1,2}$", value):
        return value
    number = float(value)
    return int(number) if number.is_integer() else number


def _as_number(value: Any) -> Any:
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


WORDS = {str: "text", int: "a whole number", float: "a number", bool: "true or false", type(None): "nothing"}
SHORT = reprlib.Repr()
SHORT.maxlevel, SHORT.maxstring = 1, 60


def plain(message: str, struct: Any, raw: Any) -> str:
    """msgspec's "Expected `int`, got `str` - at `$.a.b`" -> "a.b: expected a whole number, got 'two'": what may be there by
    ``struct``, and what is by ``raw``."""
    text, _, place = message.replace("`", "").partition(" - at $.")
    text = text[0].lower() + text[1:]
    if text.startswith("object missing required field "):
        name = text.rsplit(" ", 1)[1]
        return "%s: missing. It has no default." % (place + "." + name if place else name)
    if " - at key in $." in text:
        return "%s: its keys must be text" % text.partition(" - at key in $.")[2]
    if place and re.match("invalid enum value |expected .*, got [a-z]+$", text):
        allowed, found = struct, raw
        for key, index in re.findall(r"([^.\[\]]+)|\[(\d+)\]", place):
            allowed = _fields(_struct_of(allowed))[key] if key else _element(allowed)
            found = found[key] if key else found[int(index)]
        text = "expected %s, got %s" % (_wanted(allowed), "nothing" if found is None else SHORT.repr(found))
    return "%s: %s" % (place, text) if place else text


def _element(annotation: Any) -> Any:
    """List[int], or a Union with it -> int."""
    options = annotation.__args__ if _origin(annotation) is Union else (annotation,)
    return next(o for o in options if _origin(o) is list).__args__[0]


def _wanted(annotation: Any) -> str:
    if _origin(annotation) is Union:
        return " or ".join(_wanted(option) for option in annotation.__args__)
    if _origin(annotation) is Literal:
        return " or ".join(annotation.__args__)
    return "a list" if _origin(annotation) is list else WORDS.get(annotation, "a section")


def _origin(annotation: Any) -> Any:
    return getattr(annotation, "__origin__", None)
