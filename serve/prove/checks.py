"""What a live server must do, one function a check. Each returns its figures and what failed, in words that name the record."""

from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Set

from pipeline_train.data.encode import TextCodec
from pipeline_train.data.records import Record
from pipeline_train.data.template import TemplateRefused
from pipeline_train.errors import RunFailed

from ..client import Invalid
from . import difference
from .prompts import Prompt, stored_ids
from .servers import Seen, Tgi, Vllm

CLOSING_COUNT = 4  # tokens asked for where the next one should end the answer


class Check:
    """``compared``: tokens, conversations or answers looked at; none: the check says nothing. ``figures``: for the document."""

    def __init__(self, name: str, what: str) -> None:
        self.name, self.what, self.compared = name, what, 0
        self.figures: Dict[str, Any] = {}
        self.failures: List[str] = []
        self.wrong: Set[str] = set()  # the prompts whose ids were wrong

    @property
    def holds(self) -> Optional[bool]:
        return False if self.failures else True if self.compared else None

    def document(self) -> Dict[str, Any]:
        return dict({"name": self.name, "holds": self.holds, "compared": self.compared, "of": self.what}, **self.figures,
                    failures=self.failures)  # fmt: skip


class Answer(NamedTuple):
    """A greedy answer of the server to ``ids``, which are those of ``prompt`` (its place) or begin with them; ``most``: the tokens
    that it was asked for."""

    prompt: str
    where: str
    ids: List[int]
    seen: Seen
    most: int

    @property
    def new(self) -> List[int]:
        return [one for one, _ in self.seen.tokens]


def stored(codec: TextCodec, data: Path, records: Sequence[Record]) -> Check:
    """What is taken for training's ids here is what the run was trained on, where its encoded data still lies in ``data``."""
    check = Check("trained ids", "tokens")
    compared = 0
    for record in records if "strftime_now" not in codec.chat_template else []:  # a run has one date, a server another
        trained = stored_ids(data, record.line)
        if trained is None:
            continue
        compared += 1
        check.compared += len(trained)
        try:
            made = codec.encode(record).ids
        except TemplateRefused:
            made = []
        if made[: len(trained)] != trained:
            check.failures.append("%s: encoded now, it has other ids than the run was trained on (%s): the tokenizer, the template "
                                  "or the records were changed since" % (record.where, data))  # fmt: skip
    check.figures = {"records": compared, "from": str(data), "why": "nothing of these records can be compared in %s" % data}
    return check


def ask(server: "Tgi | Vllm", prompts: Sequence[Prompt], count: int, tell: bool) -> List[Answer]:
    """Every prompt that can be sent, and every trained answer, to which only an end is missing. ``tell``: with the prompt's
    log-probabilities."""
    asked = []
    for prompt in prompts:
        if prompt.text is not None:
            asked.append((prompt, prompt.where, prompt.ids, prompt.text, count, tell))
        if prompt.closing is not None:
            where = prompt.where + " with its answer"
            asked.append((prompt, where, prompt.closing_ids, prompt.closing, CLOSING_COUNT, False))
    answers = []
    for prompt, where, ids, text, most, told in asked:
        try:
            answers.append(Answer(prompt.where, where, ids, server.greedy(text, most, told), most))
        except Invalid as error:
            raise RunFailed("%s: %s: the server refuses the prompt: %s" % (server.url, where, error)) from None
    return answers


def folder(codec: TextCodec, model: str, prompts: Sequence[Prompt]) -> Check:
    """The tokenizer files that are served, read here, give training's ids: what is wrong below is then the server's doing."""
    check = Check("the folder's token ids", "tokens")
    here = TextCodec.load(model)
    for prompt in prompts:
        if prompt.text is not None:
            _same_ids(check, codec, "%s (%s)" % (prompt.where, model), prompt.ids, here.prompt_ids(prompt.text))
        if prompt.messages is not None:
            ids = here.chat_ids(prompt.messages)
            _same_ids(check, codec, "%s (%s, chat)" % (prompt.where, model), prompt.ids, ids, prompt.chat_text)
    return check


