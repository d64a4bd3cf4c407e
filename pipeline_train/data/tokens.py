"""Facts about a tokenizer object that its attributes do not tell, found by asking it. Works on transformers' slow and fast ones."""

import hashlib
import json
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

from ..errors import UserError
from .template import DEFAULT_CHAT_TEMPLATE

Ids = List[int]
GGUF = b"GGUF"
TOGETHER = 1 << 16  # characters tokenized in one call: the library keeps some 100 bytes for each token until it returns


def raw(tokenizer: Any, text: str) -> Ids:
    """The ids of a text as the chat route sees it: nothing added."""
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def whole(tokenizer: Any, text: str) -> Ids:
    """The ids of a text as /generate sees it: with what the tokenizer adds."""
    return list(tokenizer(text, add_special_tokens=True, verbose=False)["input_ids"])


class Many:
    """The ids of many texts, the same as ``raw`` or ``whole`` of each.

    A fast tokenizer of transformers' own is asked directly: its ``__call__`` passes each text on unchanged, then spends as long as
    a short text takes on masks and offsets that nobody reads.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.direct = bool(tokenizer.is_fast) and type(tokenizer).__module__.startswith("transformers.")

    def __call__(self, texts: List[str], special: bool) -> List[Ids]:
        """``special``: as ``whole``, else as ``raw``."""
        found: List[Ids] = []
        begin = size = 0
        for number, text in enumerate(texts, 1):
            size += len(text)
            if size >= TOGETHER or number == len(texts):
                found += self._some(texts[begin:number], special)
                begin, size = number, 0
        return found

    def _some(self, texts: List[str], special: bool) -> List[Ids]:
        if not self.direct:
            return [list(ids) for ids in self.tokenizer(texts, add_special_tokens=special, verbose=False)["input_ids"]]
        core = self.tokenizer.backend_tokenizer
        core.no_truncation()
        core.no_padding()
        encode = getattr(core, "encode_batch_fast", core.encode_batch)  # the fast one is not in the tokenizers of 2023
        return [encoding.ids for encoding in encode(texts, add_special_tokens=special)]


def fingerprint(tokenizer: Any) -> str:
    """A hash of everything that decides a tokenizer's ids: rules, vocabulary, merges, the code's versions."""
    import tokenizers

    package = __import__(type(tokenizer).__module__.partition(".")[0])
    parts: List[Any] = [type(tokenizer).__name__, tokenizers.__version__, getattr(package, "__version__", "")]
    if tokenizer.is_fast:
        parts.append(tokenizer.backend_tokenizer.to_str())
    else:
        parts += [sorted(tokenizer.get_vocab().items()), str(sorted(getattr(tokenizer, "added_tokens_decoder", {}).items()))]
        for name in ("vocab_file", "merges_file"):
            path = getattr(tokenizer, name, None)
            parts.append(hashlib.sha256(Path(path).read_bytes()).hexdigest() if path and Path(path).is_file() else None)
    told = ("legacy", "add_bos_token", "add_eos_token", "add_prefix_space", "split_special_tokens", "special_tokens_map")
    parts += [repr(getattr(tokenizer, name, None)) for name in told]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode("utf-8", "backslashreplace")).hexdigest()


def find_special_anywhere(tokenizer: Any) -> bool:
    """Make special tokens count wherever a text holds them; -> whether that had to be done.

    Llama tokenizers of 2023 look for the *normalized* ``▁</s>``: "b</s>" is not the end of a turn there but four other tokens,
    and the second question of every conversation would follow an answer that never ended.
    """
    if not tokenizer.is_fast:
        return False
    core = json.loads(tokenizer.backend_tokenizer.to_str())
    special = [token for token in core["added_tokens"] if token["special"] and token["normalized"]]
    if all(token["id"] in raw(tokenizer, "b%sb" % token["content"]) for token in special):
        return False
    from tokenizers import Tokenizer

    for token in special:
        token["normalized"] = False
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(core))
    return True


def lead_ids(tokenizer: Any, name: str) -> Ids:
    """What the tokenizer puts in front of a text, usually nothing or BOS. One that appends EOS to a prompt is made to stop doing
    so, or refused: a server would send the model a prompt that has already ended."""
    plain, full = raw(tokenizer, "a"), whole(tokenizer, "a")
    if full[len(full) - len(plain) :] != plain and getattr(tokenizer, "add_eos_token", False):
        tokenizer.add_eos_token = False
        full = whole(tokenizer, "a")
    if full[len(full) - len(plain) :] != plain:
        raise UserError("%s: the tokenizer appends tokens to every prompt (%s); set add_eos_token to false in tokenizer_config.json"
                        % (name, tokenizer.convert_ids_to_tokens(full)))  # fmt: skip
    return full[: len(full) - len(plain)]


def default_template(tokenizer: Any, lead: Ids) -> Tuple[str, bool]:
    """(source, same): the default chat template with the lead written out, because a chat route adds no special tokens.

    ``same``: the chat route then gives exactly the ids of /generate. Sentencepiece tokenizers differ in whether the first word
    after a special token gets its ``▁``; where it does not, a blank after the lead gives it.
    """
    if not lead:
        return DEFAULT_CHAT_TEMPLATE, True
    bos = lead == [tokenizer.bos_token_id]
    text = "".join(tokenizer.convert_ids_to_tokens(lead))
    prompt = "### Human: a\n### Assistant:"
    for blank in ("", " "):
        literal = (text + blank).replace("\\", "\\\\").replace("'", "\\'")
        source = "{{ bos_token }}" if bos and not blank else "{{ bos_token + ' ' }}" if bos else "{{ '%s' }}" % literal
        if raw(tokenizer, text + blank + prompt) == whole(tokenizer, prompt):
            return source + DEFAULT_CHAT_TEMPLATE, True
    return source + DEFAULT_CHAT_TEMPLATE, False


def stop_adding_bos(tokenizer: Any) -> bool:
    """Switch off what is put in front of every text; False when that cannot be done."""
    if getattr(tokenizer, "add_bos_token", False):
        tokenizer.add_bos_token = False
    elif getattr(tokenizer, "is_fast", False):
        from tokenizers.processors import TemplateProcessing

        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A", pair="$A $B:1", special_tokens=[])
    return whole(tokenizer, "a") == raw(tokenizer, "a")


def special_texts(tokenizer: Any) -> List[str]:
    """Every special token of the vocabulary as text."""
    known = list(getattr(tokenizer, "added_tokens_decoder", {}).values())
    if known and not isinstance(known[0], str):
        return sorted(set(tokenizer.all_special_tokens) | {t.content for t in known if t.special})
    return sorted(set(tokenizer.all_special_tokens) | set(tokenizer.get_added_vocab()))  # transformers before 4.34


def template_tokens(tokenizer: Any) -> Dict[str, str]:
    """bos_token, eos_token, ...: what transformers hands to a chat template."""
    return {name: str(token) for name, token in tokenizer.special_tokens_map.items() if not isinstance(token, list)}


class Continuation:
    """Ids of a text as the continuation of other text: no ``▁`` or BOS of its own."""

    ANCHORS = ("\n", "a", ".", "我")

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        # Byte-level tokenizers give the same ids anywhere; sentencepiece and add_prefix_space put a blank before a text's start.
        self.plain = raw(tokenizer, "\nx") == raw(tokenizer, "\n") + raw(tokenizer, "x")

    def __call__(self, text: str) -> Ids:
        """The ids that follow a prompt whose own tokens stay as they are."""
        if not text:
            return []
        for anchor in () if self.plain else self.ANCHORS:
            before, both = raw(self.tokenizer, anchor), raw(self.tokenizer, anchor + text)
            if both[: len(before)] == before:
                return both[len(before) :]
        return raw(self.tokenizer, text)


def common_suffix(a: Ids, b: Ids) -> int:
    """Length of the longest common suffix."""
    n = 0
    while n < min(len(a), len(b)) and a[-1 - n] == b[-1 - n]:
        n += 1
    return n


def shipped_template(tokenizer: Any) -> Optional[str]:
    """The chat template in the tokenizer's files; None when there is none, or when it is our default format."""
    shipped = getattr(tokenizer, "chat_template", None) or tokenizer.init_kwargs.get("chat_template")
    if isinstance(shipped, list):  # tokenizer_config.json may name several
        shipped = {t["name"]: t["template"] for t in shipped}
    if isinstance(shipped, dict):
        shipped = shipped.get("default")
    return None if not shipped or shipped.endswith(DEFAULT_CHAT_TEMPLATE) else shipped


