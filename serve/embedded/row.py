"""A request on its way through the batch: what it asked for, where its events go, and what it has generated so far."""

import asyncio
import time
from typing import Dict, List, Optional, Union

import torch
from torch import Tensor

from .errors import ApiError, failed
from .sampling import Choice, Sampler, choices, likeliest, shortest
from .shapes import PrefillToken, Token, TokenEvent
from .text import Spelling, Text
from .validation import Accepted

# What torch raises, and what a mistake of ours would: that must not end the thread that everybody needs.
BROKEN = (RuntimeError, MemoryError, ArithmeticError, AssertionError, AttributeError, LookupError, TypeError, ValueError)


class Job:
    """One sequence to generate. ``events`` gets every token when ``stream``, otherwise only the last; or an ApiError.

    Setting ``cancelled`` (from any thread) frees its row before the next token. The rest is filled in before the last event.
    """

    def __init__(self, accepted: Accepted, stream: bool) -> None:
        self.accepted, self.stream = accepted, stream
        self.events: asyncio.Queue = asyncio.Queue()
        self.cancelled = False
        self.over = False  # its last event was received
        self.submitted = self.started = self.ended = time.perf_counter()
        self.generated_text = ""
        self.tokens: List[Token] = []
        self.top_tokens: List[List[Token]] = []
        self.prefill: List[PrefillToken] = []
        self.finish_reason = ""

    def finish(self, row: "Row") -> None:
        self.generated_text = row.spelling.whole()
        self.ended = time.perf_counter()


class Row:
    """A job in the batch. ``length``: its tokens in the cache; ``reserved``: for how many room is kept there; ``tokens``: generated
    ones, the last not yet in the cache."""

    def __init__(self, job: Job, text: Text) -> None:
        self.job, self.length = job, 0
        self.reserved = job.accepted.reserved()
        self.tokens = job.tokens
        self.sampler = Sampler(job.accepted.sampling, job.accepted.ids)
        self.spelling = Spelling(text, job.accepted.ids)
        self._tail = ""
        self._before: Optional[Tensor] = None  # log-probabilities behind the last prompt token read, [V]

    def reserve(self) -> None:
        """Before a turn: the next token has room too."""
        if self.length >= self.reserved:
            self.reserved = self.job.accepted.reserved(self.length + 1)

    def add_prefill(self, text: Text, piece: List[int], logits: Tensor) -> None:
        """Log-probabilities of the prompt's tokens ``piece`` given those before; ``logits`` [n, V] stand behind each of them."""
        behind = torch.log_softmax(logits, -1)
        ahead = behind[:-1] if self._before is None else torch.cat([self._before[None], behind[:-1]])
        values: List[Optional[float]] = [None] if self._before is None else []
        wanted = piece[len(values) :]
        values += [shortest(float(line[one])) for line, one in zip(ahead, wanted)]
        self.job.prefill += [PrefillToken(one, text.decode([one]), value) for one, value in zip(piece, values)]
        self._before = behind[-1]

    def add(self, text: Text, choice: Choice) -> TokenEvent:
        """Take the chosen token -> its event; ``finish_reason`` is set on the last one."""
        spelled = self.spelling.add(choice.id)
        token = Token(choice.id, spelled, choice.logprob, choice.id in text.special_ids)
        top = [Token(one, text.decode([one]), value, one in text.special_ids) for one, value in choice.top]
        self.tokens.append(token)
        if self.job.accepted.sampling.top_n_tokens:
            self.job.top_tokens.append(top)
        self.job.finish_reason = self._finish_reason(token, text) or ""
        if self.job.finish_reason and not spelled:
            token.text = self.spelling.rest()
        return TokenEvent(token, top, self.job.finish_reason or None)

    def _finish_reason(self, token: Token, text: Text) -> Optional[str]:
        """The length is looked at first, so an EOS on the last allowed token reports ``length``."""
        accepted = self.job.accepted
        self._tail += token.text
        if len(self.tokens) >= accepted.max_new_tokens:
            return "length"
        if token.id in text.stop_ids:
            return "eos_token"
        for stop in accepted.stop:  # at the very end of the text, or before one last line feed
            if self._tail.endswith(stop) or self._tail.endswith(stop + "\n"):
                return "stop_sequence"
        longest = max((len(stop) for stop in accepted.stop), default=0)
        self._tail = self._tail[-longest - 1 :]
        return None


def choose(rows: List[Row], logits: Tensor, best: Optional[Tensor]) -> List[Union[Choice, ApiError]]:
    """The next token of each row; ``logits`` [B, V]; ``best``: what ``likeliest`` gives for them (and more), where it is known.
    How a row is treated depends on that row alone, and so does its failure."""
    plain = [place for place, row in enumerate(rows) if row.sampler.plain]
    found: Dict[int, Union[Choice, ApiError]] = {}
    if plain:
        these = slice(len(rows)) if len(plain) == len(rows) else plain
        found.update(zip(plain, choices(likeliest(logits[these]) if best is None else best[:, these])))
    for place, row in enumerate(rows):
        if place not in found:
            try:
                found[place] = row.sampler.pick(logits[place])
            except BROKEN as error:
                found[place] = failed(words(error))
    return [found[place] for place in range(len(rows))]


def words(error: BaseException) -> str:
    return "%s: %s" % (type(error).__name__, str(error).split("\n")[0])
