"""What the proof is computed on: fixed ids from the whole vocabulary, fixed texts through the export's tokenizer, samples of the
run."""

import random
from pathlib import Path
from typing import Any, List, NamedTuple

import numpy as np

from pipeline_train.errors import RunFailed
from pipeline_train.families import Dims

TEXTS = (
    "The quick brown fox jumps over the lazy dog, 3.14159 times.",
    "### Human: What is the capital of France?\n### Assistant:",
    "def add(a, b):\n    return a + b\n",
    "你好，世界。今天天气怎么样？",
)
RANDOM_LENGTH = 128
SAMPLES, SAMPLE_LENGTH = 4, 128


class Prompts(NamedTuple):
    """``rows``: token ids, one list per prompt. ``texts``: those among them that came from texts. ``samples``: how many are the
    run's."""

    rows: List[List[int]]
    texts: List[str]
    samples: int


def random_ids(dims: Dims) -> List[int]:
    """Fixed ids drawn from every part of the vocabulary, as many as the model and RANDOM_LENGTH allow."""
    draw = random.Random(20240229)
    length = min(RANDOM_LENGTH, dims.max_positions or RANDOM_LENGTH)
    ids = [min(dims.vocab - 1, int((i + draw.random()) * dims.vocab / length)) for i in range(length)]
    draw.shuffle(ids)
    return ids


def run_samples(checkpoint: Path, dims: Dims) -> List[List[int]]:
    """The beginnings of some samples that the run learnt, evenly spread; [] where the run's encoded data (<out>/data, written as
    pipeline_train/data/feed.py says) is not there any more, or not whole."""
    data = checkpoint.parent.parent / "data"
    try:
        ids = np.load(str(data / "train.ids.npy"), mmap_mode="r", allow_pickle=False)
        offsets = np.load(str(data / "train.offsets.npy"), mmap_mode="r", allow_pickle=False)
        chosen = sorted({i * len(offsets) // SAMPLES for i in range(SAMPLES)})
        length = min(SAMPLE_LENGTH, dims.max_positions or SAMPLE_LENGTH)
        rows = [ids[int(first) : int(first) + min(int(n), length)].tolist() for first, n in offsets[chosen, :2]]
    except (OSError, ValueError, IndexError, TypeError):
        return []
    return [row for row in rows if row and 0 <= min(row) and max(row) < dims.vocab]


def load_tokenizer(folder: Path, what: str) -> Any:
    """AutoTokenizer of a folder, tried once. Raises RunFailed when it does not load or work; ``what`` names the folder."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
        tokenizer(TEXTS[0])
    except Exception as error:  # the tokenizers library raises Exception itself
        raise RunFailed("AutoTokenizer cannot use %s: %s" % (what, first_line(error))) from error
    return tokenizer


def text_ids(folder: Path, texts: List[str], dims: Dims) -> List[List[int]]:
    """The texts through the export's own tokenizer. Raises RunFailed when it does not load or does not fit the model."""
    tokenizer = load_tokenizer(folder, "the export")
    rows = [list(tokenizer(text)["input_ids"]) for text in texts]
    over = max((i for row in rows for i in row), default=0)
    if over >= dims.vocab:
        raise RunFailed("the tokenizer gives id %d, but the embedding has %d rows" % (over, dims.vocab))
    if len({tuple(row) for row in rows if row}) < len(set(texts)):  # an empty vocabulary loads without complaint
        raise RunFailed("the tokenizer gives no ids, or the same ones for different texts; its files are not whole")
    return [row[: dims.max_positions] for row in rows]


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).split("\n")[0][:200]
