"""Turns -> ids and what of them is learnt, for many records in a few calls of the tokenizer.

First every record becomes texts (``plan``), then all texts are tokenized, then the ids are put together (``sequences``): a call
of its own for each text would cost as much as a hundred words in it.
"""

from typing import Any, Dict, Iterator, List, NamedTuple

from . import tokens
from .records import Record
from .template import PromptFormat, TurnEnd

IGNORED = -100


class Sequence(NamedTuple):
    """``ids`` [n] and ``learn`` [n]: whether ``ids[i]`` is to be predicted from those before it. The first never is."""

    ids: List[int]
    learn: List[bool]

    @property
    def targets(self) -> List[int]:
        """[n]: the id at i + 1 where it is learnt, else -100."""
        return [i if learn else IGNORED for i, learn in zip(self.ids[1:], self.learn[1:])] + [IGNORED]


class Piece(NamedTuple):
    """One turn: ``asked`` is what comes between the answer before it and its own ``answer``."""

    asked: str
    answer: str
    learn: bool


class Plan(NamedTuple):
    """The texts of a record: ``text`` of a pretrain record, or the pieces of the others. Neither: nothing to learn."""

    text: str
    pieces: List[Piece]


class SpanEncoder:
    """``eos_id`` ends pretrain texts; ``end``/``end_id`` ends answers."""

    def __init__(self, tokenizer: Any, form: PromptFormat, end: TurnEnd, end_id: int, eos_id: int) -> None:
        self.form, self.end, self.end_id, self.eos_id = form, end, end_id, eos_id
        self.many = tokens.Many(tokenizer)
        self.continuation = tokens.Continuation(tokenizer)

    def plan(self, record: Record) -> Plan:
        """Raises TemplateRefused for a record that the model's template does not take."""
        if record.kind == "pretrain":
            text = record.fields["text"]
            return Plan(text if text.strip() else "", [])
        turns = self.form.turns(record.kind, record.fields)
        while turns and not turns[-1].learn:
            turns.pop()
        pieces = []
        done = 0  # characters of the text so far
        for turn in turns:
            pieces.append(Piece(turn.prompt[done:], turn.answer, turn.learn))
            done = len(turn.prompt) + len(turn.answer) + len(self.end.text)
        return Plan("", pieces)

    def sequences(self, plans: List[Plan]) -> List[Sequence]:
        """One for each plan, not cut to any length, ending with the last learnt token. Nothing learnt: ids is empty."""
        texts: Dict[bool, List[str]] = {False: [], True: []}  # by whether the tokenizer adds what it puts before a prompt
        for plan in plans:
            if plan.text:
                texts[True].append(plan.text)
            for number, (asked, answer, _) in enumerate(plan.pieces):
                whole = asked + answer + self.end.text
                if number:  # after a special token, across which tokenizers never look
                    texts[False] += [self.end.token + asked, self.end.token + whole]
                else:
                    texts[not self.form.own] += [asked, whole]
        ids = {special: iter(self.many(some, special)) for special, some in texts.items()}
        return [self._text(next(ids[True])) if plan.text else self._turns(plan.pieces, ids) for plan in plans]

    def _text(self, ids: List[int]) -> Sequence:
        ids = ids + [self.eos_id]
        return Sequence(ids, [False] + [True] * (len(ids) - 1))

    def _turns(self, pieces: List[Piece], found: Dict[bool, Iterator[List[int]]]) -> Sequence:
        ids: List[int] = []
        learn: List[bool] = []
        for number, piece in enumerate(pieces):
            if number:
                prompt, both = next(found[False])[1:], next(found[False])[1:]
            else:
                prompt, both = next(found[not self.form.own]), next(found[not self.form.own])
            start = len(prompt)
            if both[:start] != prompt:
                alone = prompt + self.continuation(piece.answer + self.end.before) + [self.end_id]
                if number == len(pieces) - 1:
                    both = alone
                else:  # the history is tokenized as one text; a token that merged across the seam belongs to no answer
                    start = len(both) - min(tokens.common_suffix(alone, both), len(alone) - start)
            ids += both
            learn += [False] * start + [piece.learn] * (len(both) - start)
        return Sequence(ids, [False] + learn[1:]) if ids else Sequence([], [])
