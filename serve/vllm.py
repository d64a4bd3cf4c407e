"""vLLM has no /generate: the same wishes on its /v1/completions, and its answers in the same types. Sampling parameters mean what
they mean at text-generation-inference: without any the likeliest token is taken, whatever generation_config.json says.
"""

from dataclasses import replace
from functools import partial
from typing import Any, Dict, List, Optional, Tuple

from .dialects import CHAT, GENERATE, Call, Messages, chat_call, given, spelled
from .results import Generation, GenerationFailed, Invalid, Piece, Place, Templated, Token

SAME = ("top_k", "top_p", "repetition_penalty", "frequency_penalty", "seed", "stop")
ELSEWHERE = ("do_sample", "temperature", "max_new_tokens", "details", "return_full_text", "truncate", "top_n_tokens")
NEUTRAL = {"top_k": -1, "top_p": 1.0, "repetition_penalty": 1.0}  # said, or generation_config.json decides


class Vllm:
    """``model``: the name that its routes want; ``name``: how to call the server."""

    def __init__(self, model: str, name: str) -> None:
        self.model, self.name = model, name

    def generate(self, inputs: str, parameters: Dict[str, Any], stream: bool) -> Call:
        spelled(parameters, GENERATE, CHAT)
        wanted = given(parameters)
        body: Dict[str, Any] = {"model": self.model, "prompt": inputs, "temperature": 0, "include_stop_str_in_output": True}
        sampled = _sampled(wanted)
        if sampled:
            body.update(NEUTRAL, temperature=wanted.get("temperature", 1.0))
        body.update((name, wanted[name]) for name in SAME if name in wanted)
        if wanted.get("details", True):
            body.update(logprobs=wanted.get("top_n_tokens", 0), return_token_ids=True)
        if wanted.get("decoder_input_details"):
            body["prompt_logprobs"] = 0  # of the prompt's own tokens alone
        if "truncate" in wanted:
            body["truncate_prompt_tokens"] = wanted["truncate"]
        room = None
        if "max_new_tokens" in wanted:
            body["max_tokens"] = wanted["max_new_tokens"]
        else:  # its own default is 16, and null is a 500 in many of its versions
            room = {"model": self.model, "prompt": inputs}
        before = inputs if wanted.get("return_full_text") else ""
        seed = wanted.get("seed") if sampled else None
        if stream:
            body.update(stream=True, stream_options={"include_usage": True})
        top = wanted.get("top_n_tokens", 0)
        read = partial(_generation, before=before, seed=seed, top=top)
        return Call("/v1/completions", body, read, partial(Chunks, before, seed, top), room)

    def chat(self, messages: Messages, parameters: Dict[str, Any], stream: bool) -> Call:
        return chat_call(self.model, messages, parameters, stream)

    def tokenize(self, inputs: str) -> Call:
        return Call("/tokenize", {"model": self.model, "prompt": inputs, "add_special_tokens": True}, _places)

    def chat_tokenize(self, messages: Messages) -> Call:
        """A trailing assistant message is continued, as text-generation-inference does by itself. The text is not told."""
        goes_on = bool(messages) and messages[-1].get("role") == "assistant"
        body = {"model": self.model, "messages": messages, "add_generation_prompt": not goes_on, "continue_final_message": goes_on}
        return Call("/tokenize", body, lambda found: Templated("", _places(found)))


class Chunks:
    """A stream's documents -> pieces, one per chunk (which may hold several tokens). The last waits for the counts behind it."""

    def __init__(self, before: str, seed: Optional[int], top: int) -> None:
        self._text, self._seed, self._top, self._counted = before, seed, top, 0
        self._last: Optional[Piece] = None

    def add(self, document: Dict[str, Any]) -> List[Piece]:
        usage = document.get("usage") or {}
        if self._last is not None and usage:
            counts = usage.get("completion_tokens"), usage.get("prompt_tokens")
            self._last = replace(self._last, generated_tokens=counts[0], input_length=counts[1])
        ready = []
        for choice in document.get("choices") or ():
            piece = self._piece(choice)
            if piece.finish_reason is None:
                ready.append(piece)
            else:
                self._last = piece
        return ready

    def end(self) -> List[Piece]:
        if self._last is None:
            raise GenerationFailed("the stream ended before the answer did")
        return [self._last]

    def _piece(self, choice: Dict[str, Any]) -> Piece:
        text, tokens = choice["text"], _tokens(choice)
        self._text += text
        self._counted += len(tokens)
        one = replace(tokens[0], text=text) if len(tokens) == 1 else Token(-1, text, None)
        top = next(iter(_top(choice, self._top)), ()) if len(tokens) == 1 else ()
        if choice.get("finish_reason") is None:
            return Piece(one, top)
        return Piece(one, top, self._text, _reason(choice), self._counted or None, self._seed)


