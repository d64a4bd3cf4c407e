"""What a request may ask for: the checks of the original, its texts, and its order. The first that fails is the answer."""

import math
import secrets
from dataclasses import dataclass
from typing import List, Optional, Tuple

from .errors import invalid
from .params import Parameters

LEG = 1024  # the original generates in legs of this many tokens and checks only the first against the limit


@dataclass(frozen=True)
class Limits:
    """The launcher's limits. Tokens are counted with special tokens."""

    max_best_of: int = 2
    max_stop_sequences: int = 4
    max_top_n_tokens: int = 5
    max_input_tokens: int = 1023
    max_total_tokens: int = 1024
    max_client_batch_size: int = 4
    vocabulary: int = 2**32  # token ids that the model has rows for


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; ``seed`` None means greedy. Values of 0 (``top_k``, penalties' neutral ones) switch off."""

    seed: Optional[int] = None
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    top_n_tokens: int = 0


@dataclass(frozen=True)
class Accepted:
    """A request that passed: token ids, how many more at most, how to choose and when to stop."""

    ids: List[int]
    max_new_tokens: int
    sampling: Sampling
    stop: Tuple[str, ...] = ()
    decoder_input_details: bool = False

    @property
    def total(self) -> int:
        return len(self.ids) + self.max_new_tokens

    def reserved(self, tokens: int = 0) -> int:
        """For how many tokens to keep room once there are ``tokens``: whole legs behind the prompt, at most all."""
        legs = max(1, -(-(tokens - len(self.ids)) // LEG))
        return min(self.total, len(self.ids) + legs * LEG)


def check_best_of(best_of: int, limits: Limits) -> None:
    """Of a non-streaming request with ``best_of`` > 1, before anything else."""
    if limits.max_best_of == 1:
        raise invalid("`best_of` != 1 is not allowed for this endpoint")
    if best_of > limits.max_best_of:
        raise invalid("`best_of` must be > 0 and <= %d. Given: %d" % (limits.max_best_of, best_of))


def check_stream(parameters: Parameters) -> None:
    """Of a streaming request, before anything else."""
    if parameters.best_of not in (None, 1):
        raise invalid("`best_of` != 1 is not supported when streaming tokens")
    if parameters.decoder_input_details:
        raise invalid("`decoder_input_details` == true is not supported when streaming tokens")


def check(inputs: str, p: Parameters, limits: Limits) -> None:
    """Everything that can be judged without the tokenizer. NaN cannot arrive here: JSON has none."""
    best_of = p.best_of or 1
    warped = any(value is not None for value in (p.temperature, p.top_k, p.top_p, p.typical_p))
    if best_of > 1 and not (p.do_sample or warped):
        raise invalid("you must use sampling when `best_of` is > 1")
    for name in ("temperature", "repetition_penalty"):
        value = getattr(p, name)
        if value is not None and value <= 0:
            raise invalid("`%s` must be strictly positive" % name)
    if p.frequency_penalty is not None and not -2.0 <= p.frequency_penalty <= 2.0:
        raise invalid("`frequency_penalty` must be >= -2.0 and <= 2.0")
    for name in ("top_p", "typical_p"):
        value = getattr(p, name)
        if value is not None and not 0.0 < value < 1.0:
            raise invalid("`%s` must be > 0.0 and < 1.0" % name)
    for name in ("top_k", "max_new_tokens"):
        value = getattr(p, name)
        if value is not None and value <= 0:
            raise invalid("`%s` must be strictly positive" % name)
    if len(p.stop) > limits.max_stop_sequences:
        raise invalid("`stop` supports up to %d stop sequences. Given: %d" % (limits.max_stop_sequences, len(p.stop)))
    if p.seed is not None and best_of > 1:
        raise invalid("`seed` must not be set when `best_of` > 1")
    if (p.top_n_tokens or 0) > limits.max_top_n_tokens:
        raise invalid("`top_n_tokens` must be >= 0 and <= %d. Given: %d" % (limits.max_top_n_tokens, p.top_n_tokens or 0))
    if not inputs:
        raise invalid("`inputs` cannot be empty")
    if p.truncate is not None and not 0 < p.truncate <= limits.max_input_tokens:
        raise invalid("`truncate` must be strictly positive and less than %d. Given: %d" % (limits.max_input_tokens, p.truncate))


def accept(ids: List[int], p: Parameters, limits: Limits) -> Accepted:
    """The checks that need token ids, then the features this engine lacks. ``ids`` are cut to the last ``truncate``."""
    if p.truncate is not None:
        ids = ids[-p.truncate :]
    room = max(0, limits.max_total_tokens - len(ids))
    wanted = room if p.max_new_tokens is None else p.max_new_tokens
    leg = min(wanted, LEG)
    if len(ids) + leg > limits.max_total_tokens:
        raise invalid(
            "`inputs` tokens + `max_new_tokens` must be <= %d. Given: %d `inputs` tokens and %d `max_new_tokens`"
            % (limits.max_total_tokens, len(ids), leg)
        )
    if len(ids) > limits.max_input_tokens:
        raise invalid("`inputs` must have less than %d tokens. Given: %d" % (limits.max_input_tokens, len(ids)))
    if not ids:
        raise invalid("`inputs` has no token")
    if max(ids) >= limits.vocabulary:  # a tokenizer with tokens added after the training: the forward pass of all would fail
        raise invalid("`inputs` has token %d, but the model knows only %d" % (max(ids), limits.vocabulary))
    for name in ("grammar", "watermark", "adapter_id"):
        if getattr(p, name):
            raise invalid("%s is not supported" % name)
    return Accepted(ids, min(wanted, room), sampling_of(p), tuple(p.stop), p.decoder_input_details)


def sampling_of(p: Parameters) -> Sampling:
    """Neutral values do not sample: ``temperature: 1.0`` alone is greedy."""
    temperature = 1.0 if p.temperature is None else p.temperature
    top_k, top_p, typical_p = p.top_k or 0, p.top_p or 1.0, p.typical_p or 1.0
    sampled = p.do_sample or temperature != 1.0 or top_k > 0 or top_p < 1.0 or typical_p < 1.0
    seed = (secrets.randbits(64) if p.seed is None else p.seed) if sampled else None
    penalty = 1.0 if p.repetition_penalty is None else p.repetition_penalty
    return Sampling(
        seed, _f32(temperature), top_k, top_p, typical_p, _f32(penalty), p.frequency_penalty or 0.0, p.top_n_tokens or 0
    )


def _f32(value: float) -> float:
    """Into the range where a division by it stays a number."""
    return min(max(value, 1e-30), 1e30) if math.isfinite(value) else 1e30
