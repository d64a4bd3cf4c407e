"""One request's choice of its next token. Nothing here depends on the other requests of a batch.

The order of the original: repetition penalty, frequency penalty, temperature, top-k, top-p, typical-p, then the choice.
Log-probabilities are those after all of it, so they can be exactly 0.
"""

import math
import random
from dataclasses import dataclass, field
from typing import List, Optional, Sequence, Tuple

import numpy
import torch
from torch import Tensor

from .validation import Sampling

HUGE = 3e38  # a float32 that is not yet infinite


@dataclass
class Choice:
    """A token id, its log-probability (None when it has none: nan or -inf), and the likeliest ids with theirs when asked for."""

    id: int
    logprob: Optional[float]
    top: List[Tuple[int, Optional[float]]] = field(default_factory=list)


class Sampler:
    """State of one request: its random numbers and the tokens so far."""

    def __init__(self, how: Sampling, prompt: Sequence[int]) -> None:
        self.how = how
        self._random = random.Random(how.seed)
        self._penalised = how.repetition_penalty != 1.0 or how.frequency_penalty != 0.0
        self._ids: List[int] = list(prompt) if self._penalised else []
        self._counts: Optional[Tensor] = None

    @property
    def plain(self) -> bool:
        """True when the choice is the largest logit and nothing else is asked for: a batch can do such rows at once."""
        return self.how.seed is None and not self._penalised and not self.how.top_n_tokens

    def pick(self, logits: Tensor) -> Choice:
        """``logits``: float [V] of one row, not kept."""
        scores = torch.nan_to_num(logits.float(), nan=-HUGE, posinf=HUGE, neginf=-HUGE)
        if self._penalised:
            scores = self._penalise(scores)
        if self.how.seed is not None:
            scores = warp(scores, self.how)
        logprobs = torch.log_softmax(scores, -1)
        chosen = int(torch.argmax(scores)) if self.how.seed is None else self._draw(logprobs)
        if self._penalised:
            self._count(chosen)
        top: List[Tuple[int, Optional[float]]] = []
        if self.how.top_n_tokens:
            values, ids = torch.topk(logprobs, min(self.how.top_n_tokens, logprobs.shape[-1]))
            top = [(one, shortest(value)) for one, value in zip(ids.tolist(), values.tolist())]
        return Choice(chosen, shortest(float(logprobs[chosen])), top)

    def _draw(self, logprobs: Tensor) -> int:
        """Inverse of the cumulative distribution at one uniform number: one number per token, whatever the vocabulary."""
        total = numpy.cumsum(numpy.exp(logprobs.cpu().numpy()), dtype=numpy.float64)
        point = min(self._random.random() * total[-1], numpy.nextafter(total[-1], 0.0))
        return int(numpy.searchsorted(total, point, side="right"))  # the first sum above it: never a token of probability 0

    def _penalise(self, scores: Tensor) -> Tensor:
        """Repetition: positive logits of seen tokens are divided, negative ones multiplied (Keskar et al. 2019, section 4.1).
        Frequency: a seen token loses the penalty times its share of the text so far."""
        if self._counts is None:
            self._counts = torch.zeros(scores.shape[-1], device=scores.device)
            self._counts += torch.bincount(torch.tensor(self._ids, device=scores.device), minlength=scores.shape[-1])
        seen = self._counts > 0
        penalty = self.how.repetition_penalty
        if penalty != 1.0:
            scores = torch.where(seen, torch.where(scores < 0, scores * penalty, scores / penalty), scores)
        if self.how.frequency_penalty:
            scores = scores - self.how.frequency_penalty * self._counts / len(self._ids)
        return torch.clamp(scores, -HUGE, HUGE)

    def _count(self, chosen: int) -> None:
        self._ids.append(chosen)
        if self._counts is not None:
            self._counts[chosen] += 1


def warp(scores: Tensor, how: Sampling) -> Tensor:
    """Temperature and the three filters over ``scores`` [V]; what is filtered out becomes -inf. At least one token stays."""
    if how.temperature != 1.0:
        scores = torch.clamp(scores / how.temperature, -HUGE, HUGE)
    if 0 < how.top_k < scores.shape[-1]:
        scores = _only(scores, torch.topk(scores, how.top_k).indices)
    if how.top_p < 1.0:  # nucleus (Holtzman et al. 2019): the smallest set of likeliest tokens that holds top_p
        probs = torch.softmax(scores, -1)
        scores = _only(scores, _smallest_set(probs, probs, how.top_p))
    if how.typical_p < 1.0:  # locally typical (Meister et al. 2022): the set closest to the expected surprise
        logprobs = torch.log_softmax(scores, -1)
        probs = torch.exp(logprobs)
        entropy = -torch.nansum(probs * logprobs)
        scores = _only(scores, _smallest_set(-torch.abs(logprobs + entropy), probs, how.typical_p))
    return scores


def _smallest_set(rank: Tensor, probs: Tensor, mass: float) -> Tensor:
    """Ids in falling order of ``rank`` until their probabilities reach ``mass``. The whole vocabulary is rarely sorted."""
    size = probs.shape[-1]
    for count in (min(1024, size), size):
        ids = torch.topk(rank, count).indices
        chosen = probs[ids]
        reached = torch.cumsum(chosen, -1)
        if count == size or float(reached[-1]) >= mass:
            break
    return ids[: max(1, int((reached - chosen < mass).sum()))]  # the first even if ``mass`` is less than a float32 can say


def _only(scores: Tensor, ids: Tensor) -> Tensor:
    kept = torch.full_like(scores, -math.inf)
    kept[ids] = scores[ids]
    return kept


def likeliest(logits: Tensor) -> Tensor:
    """[B, V] -> double [2, B]: the largest logit of every row, the first of equals, and its log-probability."""
    rows = torch.nan_to_num(logits.float(), nan=-HUGE, posinf=HUGE, neginf=-HUGE)
    best = torch.argmax(rows, -1)
    # Summed in double: a lone row is summed in another order than one of many, and a float32 would show it.
    behind = torch.exp(rows - torch.gather(rows, -1, best[:, None])).sum(-1, dtype=torch.float64)
    return torch.stack([best.double(), 0.0 - torch.log(behind).float().double()])  # one wait for a GPU instead of two


def choices(found: Tensor) -> List[Choice]:
    """What ``likeliest`` found for some rows."""
    return [Choice(int(one), shortest(value)) for one, value in zip(*found.tolist())]


def shortest(value: float) -> Optional[float]:
    """A float32 as the double whose shortest spelling is the float32's (so JSON shows -0.34, not -0.3400000035762787)."""
    return float(str(numpy.float32(value))) if math.isfinite(value) else None