def room_of(found: Any) -> Optional[int]:
    """Tokens left for the answer, from what /tokenize says about the prompt."""
    if not isinstance(found, dict) or not found.get("max_model_len"):
        return None
    return max(1, int(found["max_model_len"]) - int(found["count"]))


def name_of(version: Any) -> str:
    """``version``: what GET /version answered."""
    told = version.get("version") if isinstance(version, dict) else None
    return "vLLM %s" % told if told else "a server with OpenAI's routes"


def _sampled(wanted: Dict[str, Any]) -> bool:
    """As text-generation-inference decides it: neutral values do not sample. What vLLM lacks (and would ignore) is refused."""
    for name, value in wanted.items():
        neutral = not value or (name in ("best_of", "typical_p") and value == 1)
        if name not in SAME + ELSEWHERE + ("decoder_input_details",) and not neutral:
            raise Invalid("vLLM has no %s; leave it out" % name)
    warped = wanted.get("temperature", 1.0) != 1.0 or wanted.get("top_k") or wanted.get("top_p", 1.0) < 1.0
    return bool(wanted.get("do_sample") or warped)


def _generation(found: Any, before: str, seed: Optional[int], top: int) -> Generation:
    choice, usage = found["choices"][0], found.get("usage") or {}
    tokens = _tokens(choice)
    count = usage.get("completion_tokens") or len(tokens)
    text = before + choice["text"]
    return Generation(text, _reason(choice), count, seed, tokens, _prefill(choice), _top(choice, top))


def _reason(choice: Dict[str, Any]) -> str:
    """In the words of text-generation-inference; ``stop_reason`` is a text when one of ``stop`` was met."""
    if choice.get("finish_reason") != "stop":
        return choice.get("finish_reason") or ""
    return "stop_sequence" if isinstance(choice.get("stop_reason"), str) else "eos_token"


def _tokens(choice: Dict[str, Any]) -> Tuple[Token, ...]:
    """Ids come from 0.10.2 on, texts and log-probabilities when details are asked for."""
    told = choice.get("logprobs") or {}
    texts, values = told.get("tokens") or [], told.get("token_logprobs") or []
    ids = choice.get("token_ids") or [-1] * len(texts)
    pairs = zip(ids, texts + [""] * len(ids), values + [None] * len(ids))
    return tuple(Token(one, text, value) for one, text, value in pairs)


def _top(choice: Dict[str, Any], most: int) -> Tuple[Tuple[Token, ...], ...]:
    """The chosen token is always among what vLLM lists."""
    told = (choice.get("logprobs") or {}).get("top_logprobs") or ()
    if not most:
        return ()
    return tuple(tuple(Token(-1, text, value) for text, value in list((one or {}).items())[:most]) for one in told)


def _prefill(choice: Dict[str, Any]) -> Tuple[Token, ...]:
    """``prompt_logprobs``: null for the first token, then {id: {logprob, decoded_token}} of each."""
    ids, told = choice.get("prompt_token_ids") or [], choice.get("prompt_logprobs") or []
    found = []
    for place, each in enumerate(told):
        one = ids[place] if place < len(ids) else int(next(iter(each))) if each else -1
        entry = (each or {}).get(str(one)) or {}
        found.append(Token(one, entry.get("decoded_token") or "", entry.get("logprob")))
    return tuple(found)


def _places(found: Any) -> Tuple[Place, ...]:
    return tuple(Place(one) for one in found["tokens"])
