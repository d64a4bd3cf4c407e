"""All rules, applied. Standard library only."""

from . import engines, files, gpus, room, shapes
from .case import Case
from .question import Question, Verdict
from .sizes import sizes_of

RULES = (
    shapes.unknown, shapes.shards, shapes.arithmetic, shapes.cards, shapes.drivers, shapes.dtypes, shapes.kernels,
    files.weights, files.tokenizer, files.names, room.lengths, room.room,
)  # fmt: skip


def judge(question: Question) -> Verdict:
    """Every reason why this server cannot load this model, and what it needs when it can. Raises UserError for a question that
    cannot be asked: no such engine, version or card, a config.json with impossible sizes."""
    engine = engines.find(question.engine, question.version)
    case = Case(question, engine, sizes_of(question.config), gpus.card_named(question.gpu))
    verdict = Verdict([], [], engine.name, engine.version, engine.image, engine.digest, question.shards, case.card.name)
    if not engine.same:
        verdict.note("judged by what is known of %s" % engine.line)
    for rule in RULES:
        rule(case, verdict)
    return verdict