def token_ids(server: "Tgi | Vllm", codec: TextCodec, prompts: Sequence[Prompt], answers: Sequence[Answer]) -> Check:
    """/generate's ids are training's: by the server's route for that, and by what it says that the model was given."""
    check = Check("token ids", "tokens")
    sources = set()
    for prompt in prompts:
        got = None if prompt.text is None else server.text_ids(prompt.text)
        if got is not None:
            sources.add(server.tokenizes)
            if not _same_ids(check, codec, "%s (%s)" % (prompt.where, server.tokenizes), prompt.ids, got):
                check.wrong.add(prompt.where)
    for answer in answers:
        if answer.seen.prompt:
            sources.add(server.tells)
            got = [one for one, _ in answer.seen.prompt]
            if not _same_ids(check, codec, "%s (%s)" % (answer.where, server.tells), answer.ids, got):
                check.wrong.add(answer.prompt)
    bos = codec.tokenizer.bos_token_id
    leading = {prompt.ids[0] == bos for prompt in prompts if prompt.text is not None}
    check.figures = {"prompts": sum(prompt.text is not None for prompt in prompts), "by": sorted(sources),
                     "bos": "%s once" % codec.tokenizer.bos_token if leading == {True} else "no BOS",
                     "why": "no prompt can be compared: the server tells no ids"}  # fmt: skip
    return check


def chat_ids(server: "Tgi | Vllm", codec: TextCodec, prompts: Sequence[Prompt]) -> Check:
    """The chat route's ids are training's: by the server's route for that, and by how many tokens a chat really gave the model."""
    check = Check("chat token ids", "tokens")
    asked = [prompt for prompt in prompts if prompt.messages is not None]
    for prompt in asked:
        messages = prompt.messages or []
        where = "%s (chat)" % prompt.where
        try:
            found, length = server.chat_ids(messages), server.chat_length(messages)
        except Invalid as error:
            check.failures.append("%s: the server refuses the conversation: %s" % (where, error))
            continue
        if found is None and length is None:
            return _without(check, "%s has no chat route that tells" % server.name)
        if found is not None and not _same_ids(check, codec, where, prompt.ids, found[0], prompt.chat_text, found[1]):
            continue
        if length not in (None, len(prompt.ids)):
            check.failures.append("%s: a chat gives the model %d tokens, training had %d: another chat template, or BOS twice"
                                  % (where, length, len(prompt.ids)))  # fmt: skip
    check.figures["prompts"] = len(asked)
    return check if asked else _without(check, "none of these records is a conversation for the chat route")


def no_chat() -> Check:
    """In place of ``chat_ids``."""
    return _without(Check("chat token ids", "tokens"), "the folder has no chat template, so its server has no chat")


def ends(codec: TextCodec, answers: Sequence[Answer]) -> Check:
    """Answers stop at what ended them in training, and nowhere else before their length."""
    check = Check("end of sequence", "answers")
    for answer in answers:
        new, finish = answer.new, answer.seen.finish
        stop = next((i for i, one in enumerate(new) if one in codec.stop_ids), None)
        if stop is not None and stop < len(new) - 1:
            what = "goes on after %s, with %d more tokens" % (_named(codec, new[stop]), len(new) - 1 - stop)
        elif stop is None and (finish == "eos_token" or len(new) < answer.most):
            last = _named(codec, new[-1]) if new else "nothing"
            what = "ends with %s (%s), which ended no answer in training" % (last, finish)
        elif stop is not None and finish != "eos_token" and len(new) < answer.most:
            what = "stops at %s, but calls that %s" % (_named(codec, new[stop]), finish)
        else:
            check.compared += finish == "eos_token"
            continue
        check.failures.append("%s: the answer %s" % (answer.where, what))
    check.figures = {
        "asked": len(answers),
        "why": "no answer of %d came to an end; ask for longer ones (--new-tokens), or with more of the run's records "
        "(--train-config, --records)" % len(answers),
        "stop_tokens": codec.tokenizer.convert_ids_to_tokens(codec.stop_ids),
    }
    return check


def _without(check: Check, why: str) -> Check:
    check.figures = {"prompts": 0, "why": why}
    return check


def _same_ids(
    check: Check,
    codec: TextCodec,
    where: str,
    expected: List[int],
    got: List[int],
    rendered: Optional[str] = None,
    text: Optional[str] = None,
) -> bool:
    check.compared += len(expected)
    if got != expected:
        check.failures.append("%s: %s" % (where, difference.of_ids(codec, expected, got, rendered, text)))
    return got == expected


def _named(codec: TextCodec, one: int) -> str:
    return "%d %s" % (one, codec.tokenizer.convert_ids_to_tokens(one))
