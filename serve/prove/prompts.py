"""What a server is asked, and what training made of the same: the run's own records, or a few fixed ones, as prompts with ids."""

import random
from itertools import islice
from pathlib import Path
from typing import Any, Dict, Iterable, Iterator, List, NamedTuple, Optional, Tuple

import numpy as np

from pipeline_train.data import records
from pipeline_train.data.encode import TextCodec
from pipeline_train.data.records import Record
from pipeline_train.data.template import Messages, TemplateRefused, messages_of, render

MOST_READ = 200_000  # records of a file that are looked at
LONGEST_TEXT = 1000  # characters of a pretrain text that are sent

FIXED: List[Tuple[str, Dict[str, Any]]] = [
    ("instruct", {"instruct": "Name three colours.", "input": None, "output": "Red, green and blue."}),
    ("instruct", {"instruct": "Translate into Chinese.", "input": "The weather is fine.", "output": "天气很好。"}),
    ("conversation", {"system": None, "rounds": [("ask", "What is the capital of France?"), ("ans", "Paris."),
                                                 ("ask", "And of Italy?"), ("ans", "Rome, it's 2 hours away.")]}),
    ("conversation", {"system": None, "rounds": [("ask", "你好，今天天气怎么样？\n（简短回答）"), ("ans", "很好！")]}),
    ("ref_qa", {"system": None, "reference": "def add(a, b):\n    return a + b",
                "rounds": [("ask", "What does it do?"), ("ans", "It adds.")]}),
    ("pretrain", {"text": "The quick brown fox jumps over the lazy dog, 3.14159 times.\n\n你好，世界。"}),
]  # fmt: skip


class Prompt(NamedTuple):
    """One answer of a record. ``ids``: what training put before it. ``text``: what /generate must be sent to get those ids, None
    when no text gives them there. ``messages``: the same for the chat route, None when that is not the way. ``rendered``: the
    prompt as the template writes it. ``closing``: ``text`` and the trained answer, after which training put an end of turn; None
    when it cannot be sent as one text. ``closing_ids``: its ids."""

    where: str
    ids: List[int]
    text: Optional[str]
    messages: Optional[Messages]
    chat_text: str
    closing: Optional[str]
    closing_ids: List[int]


def fixed_records() -> List[Record]:
    return [Record(kind, dict(fields), "fixed record %d" % number) for number, (kind, fields) in enumerate(FIXED, 1)]


def chosen_records(path: str, on_bad: str, number: int) -> List[Record]:
    """``number`` records of a file, the same ones every time, evenly drawn and of every kind in turn. UserError as records.read."""
    draw = random.Random(20240229)
    kept: Dict[str, List[Record]] = {}
    seen: Dict[str, int] = {}
    for record in islice(records.read(path, on_bad), MOST_READ):
        count = seen[record.kind] = seen.get(record.kind, 0) + 1
        some = kept.setdefault(record.kind, [])
        if len(some) < number:
            some.append(record)
        elif draw.randrange(count) < number:
            some[draw.randrange(number)] = record
    turn_by_turn = (some[i] for i in range(number) for some in kept.values() if i < len(some))
    return list(islice(turn_by_turn, number))


def prompts_of(codec: TextCodec, some: Iterable[Record], longest: int) -> Iterator[List[Prompt]]:
    """The prompts of each record that has any of at most ``longest`` ids: of a conversation those of its first and last answer."""
    for record in some:
        try:
            made = _of_text(codec, record) if record.kind == "pretrain" else _of_turns(codec, record)
        except TemplateRefused:  # the run left it out, too
            continue
        found = [prompt for prompt in made if 0 < len(prompt.ids) <= longest]
        if found:
            yield [p if len(p.closing_ids) <= longest else p._replace(closing=None, closing_ids=[]) for p in found]


def stored_ids(data: Path, line: int) -> Optional[List[int]]:
    """The ids of a line's first sample in the run's encoded data (<out>/data, written as pipeline_train/data/feed.py says); None
    where that is not there any more, or holds no such line."""
    try:
        ids = np.load(str(data / "train.ids.npy"), mmap_mode="r", allow_pickle=False)
        offsets = np.load(str(data / "train.offsets.npy"), mmap_mode="r", allow_pickle=False)
        first, count = offsets[np.flatnonzero(offsets[:, 2] == line)[0], :2]
        found: List[int] = ids[int(first) : int(first) + int(count) + 1].tolist()
    except (OSError, ValueError, IndexError, TypeError):
        return None
    return found


def _of_text(codec: TextCodec, record: Record) -> List[Prompt]:
    text = record.fields["text"][:LONGEST_TEXT]
    ids = codec.encode(Record("pretrain", {"text": text}, record.where)).ids[:-1]
    return [Prompt(record.where, ids, text, None, "", None, [])]


def _of_turns(codec: TextCodec, record: Record) -> List[Prompt]:
    turns = codec.format.turns(record.kind, record.fields)
    learnt = [number for number, turn in enumerate(turns) if turn.learn]
    made = []
    for number in sorted({learnt[0], learnt[-1]}) if learnt else []:
        part = _up_to(record, number)
        sequence = codec.encode(part)
        start = len(sequence.ids)
        while start and sequence.learn[start - 1]:
            start -= 1
        ids = sequence.ids[:start]
        text = _sendable(codec, turns[number].prompt, ids)
        messages = _messages(codec, part, ids)
        chat_text = "" if messages is None else render(codec.chat_template, messages, True, codec.format.tokens)
        closing = None if text is None else text + turns[number].answer + codec.end.before
        if closing is None or codec.prompt_ids(closing) != sequence.ids[:-1]:
            closing = None
        where = record.where if len(turns) == 1 else "%s, answer %d" % (record.where, number + 1)
        made.append(Prompt(where, ids, text, messages, chat_text, closing, sequence.ids[:-1] if closing else []))
    return made


def _up_to(record: Record, number: int) -> Record:
    """The record up to its answer ``number``."""
    if record.kind == "instruct":
        return record
    rounds: List[Any] = []
    answers = 0
    for who, text in record.fields["rounds"]:
        rounds.append((who, text))
        answers += who == "ans"
        if answers > number:
            break
    return Record(record.kind, dict(record.fields, rounds=rounds), record.where)


def _messages(codec: TextCodec, part: Record, ids: List[int]) -> Optional[Messages]:
    """What to send to the chat route; None for a prompt in another form, or where that route cannot give the ids of training."""
    if part.kind == "instruct" and not codec.format.own:
        return None
    messages = messages_of(part.kind, part.fields, codec.format.own)[:-1]
    return messages if codec.chat_ids(messages) == ids else None


def _sendable(codec: TextCodec, rendered: str, ids: List[int]) -> Optional[str]:
    """/generate puts a BOS of its own in front: one that the template wrote must not be sent, too."""
    bos = codec.tokenizer.bos_token
    shorter = rendered[len(bos) :] if bos and rendered.startswith(bos) else rendered
    return next((text for text in (rendered, shorter) if codec.prompt_ids(text) == ids), None)
