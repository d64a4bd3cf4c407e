"""Records -> token ids, exactly those that a server makes of the same prompt. The only file of training that knows transformers.

The prompt is tokenized alone, as a server does it; the answer is its continuation. In a conversation the history of each answer is
tokenized as the text that a server is sent for it. Special tokens: a default-format prompt goes through /generate, which adds what
the tokenizer adds (BOS); a model's own template goes through the chat route, which adds nothing.
"""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any, Dict, List, Optional, Union

from ..errors import RunFailed, UserError
from . import tokens
from .records import Record
from .spans import IGNORED, Sequence, SpanEncoder
from .stops import find_stops, match_bos
from .template import DEFAULT_CHAT_TEMPLATE, Messages, PromptFormat, TemplateRefused, fixed_now, instruct_prompt, render

__all__ = ["IGNORED", "Sequence", "TextCodec"]


class TextCodec:
    """A tokenizer, a prompt format, and what ends a turn.

    ``eos_id`` ends pretrain texts and default-format answers. ``stop_ids``: what ends generation, the end of a turn first.
    ``chat_template``: the Jinja source to export. ``notes``: one line for each thing about the tokenizer that had to be put right.
    """

    def __init__(
        self, tokenizer: Any, template: str = "auto", name: str = "the tokenizer", generation: Optional[Dict[str, Any]] = None
    ) -> None:
        self.tokenizer = tokenizer
        self.name = name
        self.generation = dict(generation or {})
        self.notes: List[str] = []
        self.sentencepiece: Optional[Path] = None  # a model file that belongs to the tokenizer, whether or not its class keeps it
        tokens.forget_gguf(tokenizer)
        if tokens.find_special_anywhere(tokenizer):
            self.notes.append("%s: special tokens were found only behind a blank; now they are found anywhere in a text" % name)
        shipped = tokens.shipped_template(tokenizer)
        own = tokens.chosen_template(template, shipped)
        lead = tokens.lead_ids(tokenizer, name)
        stops = find_stops(tokenizer, own, shipped, self.generation, name)
        self.eos_id, self.end, self.end_id, self.stop_ids = stops.eos_id, stops.end, stops.end_id, stops.stop_ids
        self.notes.extend(stops.notes)
        if own is None:
            self.chat_template, same = tokens.default_template(tokenizer, lead)
            if not same:
                self.notes.append("%s: the chat route cannot give the ids of /generate with this tokenizer; use /generate" % name)
            source = DEFAULT_CHAT_TEMPLATE
        else:
            source = self.chat_template = own
            self.notes.extend(match_bos(tokenizer, own, lead, name))
        described = "default" if own is None else "the model's" if template == "auto" else template
        self.format = PromptFormat(source, tokens.template_tokens(tokenizer), self.end, own is not None, described)
        self.spans = SpanEncoder(tokenizer, self.format, self.end, self.end_id, self.eos_id)
        self._check_turns()

    @classmethod
    def load(cls, path: str, template: str = "auto") -> "TextCodec":
        """From an HF folder, a from-hf folder or a hub name. ``template``: auto, default, or the path of a .jinja file."""
        from transformers import AutoTokenizer

        folder = Path(path)
        if not folder.is_dir() and (folder.exists() or path.startswith((".", "/", "~")) or path.count("/") > 1):
            raise UserError("%s: no such model folder" % path)
        if folder.is_dir() and not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
            raise UserError("%s: no tokenizer there (tokenizer.json or tokenizer.model); copy the base model's" % path)
        try:
            tokenizer = AutoTokenizer.from_pretrained(path)
        except Exception as error:  # the Rust tokenizers library raises bare Exception
            why = (" ".join(str(error).split()) or type(error).__name__)[:300]
            raise UserError("%s: its tokenizer cannot be loaded (tokenizer.json or tokenizer.model): %s" % (path, why)) from error
        jinja = folder / "chat_template.jinja"
        if jinja.is_file() and not getattr(tokenizer, "chat_template", None):  # transformers before 4.44 do not know this file
            tokenizer.chat_template = jinja.read_text(encoding="utf-8")
        codec = cls(tokenizer, template, path, _generation_config(path))
        if tokens.is_sentencepiece(folder / "tokenizer.model"):
            codec.sentencepiece = folder / "tokenizer.model"
        return codec

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        return max(self.tokenizer.get_vocab().values()) + 1

    @property
    def pad_id(self) -> int:
        """Fills rows; never learnt, so it may be any id."""
        pad = self.tokenizer.pad_token_id
        return self.eos_id if pad is None else pad

    def check_vocab(self, rows: int, where: str = "config.json") -> None:
        """``rows``: vocabulary size of the model's embedding. A smaller tokenizer is fine (padded embeddings)."""
        if self.vocab_size > rows:
            raise UserError(
                "%s: vocab_size: %d, but the tokenizer has ids up to %d; they do not belong together, or tokens were added without "
                "enlarging the model" % (where, rows, self.vocab_size - 1)
            )

    def prompt_ids(self, text: str) -> List[int]:
        """What /generate makes of a prompt."""
        return tokens.whole(self.tokenizer, text)

    def chat_ids(self, messages: Messages) -> List[int]:
        """What the chat route makes of messages, asking for an answer. Raises TemplateRefused."""
        text = render(self.chat_template, messages, True, tokens.template_tokens(self.tokenizer))
        return tokens.raw(self.tokenizer, text)

    def decode(self, ids: List[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def encode(self, record: Record) -> Sequence:
        """One record; see SpanEncoder, which takes many."""
        return self.spans.sequences([self.spans.plan(record)])[0]

    def _check_turns(self) -> None:
        """Encoding turn by turn is the same as encoding the whole text; else the tokenizer cannot be trained on conversations."""
        fields = {"rounds": [("ask", "1 a"), ("ans", "2 b"), ("ask", "3 c"), ("ans", "4 d")], "system": None}
        try:
            turns = self.format.turns("conversation", fields)
        except TemplateRefused:
            return  # one question and one answer is all that this template takes
        ids = self.encode(Record("conversation", fields, "")).ids
        text = turns[-1].prompt + turns[-1].answer + self.end.text
        whole = tokens.raw if self.format.own else tokens.whole
        if ids != whole(self.tokenizer, text) or ids[-1] != self.end_id:
            raise UserError(
                "%s: its tokenizer does not keep %s apart from the text around it, so an answer cannot be told from what follows"
                % (self.name, self.end.token)
            )

    def identity(self) -> Dict[str, Any]:
        """What a person would compare first in two runs; part of the data hash beside the ids themselves."""
        return {
            "tokenizer": type(self.tokenizer).__name__,
            "vocab_size": self.vocab_size,
            "template": hashlib.sha256(self.chat_template.encode("utf-8")).hexdigest(),
            "stop_ids": self.stop_ids,
        }

    def fingerprint(self) -> List[Any]:
        """All that, besides the records, decides the ids, the vocabulary and its merges too: who has the same gets the same ids."""
        form = self.format
        return [tokens.fingerprint(self.tokenizer), form.source, form.tokens, list(form.end), form.own, self.chat_template,
                self.eos_id, self.end_id, self.stop_ids, str(fixed_now())]  # fmt: skip

    def save(self, folder: Union[str, Path]) -> None:
        """Tokenizer files, chat template and generation_config.json, for transformers, TGI and vLLM.

        The template goes into tokenizer_config.json, the only place TGI reads, and into chat_template.jinja, where transformers
        looks first. Text generation stops at ``stop_ids``.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.tokenizer.chat_template = self.chat_template
        self.tokenizer.save_pretrained(str(folder))
        if self.sentencepiece is not None and not (folder / "tokenizer.model").exists():
            shutil.copyfile(str(self.sentencepiece), str(folder / "tokenizer.model"))
        path = folder / "tokenizer_config.json"
        config = json.loads(path.read_text(encoding="utf-8"))
        config["chat_template"] = self.chat_template
        # Old transformers write what was loaded, not what was set; transformers 5 drops "legacy", which decides ids.
        set_now = dict(self.tokenizer.special_tokens_map)  # asked one by one, old transformers complain of those not set
        set_now.update({name: getattr(self.tokenizer, name, None) for name in ("add_bos_token", "legacy")})
        for name in ("bos_token", "eos_token", "add_bos_token", "legacy"):
            if set_now.get(name) is not None:
                config[name] = set_now[name]
        _write_json(path, config)
        (folder / "chat_template.jinja").write_text(self.chat_template, encoding="utf-8")
        generation = {k: v for k, v in self.generation.items() if k not in ("_from_model_config", "transformers_version")}
        generation["eos_token_id"] = self.stop_ids
        generation["pad_token_id"] = self.pad_id
        if self.tokenizer.bos_token_id is not None:
            generation["bos_token_id"] = self.tokenizer.bos_token_id
        _write_json(folder / "generation_config.json", generation)
        self._prove_saved(folder)

    def _prove_saved(self, folder: Path) -> None:
        """What a server will load gives the ids of training; libraries have lost settings on this way more than once."""
        from transformers import AutoTokenizer

        again = AutoTokenizer.from_pretrained(str(folder), use_fast=self.tokenizer.is_fast)
        asked = self.format.render([{"role": "user", "content": "1 a"}], True)
        for text in ("1 a", instruct_prompt("1 a"), asked, "%s 2 b%s3\n" % (asked, self.end.text)):
            for ids in (tokens.raw, tokens.whole):
                if ids(again, text) != ids(self.tokenizer, text):
                    raise RunFailed("%s: the saved tokenizer gives other ids than the one it was made from (%r)" % (folder, text))


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def _generation_config(path: str) -> Dict[str, Any]:
    """generation_config.json of a folder or hub model; {} when there is none."""
    folder = Path(path)
    try:
        if folder.is_dir():
            found = json.loads((folder / "generation_config.json").read_text(encoding="utf-8"))
            return found if isinstance(found, dict) else {}
        from transformers import GenerationConfig

        return dict(GenerationConfig.from_pretrained(path).to_diff_dict())
    except (OSError, ValueError):
        return {}