def chosen_template(template: str, shipped: Optional[str]) -> Optional[str]:
    """The source of a template that is not the default format, else None."""
    if template == "auto":
        return shipped
    if template == "default":
        return None
    path = Path(template)
    if path.suffix not in (".jinja", ".jinja2", ".j2"):
        raise UserError("data.template: expected auto, default or the path of a .jinja file, got %s" % template)
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError("data.template: %s cannot be read: %s" % (template, error)) from None


def is_sentencepiece(path: Path) -> bool:
    """Whether a tokenizer.model is one: transformers writes a whole GGUF file, weights and all, under that name."""
    try:
        with path.open("rb") as handle:
            return handle.read(4) != GGUF
    except OSError:
        return False


def forget_gguf(tokenizer: Any) -> None:
    """A tokenizer read from a GGUF file takes that file for its sentencepiece model and would save a copy of it."""
    path: Optional[str] = getattr(tokenizer, "vocab_file", None)
    if path and not is_sentencepiece(Path(path)):
        tokenizer.vocab_file = None
        tokenizer.clean_up_tokenization_spaces = False  # set by that reader; it would take blanks out of what a server answers
        for key in ("vocab_file", "add_prefix_space"):  # the second makes llama tokenizers ask for the sentencepiece model
            tokenizer.init_kwargs.pop(key, None)
