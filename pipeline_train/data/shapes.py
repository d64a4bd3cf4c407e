"""One decoded value -> the kind and fields of a record, whichever of the seven shapes it has. Messages name the field."""

import difflib
import functools
import json
import re
from typing import Any, Dict, List, Literal, Optional, Tuple, Union

import msgspec


class BadRecord(ValueError):
    """One record is unusable; the message starts with the field."""


class Pretrain(msgspec.Struct):
    text: str


class Instruct(msgspec.Struct):
    instruct: str
    output: str
    input: Optional[str] = None


class Rounds(msgspec.Struct):
    rounds: List[Tuple[Literal["ask", "ans"], str]]
    system: Optional[str] = None


class RefQa(Rounds, kw_only=True):
    reference: str


class Alpaca(msgspec.Struct):
    instruction: str
    output: str
    input: Optional[str] = None
    system: Optional[str] = None
    history: Optional[List[Tuple[str, str]]] = None  # earlier questions with their answers


class Part(msgspec.Struct):
    type: Literal["text"]
    text: str


class Message(msgspec.Struct):
    role: str
    content: Union[str, List[Part]]
    weight: Optional[float] = None


class Said(msgspec.Struct):
    role: str = msgspec.field(name="from")
    content: str = msgspec.field(name="value")
    weight: Optional[float] = None


class Chat(msgspec.Struct):
    messages: List[Message]
    system: Optional[str] = None


class ShareGpt(msgspec.Struct):
    conversations: List[Said]
    system: Optional[str] = None


class ShareGptRoles(msgspec.Struct):
    conversations: List[Message]
    system: Optional[str] = None


STRUCTS = {"pretrain": Pretrain, "instruct": Instruct, "conversation": Rounds, "ref_qa": RefQa}
ROLES = {"user": "ask", "human": "ask", "assistant": "ans", "gpt": "ans", "chatgpt": "ans", "bing": "ans", "bard": "ans"}
PAIR = '["ask", text] or ["ans", text]'
SAID = ("role", "content", "from", "value", "weight")
EMPTY: Tuple[Any, ...] = (None, "", [], {})
NAMES = {"str": "text", "int": "a number", "float": "a number", "null": "null", "bool": "true or false", "array": "a list",
         "object": "an object"}  # fmt: skip


def recognise(value: Any) -> Tuple[str, Dict[str, Any]]:
    if not isinstance(value, dict):
        raise BadRecord("expected an object {...}, got %s" % _name(value))
    declared = value.get("type")
    if isinstance(declared, str) and declared in STRUCTS:
        record = _convert(value, STRUCTS[declared])
        fields = {name: getattr(record, name) for name in record.__struct_fields__}
        kind = declared
        if "rounds" in fields:
            fields["rounds"] = [(who, text) for who, text in fields["rounds"]]
            _check_rounds([("rounds[%d]" % i, who, text) for i, (who, text) in enumerate(fields["rounds"])], "rounds")
    elif "instruction" in value:
        kind, fields = _alpaca(_convert(value, Alpaca))
    elif "messages" in value or "conversations" in value:
        kind, fields = "conversation", _chat(value)
    else:
        raise BadRecord(_unknown(value))
    for name, text in fields.items():
        if isinstance(text, str):
            _check_text(name, text, blank=name in ("text", "output", "input", "system"))
    return kind, fields


def unused(value: Dict[str, Any]) -> List[str]:
    """The keys of a good record that nothing is made of, as far as something stands there; ``messages[].name``: of its messages."""
    kind = value.get("type")
    if isinstance(kind, str) and kind in STRUCTS:
        known: Tuple[str, ...] = ("type",) + STRUCTS[kind].__struct_encode_fields__
    else:
        known = (Alpaca if "instruction" in value else Chat if "messages" in value else ShareGpt).__struct_encode_fields__
    found = [key for key, there in value.items() if key not in known and there not in EMPTY]
    for key in ("messages", "conversations"):
        if key in known:
            inside = {name for message in value[key] for name, there in message.items() if name not in SAID and there not in EMPTY}
            found += ["%s[].%s" % (key, name) for name in sorted(inside)]
    return found


