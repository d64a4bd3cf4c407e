"""The only place a prompt is spelled. Jinja2 only: training, export and serving render with this file and the same source.

The default format, for models that ship no chat template:

    instruct        the Alpaca headers, ending in "### Response:"; learnt: the output and EOS, directly after it
    conversation    DEFAULT_CHAT_TEMPLATE; learnt: " {answer}" and EOS after each "### Assistant:"
    ref_qa          the same after "### Reference:\\n{reference}\\n"

With a model's own chat template every record becomes messages and the learnt part is the answer and the token that ends the turn.
"""

import functools
import json
from datetime import datetime
from typing import Any, Dict, Iterable, List, NamedTuple, Optional, Tuple

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ..errors import UserError

DEFAULT_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '### Human: ' + message['content'] + '\\n' }}"
    "{% elif message['role'] == 'assistant' %}{{ '### Assistant: ' + message['content'] + eos_token + '\\n' }}"
    "{% elif message['role'] == 'reference' %}{{ '### Reference:\\n' + message['content'] + '\\n' }}"
    "{% elif message['role'] == 'system' %}{{ message['content'] + '\\n' }}"
    "{% else %}{{ raise_exception('unknown role ' + message['role'] + ': expected system, reference, user or assistant') }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Assistant:' }}{% endif %}"
)

INSTRUCT_HEADER = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
INSTRUCT_HEADER_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request."
)

Messages = List[Dict[str, str]]


class Turn(NamedTuple):
    """``prompt``: all a server is sent before this answer. ``answer``: what it should say, without the end of turn."""

    prompt: str
    answer: str
    learn: bool


class TurnEnd(NamedTuple):
    """What a template writes after an answer: ``text`` up to and including the special ``token``, then ``tail``, not learnt."""

    text: str
    token: str
    tail: str

    @property
    def before(self) -> str:
        """What comes between the answer and the token, usually nothing."""
        return self.text[: len(self.text) - len(self.token)]


class TemplateRefused(ValueError):
    """The template cannot render these messages; the message says why."""


def instruct_prompt(instruct: str, given: Optional[str] = None) -> str:
    """The default instruct prompt. A blank ``given`` ("input") counts as absent."""
    if given is None or not given.strip():
        return "%s\n\n### Instruction:\n%s\n\n### Response:" % (INSTRUCT_HEADER, instruct)
    return "%s\n\n### Instruction:\n%s\n\n### Input:\n%s\n\n### Response:" % (INSTRUCT_HEADER_INPUT, instruct, given)


def messages_of(kind: str, fields: Dict[str, Any], own: bool) -> Messages:
    """A record's fields as chat messages.

    ``own``: for a model's own template, which knows system, user and assistant and usually wants them to alternate: consecutive
    asks are joined by a newline, instruct and input, or reference and first ask, by a blank line.
    """
    if kind == "instruct":
        given = fields["input"]
        ask = fields["instruct"] if given is None else fields["instruct"] + "\n\n" + given
        return [{"role": "user", "content": ask}, {"role": "assistant", "content": fields["output"]}]
    messages: Messages = []
    if fields.get("system"):
        messages.append({"role": "system", "content": fields["system"]})
    reference = fields.get("reference")
    if reference is not None and not own:
        messages.append({"role": "reference", "content": reference})
    for who, text in fields["rounds"]:
        if own and who == "ask" and messages and messages[-1]["role"] == "user":
            messages[-1]["content"] += "\n" + text
        else:
            messages.append({"role": "user" if who == "ask" else "assistant", "content": text})
    if reference is not None and own:
        first = next(m for m in messages if m["role"] == "user")
        first["content"] = reference + "\n\n" + first["content"]
    return messages


