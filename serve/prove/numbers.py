"""Whether the server computes what transformers does: log-probabilities of the prompts, and the greedy answers."""

import json
from typing import List, Optional, Sequence, Tuple

from pipeline_train.data.encode import TextCodec

from .checks import Answer, Check
from .reference import Bounds, Reference, Scores

SKIPPED = "the model was given other ids than training's"
Scored = Tuple[Answer, Scores]
EMBEDDING = (
    "its head is the input embedding, the folder has one of its own (text-generation-inference since 0.9 ignores bloom's "
    "lm_head.weight): export for that server, pipedock to-hf --target tgi-3, or serve with another"
)


def score(reference: Reference, answers: Sequence[Answer]) -> List[Scored]:
    """Those whose tokens are in the vocabulary, each with its new tokens behind it."""
    return [(one, reference.scores(one.ids + one.new)) for one in answers if max(one.ids + one.new) < reference.vocab]


def prompt_logprobs(codec: TextCodec, scored: Sequence[Scored], bounds: Bounds, unheard: Optional[str]) -> Check:
    """``unheard``: what to say because the server tells no log-probability at all, else None."""
    check = Check("prompt log-probabilities", "tokens")
    gaps: List[float] = []
    worst, where = 0.0, ""
    for answer, scores in scored:
        for i, (one, told) in enumerate(answer.seen.prompt[1:], 1):
            place = "%s: token %d %s" % (answer.where, i, _shown(codec, one))
            if told is None:
                check.failures.append("%s: no log-probability is told, which is how NaN is written" % place)
                continue
            gaps.append(abs(told - scores.logprob[i]))
            if gaps[-1] > worst:
                worst, where = gaps[-1], "%s: expected %.5g, as transformers computes, got %.5g" % (place, scores.logprob[i], told)
    check.compared = len(gaps)
    mean = sum(gaps) / max(1, len(gaps))
    check.figures = {"largest": worst, "mean": mean, "allowed": bounds.one, "allowed_mean": bounds.mean, "why": SKIPPED}
    if unheard is not None:
        check.failures.append(unheard)
    elif worst > bounds.one or mean > bounds.mean:
        over = sum(gap > bounds.one for gap in gaps)
        check.failures.append("%s; %d of %d differ by more than %.2g, all by %.2g on average (allowed: %.2g)"
                              % (where, over, len(gaps), bounds.one, mean, bounds.mean))  # fmt: skip
    return check


def greedy(codec: TextCodec, answers: Sequence[Answer], scored: Sequence[Scored], bounds: Bounds) -> Check:
    """Each token up to the first end is transformers' likeliest after those before it, or as likely within the bounds."""
    check = Check("greedy answers", "tokens")
    known = {id(answer) for answer, _ in scored}
    check.failures = ["%s: token %d is not in the vocabulary" % (one.where, max(one.new))
                      for one in answers if id(one) not in known]  # fmt: skip
    ties, worst = 0, 0.0
    for answer, scores in scored:
        start = len(answer.ids)
        for number, (one, told) in enumerate(answer.seen.tokens):
            i = start + number
            check.compared += 1
            if scores.best_logprob[i] - scores.logprob[i] > bounds.one:
                check.failures.append("%s: new token %d: expected %d %s (%.5g), got %d %s (%.5g)" % (
                    answer.where, number, scores.best[i], _shown(codec, scores.best[i]), scores.best_logprob[i],
                    one, _shown(codec, one), scores.logprob[i]))  # fmt: skip
                break
            ties += one != scores.best[i]
            gap = None if told is None else abs(told - scores.logprob[i])
            worst = max(worst, gap or 0.0)
            if gap is None or gap > bounds.one:
                check.failures.append("%s: new token %d %s: expected log-probability %.5g, got %s"
                                      % (answer.where, number, _shown(codec, one), scores.logprob[i], told))  # fmt: skip
                break
            if one in codec.stop_ids:
                break
    check.figures = {"answers": len(answers), "ties": ties, "largest": worst, "allowed": bounds.one,
                     "why": SKIPPED}  # fmt: skip
    return check


def cause(codec: TextCodec, reference: Reference, scored: Sequence[Scored], bounds: Bounds) -> Optional[str]:
    """What other model the server may be computing, tried out. Changes the reference."""
    if not reference.with_embedding_as_head():
        return None
    again = score(reference, [answer for answer, _ in scored])
    told = any(answer.seen.prompt for answer, _ in scored)
    check = prompt_logprobs(codec, again, bounds, None) if told else greedy(codec, [answer for answer, _ in again], again, bounds)
    return EMBEDDING if check.holds else None


def _shown(codec: TextCodec, one: int) -> str:
    return json.dumps(codec.decode([one]), ensure_ascii=False)
