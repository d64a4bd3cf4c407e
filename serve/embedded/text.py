"""Text to token ids and back: the folder's tokenizer, its chat template, and text that appears token by token."""

import functools
import json
import threading
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

from jinja2 import TemplateError

from pipeline_train.errors import UserError

from .errors import bad_template

INCOMPLETE = "\ufffd"  # what a decoder shows for the first bytes of a character whose last ones have not come yet
FEW = 1 << 16  # decoded windows that are remembered, some 20 MB
SHORT = 8  # tokens of a window that is: an answer that stays inside a character has longer and longer ones
CONTEXT = 5  # tokens of the prompt decoded together with the first new one, so that its leading space is right


class Text:
    """The tokenizer of a model folder (or hub name).

    ``stop_ids``: where generation ends: the tokenizer's EOS and everything generation_config.json calls EOS.
    """

    def __init__(self, folder: str, trust_remote_code: bool = False, tokenizer_config: Optional[str] = None) -> None:
        from transformers import AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
        if not hasattr(self.tokenizer, "is_fast"):  # transformers 4.57 answers False for files that it cannot read
            raise UserError("%s: its tokenizer cannot be read; export the model again" % folder)
        self.fast = bool(self.tokenizer.is_fast)
        if self.fast:  # a tokenizer.json may carry the padding and truncation of its training
            self.tokenizer.backend_tokenizer.no_truncation()
            self.tokenizer.backend_tokenizer.no_padding()
        self.template = _template(self.tokenizer, tokenizer_config)
        # Not all that a tokenizer skips as special has a role there (a turn's end that is neither EOS nor listed, say).
        marked = {one for one, token in self.tokenizer.added_tokens_decoder.items() if token.special}
        self.special_ids = frozenset(self.tokenizer.all_special_ids) | marked
        self.stop_ids = frozenset([self.tokenizer.eos_token_id] if self.tokenizer.eos_token_id is not None else [])
        self._lock = threading.Lock()
        self.few = functools.lru_cache(maxsize=FEW)(self.decode)  # for at most SHORT ids, as a tuple

    def add_stop_ids(self, eos: Any) -> None:
        """``eos``: what a generation config has as eos_token_id: None, an id or a list."""
        more = eos if isinstance(eos, (list, tuple)) else [] if eos is None else [eos]
        self.stop_ids = self.stop_ids | frozenset(int(one) for one in more)

    def encode(self, text: str, special: bool) -> List[int]:
        """Token ids; ``special``: with what the tokenizer adds by itself (BOS). Safe to call from several threads."""
        if self.fast:  # as a batch of one: encode() itself keeps Python's lock, and everybody would wait for a long prompt
            return list(self.tokenizer.backend_tokenizer.encode_batch_fast([text], add_special_tokens=special)[0].ids)
        with self._lock:
            return list(self.tokenizer.encode(text, add_special_tokens=special))

    def offsets(self, text: str, special: bool) -> List[Tuple[int, str, int, int]]:
        """(id, text, start, stop) of each token, in characters; a slow tokenizer knows no places: empty text, 0, 0."""
        if not self.fast:
            return [(one, "", 0, 0) for one in self.encode(text, special)]
        coded = self.tokenizer.backend_tokenizer.encode_batch([text], add_special_tokens=special)[0]
        return [(one, text[start:stop], start, stop) for one, (start, stop) in zip(coded.ids, coded.offsets)]

    def decode(self, ids: Sequence[int], skip_special: bool = False) -> str:
        """Exactly what the tokens say: no space is tidied away."""
        if self.fast:  # what the next line comes to, without its checks: every token of every request is decoded twice
            return self.tokenizer.backend_tokenizer.decode(list(ids), skip_special_tokens=skip_special)
        return self.tokenizer.decode(list(ids), skip_special_tokens=skip_special, clean_up_tokenization_spaces=False)

    def render(self, messages: List[Dict[str, Any]]) -> str:
        """The prompt of a conversation. A trailing assistant message is continued, otherwise the assistant's turn is opened."""
        if not self.template:
            raise bad_template("template not found")
        plain = [_plain(message) for message in messages]
        goes_on = bool(plain) and plain[-1]["role"] == "assistant"
        try:
            return self.tokenizer.apply_chat_template(
                plain,
                chat_template=self.template,
                tokenize=False,
                add_generation_prompt=not goes_on,
                continue_final_message=goes_on,
            )
        except (TemplateError, ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
            raise bad_template(" ".join(str(error).split()) or type(error).__name__) from error


def _template(tokenizer: Any, config_path: Optional[str]) -> Optional[str]:
    """chat_template of ``config_path`` when given, else the tokenizer's own; of several named ones, ``default``."""
    found = tokenizer.chat_template
    if config_path is not None:
        found = json.loads(Path(config_path).read_text(encoding="utf-8")).get("chat_template")
    if isinstance(found, list):
        found = {entry["name"]: entry["template"] for entry in found}
    return found.get("default") if isinstance(found, dict) else found


def _plain(message: Dict[str, Any]) -> Dict[str, Any]:
    """A checked chat message -> what templates read: role and content as one string (and the name, if any)."""
    content = message.get("content")
    if isinstance(content, list):
        if any("image_url" in chunk for chunk in content):
            raise bad_template("images are not supported by this model")
        content = "".join(chunk["text"] for chunk in content)
    if content is None:
        content = json.dumps(message["tool_calls"], ensure_ascii=False, separators=(",", ":"))
    plain = {"role": message["role"], "content": content}
    return {**plain, "name": message["name"]} if message.get("name") else plain


class Spelling:
    """The text of each new token, given everything before it.

    Neither a sentencepiece space nor a character of several tokens can be read off one token. So two growing windows are decoded:
    the tokens whose text is already out, and those plus the new ones; what the second has more is the new text. It waits
    (``""``) while it ends inside a character. The windows move on with every text that comes out, so the cost stays flat.
    """

    def __init__(self, text: Text, prompt: Sequence[int]) -> None:
        self._text, self._ids = text, list(prompt)
        self._prompt_length = self._done = len(self._ids)
        self._start = max(0, self._done - CONTEXT)

    def add(self, token: int) -> str:
        self._ids.append(token)
        new = self._new()
        if not new or new.endswith(INCOMPLETE):
            return ""
        self._start, self._done = self._done, len(self._ids)
        return new

    def rest(self) -> str:
        """What is still held back when no token follows, without the character that never became complete."""
        return self._new().rstrip(INCOMPLETE)

    def whole(self) -> str:
        """All new text without special tokens; a character that never became complete is left out."""
        start = max(0, self._prompt_length - 1)
        before = self._text.decode(self._ids[start : self._prompt_length], skip_special=True)
        after = self._text.decode(self._ids[start:], skip_special=True)
        return after[len(before) :].rstrip(INCOMPLETE)

    def _new(self) -> str:
        before = self._decoded(self._ids[self._start : self._done])
        return self._decoded(self._ids[self._start :])[len(before) :]

    def _decoded(self, ids: List[int]) -> str:
        return self._text.few(tuple(ids)) if len(ids) <= SHORT else self._text.decode(ids)