def render(source: str, messages: Messages, add_generation_prompt: bool, tokens: Dict[str, str]) -> str:
    """A chat template applied as transformers' ``apply_chat_template(tokenize=False)`` applies it.

    ``tokens``: bos_token, eos_token and so on. Raises TemplateRefused."""
    try:
        return _compiled(source).render(
            messages=messages, tools=None, documents=None, add_generation_prompt=add_generation_prompt, **tokens
        )
    except jinja2.TemplateSyntaxError as error:
        raise TemplateRefused("line %d of the chat template: %s" % (error.lineno, error.message)) from None
    except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as error:
        raise TemplateRefused(" ".join(str(error).split()) or type(error).__name__) from None


def find_end(source: str, tokens: Dict[str, str], special: Iterable[str]) -> Optional[TurnEnd]:
    """What follows an answer, or None when no special token does (the model could not learn to stop). Raises TemplateRefused."""
    mark = "6f0c1e7a"  # text that no template holds
    text = render(source, [{"role": "user", "content": "1"}, {"role": "assistant", "content": mark}], False, tokens)
    _, found, after = text.rpartition(mark)
    places = [(after.find(s), -len(s), s) for s in special if s and s in after]
    if not found or not places:
        return None
    start, _, token = min(places)
    stop = start + len(token)
    return TurnEnd(after[:stop], token, after[stop:])


class PromptFormat:
    """A chat template with its special tokens: Record -> turns.

    ``own``: the template is the model's or the user's, and instruct records go through it too. ``name`` is for messages.
    """

    def __init__(self, source: str, tokens: Dict[str, str], end: TurnEnd, own: bool, name: str) -> None:
        self.source, self.tokens, self.end, self.own, self.name = source, tokens, end, own, name

    def render(self, messages: Messages, add_generation_prompt: bool) -> str:
        return render(self.source, messages, add_generation_prompt, self.tokens)

    def turns(self, kind: str, fields: Dict[str, Any]) -> List[Turn]:
        """The answers of an instruct, conversation or ref_qa record. Text after the last answer belongs to none.

        Raises TemplateRefused for a record that the template does not take, UserError for a template that cannot be trained:
        one whose text before an answer changes once the answer or later turns are there.
        """
        if kind == "instruct" and not self.own:
            answer = fields["output"]
            return [Turn(instruct_prompt(fields["instruct"], fields["input"]), answer, bool(answer.strip()))]
        messages = messages_of(kind, fields, self.own)
        turns: List[Turn] = []
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            prompt = self.render(messages[:i], True)
            whole = self.render(messages[: i + 1], False)
            if turns and not prompt.startswith(turns[-1].prompt + turns[-1].answer + self.end.text):
                raise UserError(self._unfit("rewrites earlier turns, so a conversation cannot be trained as it is served"))
            if not whole.startswith(prompt):
                raise UserError(self._unfit("writes an answer differently from the prompt that asks for it"))
            closing = self.end.text + self.end.tail
            if not whole.endswith(closing) or len(whole) < len(prompt) + len(closing):
                raise UserError(self._unfit("does not end every answer with %s" % json.dumps(closing)))
            answer = whole[len(prompt) : len(whole) - len(closing)]
            turns.append(Turn(prompt, answer, bool(message["content"].strip())))
        return turns

    def _unfit(self, why: str) -> str:
        return '%s: the chat template %s. Set data.template to "default" or to a .jinja file that keeps its prefix.' % (
            self.name,
            why,
        )


class _Generation(Extension):
    """{% generation %} blocks mark answers for transformers; they render as their content."""

    tags = {"generation"}

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


@functools.lru_cache(maxsize=16)
def _compiled(source: str) -> jinja2.Template:
    """The environment that transformers and, in Rust, TGI give a chat template."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment.from_string(source)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: Optional[int] = None,
    separators: Optional[Tuple[str, str]] = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


_fixed_now: Optional[datetime] = None


def fix_now(now: Optional[datetime]) -> None:
    """What ``strftime_now`` of a chat template says from here on in this process; None: the clock. A run has one date, or a resume
    after midnight would meet other data than it was started with."""
    global _fixed_now
    _fixed_now = now


def fixed_now() -> Optional[datetime]:
    return _fixed_now


def _strftime_now(form: str) -> str:
    return (_fixed_now or datetime.now()).strftime(form)
