"""The prompts of serve.ds_generate, checked and encoded before any weight is read."""

import json
import sys
from pathlib import Path
from typing import Any, List, NamedTuple, Optional

from pipeline_train import families
from pipeline_train.errors import UserError


class Prompt(NamedTuple):
    text: str
    ids: List[int]


def read_prompts(given: List[str], path: Optional[str]) -> List[str]:
    """``given``, then those of a file: one a line, or JSON Lines of {"prompt": ...} when its name ends in .jsonl; "-" is stdin.
    Empty lines are left out. Raises UserError."""
    found = list(given)
    if path is not None:
        try:
            text = sys.stdin.read() if path == "-" else Path(path).read_text(encoding="utf-8-sig")
        except OSError as error:
            raise UserError("--prompts %s: cannot be read: %s" % (path, error.strerror)) from None
        except ValueError:
            raise UserError("--prompts %s: is not UTF-8 text" % path) from None
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                found.append(_prompt_of(line, path, number) if path.endswith(".jsonl") else line)
    if not found:
        raise UserError("no prompt: give --prompt TEXT, or --prompts FILE with one a line")
    return found


def _prompt_of(line: str, path: str, number: int) -> str:
    try:
        prompt = json.loads(line)["prompt"]
    except (ValueError, KeyError, TypeError, RecursionError):
        prompt = None
    if not isinstance(prompt, str):
        raise UserError('%s line %d: expected a JSON object with a text "prompt"' % (path, number))
    return prompt


def encode(tokenizer: Any, texts: List[str], new: int, dims: families.Dims) -> List[Prompt]:
    """Raises UserError for a prompt of no tokens, and for one that does not fit into the context together with its answer."""
    prompts = []
    for number, text in enumerate(texts, 1):
        ids = [int(token) for token in tokenizer(text)["input_ids"]]
        if not ids:
            raise UserError("prompt %d has no tokens" % number)
        if dims.max_positions is not None and len(ids) + new > dims.max_positions:
            raise UserError(
                "prompt %d: its %d tokens and --max-new-tokens %d are more than the model's context of %d"
                % (number, len(ids), new, dims.max_positions)
            )
        prompts.append(Prompt(text, ids))
    return prompts
