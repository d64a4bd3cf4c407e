"""What ends a turn and what begins a text: taken from the chat template, because tokenizer files are often wrong about both."""

from typing import Any, Dict, List, NamedTuple, Optional

from ..errors import UserError
from . import tokens
from .template import TemplateRefused, TurnEnd, find_end, render

ASK = [{"role": "user", "content": "1"}]
TALK = ASK + [{"role": "assistant", "content": "2"}, {"role": "user", "content": "3"}]


class Stops(NamedTuple):
    """``eos_id`` ends documents, ``end``/``end_id`` an answer; ``stop_ids``: what ends generation, ``end_id`` first."""

    eos_id: int
    end: TurnEnd
    end_id: int
    stop_ids: List[int]
    notes: List[str]


def find_stops(tokenizer: Any, own: Optional[str], shipped: Optional[str], generation: Dict[str, Any], name: str) -> Stops:
    """``own``: the chat template in use (None: the default format). ``shipped``: the model's own, which tells a wrong EOS even when
    it is not used. Sets ``tokenizer.eos_token`` to what ends a turn, for servers that read nothing else.

    Raises UserError: no EOS, or a template that ends answers with nothing special.
    """
    listed = generation.get("eos_token_id")
    candidates = [tokenizer.eos_token_id] + (listed if isinstance(listed, list) else [listed])
    end, asked = _end_of(tokenizer, own or shipped, own is not None, name)
    if end is None and tokenizer.eos_token is None:
        raise UserError("%s: the tokenizer has no end-of-sequence token; set eos_token in tokenizer_config.json" % name)
    notes: List[str] = []
    eos = tokenizer.eos_token
    wrong = end is not None and eos != end.token and (eos is None or eos in asked)
    if end is not None and (wrong or own is not None) and eos != end.token:
        if _changes(tokenizer, own, end.token):
            wrong = False
        else:
            tokenizer.eos_token = end.token
    if wrong and end is not None:
        notes.append("%s: its end-of-sequence token %s does not end a turn; %s does and replaces it" % (name, eos, end.token))
        eos = end.token
    eos_id = tokenizer.convert_tokens_to_ids(eos)
    if own is None or end is None:
        end = TurnEnd(eos, eos, "\n")
    end_id = tokenizer.convert_tokens_to_ids(end.token)
    opening = set(tokens.raw(tokenizer, asked)) - {end_id, eos_id}
    stop_ids: List[int] = []
    for stop in [end_id, eos_id] + candidates:
        if isinstance(stop, int) and stop not in opening and stop not in stop_ids:
            stop_ids.append(stop)
    return Stops(eos_id, end, end_id, stop_ids, notes)


def _end_of(tokenizer: Any, source: Optional[str], required: bool, name: str) -> "tuple[Optional[TurnEnd], str]":
    """(what follows an answer, the prompt of one question) of a chat template."""
    if source is None:
        return None, ""
    given = tokens.template_tokens(tokenizer)
    try:
        end = find_end(source, given, tokens.special_texts(tokenizer))
        asked = render(source, ASK, True, given)
    except TemplateRefused as error:
        if required:
            raise UserError("%s: its chat template cannot be rendered: %s" % (name, error)) from None
        return None, ""
    if end is None and required:
        raise UserError(
            "%s: its chat template puts no special token after an answer, so the model could not learn to stop. "
            "Use data.template: default." % name
        )
    return end, asked


def _changes(tokenizer: Any, own: Optional[str], eos: str) -> bool:
    """Whether the template in use would write something else with another eos_token."""
    given = tokens.template_tokens(tokenizer)
    return own is not None and render(own, TALK, True, given) != render(own, TALK, True, dict(given, eos_token=eos))


def match_bos(tokenizer: Any, own: str, lead: List[int], name: str) -> List[str]:
    """The chat route sends no BOS but the template's. When the template writes none, the tokenizer must add none either, or
    /generate would see another prompt than was trained. Returns a note for what was done about it."""
    if not lead:
        return []
    mark = "6f0c1e7a"
    given = tokens.template_tokens(tokenizer)
    text = "".join(tokenizer.convert_ids_to_tokens(lead))
    spelled = render(own, TALK, True, given)
    uses_variable = render(own, TALK, True, dict(given, bos_token=mark)).startswith(mark)
    if uses_variable or (spelled.startswith(text) and spelled.count(text) == 1):
        return []
    if tokens.stop_adding_bos(tokenizer):
        return ["%s: its chat template has no BOS; the tokenizer no longer adds one" % name]
    return ["%s: its chat template has no BOS but /generate would add one; use the chat route" % name]
