"""All rules, applied. Standard library only."""

from . import engines, split
from .question import Question, Verdict
from .sizes import sizes_of


def judge(question: Question) -> Verdict:
    """Every reason why this server cannot load this model, and what it needs when it can. Raises UserError for a question that
    cannot be asked: no such engine, version or card, a config.json with impossible sizes."""
    engine, sizes = engines.find(question.engine, question.version), sizes_of(question.config)
    verdict = Verdict([], [], engine.name, engine.version, engine.image, engine.digest, question.shards)
    _shards(question, engine, sizes, verdict)
    return verdict


def _shards(question: Question, engine: engines.Engine, sizes: "split.Sizes", verdict: Verdict) -> None:
    wrong = split.divides(engine, sizes, question.shards)
    if wrong:
        counts = ", ".join(str(count) for count in split.valid(engine, sizes))
        verdict.reasons.append("--num-shard %d does not divide %s: use one of %s" % (question.shards, ", ".join(wrong), counts))