def _alpaca(record: Alpaca) -> Tuple[str, Dict[str, Any]]:
    """With a system text or a history it is a conversation, whose last question has the input behind it."""
    _check_text("instruction", record.instruction)
    if not record.system and not record.history:
        return "instruct", {"instruct": record.instruction, "input": record.input, "output": record.output}
    _check_text("output", record.output, blank=True)
    rounds = [said for ask, ans in record.history or [] for said in (("ask", ask), ("ans", ans))]
    if rounds:
        _check_rounds([("history[%d]" % (i // 2), who, text) for i, (who, text) in enumerate(rounds)], "history")
    ask = record.instruction
    if record.input is not None and record.input.strip():
        _check_text("input", record.input)
        ask += "\n" + record.input
    rounds += [("ask", ask), ("ans", record.output)]
    return "conversation", {"rounds": rounds, "system": record.system}


def _chat(value: Dict[str, Any]) -> Dict[str, Any]:
    """ShareGPT and OpenAI messages -> rounds and system."""
    key = "messages" if "messages" in value else "conversations"
    said = value[key]
    plain = isinstance(said, list) and any(isinstance(s, dict) and "role" in s for s in said)
    chat = _convert(value, Chat if key == "messages" else ShareGptRoles if plain else ShareGpt)
    messages, system = getattr(chat, key), chat.system
    rounds = []
    for i, message in enumerate(messages):
        place = "%s[%d]" % (key, i)
        said = message.content
        text = said if isinstance(said, str) else "".join(part.text for part in said)
        if message.weight == 0 and ROLES.get(message.role) == "ans":
            raise BadRecord("%s.weight: expected 1 or none, got 0; every answer of a record is learnt" % place)
        if message.role in ("system", "developer") and i == 0:
            system = text
        elif message.role in ROLES:
            rounds.append((place, ROLES[message.role], text))
        else:
            who = "role" if isinstance(message, Message) else "from"
            first = " (system only as the first)" if message.role == "system" else ""
            wanted = "system, user or assistant" if who == "role" else "system, human or gpt"
            raise BadRecord("%s.%s: expected %s%s, got %s" % (place, who, wanted, first, _quote(message.role)))
    _check_rounds(rounds, key)
    return {"rounds": [(who, text) for _, who, text in rounds], "system": system}


def _check_rounds(rounds: List[Tuple[str, str, str]], key: str) -> None:
    if not rounds:
        raise BadRecord("%s: expected at least one question and one answer, got none" % key)
    before = "ans"
    for place, who, text in rounds:
        if who == "ans" and before == "ans":
            raise BadRecord("%s: expected a question before this answer" % place)
        _check_text(place, text, blank=who == "ans")
        before = who


def _check_text(place: str, text: str, blank: bool = False) -> None:
    if not blank and not text.strip():
        raise BadRecord("%s: expected text, got %s" % (place, "only blanks" if text else "an empty string"))
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadRecord("%s: expected valid text, got half a surrogate pair %s" % (place, ascii(text[error.start]))) from None


def _convert(value: Dict[str, Any], struct: Any) -> Any:
    known = struct.__struct_encode_fields__
    for key in value:
        near = "" if key in known else _near(key, known)
        if near and near not in value:
            raise BadRecord('%s: missing, but there is %s; did you mean "%s"?' % (near, _quote(key), near))
    try:
        return msgspec.convert(value, struct)
    except msgspec.ValidationError as error:
        raise BadRecord(_plain(str(error))) from None
    except UnicodeEncodeError as error:  # in a key, or in a text that must be one of a few words
        raise BadRecord("expected valid text, got half a surrogate pair %s" % ascii(error.object[error.start])) from None


@functools.lru_cache(maxsize=1024)
def _near(key: str, known: Tuple[str, ...]) -> str:
    """The known field that a key seems to mean, or ""."""
    return (difflib.get_close_matches(key.lower(), known, 1, 0.8) + [""])[0]


def _plain(message: str) -> str:
    """msgspec's "Expected `str`, got `int` - at `$.rounds[0][1]`" -> "rounds[0][1]: expected text, got a number"."""
    text, _, place = message.partition(" - at `$")
    place = place.rstrip("`").lstrip(".")
    pair = re.match(r"rounds\[\d+\]$", place)
    missing = re.match(r"Object missing required field `(\w+)`", text)
    if missing:
        name = "%s.%s" % (place, missing.group(1)) if place else missing.group(1)
        return "%s: missing, expected %s" % (name, "a list of " + PAIR if name == "rounds" else "text")
    enum = re.match(r"Invalid enum value (.*)", text)
    if enum:
        wanted = '"ask" or "ans"' if place.startswith("rounds") else '"text" (other parts cannot be trained)'
        return "%s: expected %s, got %s" % (place, wanted, _quote(enum.group(1).strip("'")))
    length = re.match(r"Expected `array` of length 2, got (\d+)", text)
    if length:
        return "%s: expected %s, got a list of %s" % (place, PAIR, length.group(1))
    wanted, _, got = text.replace("Expected ", "").replace("`", "").partition(", got ")
    said = " or ".join(NAMES.get(w, w) for w in wanted.split(" | "))
    return "%s: expected %s, got %s" % (place, PAIR if pair else said, NAMES.get(got, got))


def _unknown(value: Dict[str, Any]) -> str:
    kinds = ", ".join(STRUCTS)
    if "type" in value:
        return "type: expected one of %s, got %s" % (kinds, _quote(value["type"]))
    if "text" in value:
        return 'type: missing; add "type": "pretrain" to learn all of "text"'
    keys = ", ".join(sorted(str(k) for k in value)[:8])
    return "type: missing, expected one of %s, or the keys of alpaca, ShareGPT or OpenAI records; found %s" % (
        kinds,
        "the keys " + keys if keys else "an empty object",
    )


def _name(value: Any) -> str:
    kinds = {str: "text", bool: "true or false", int: "a number", float: "a number", list: "a list", type(None): "null"}
    return kinds.get(type(value), type(value).__name__)


def _quote(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 40 else text[:37] + "..."
