"""What the training benchmarks train: a small llama's config.json with a tokenizer, and random words to learn."""

import json
import random
from pathlib import Path

from tests.tokenizers import tiny_tokenizer

WORDS = "red green blue one two three the a of and is to colour number answer".split()


def write(folder: Path, hidden: int, blocks: int, seq_len: int, texts: int) -> None:
    """folder/model and folder/train.jsonl, ``texts`` records of about ``seq_len`` tokens."""
    tiny_tokenizer(folder / "model")
    heads = max(1, hidden // 64)
    model = {
        "model_type": "llama", "vocab_size": 4096, "hidden_size": hidden, "intermediate_size": hidden * 11 // 4,
        "num_hidden_layers": blocks, "num_attention_heads": heads, "num_key_value_heads": heads, "eos_token_id": 2,
        "max_position_embeddings": seq_len,
    }  # fmt: skip
    (folder / "model" / "config.json").write_text(json.dumps(model))
    chosen = random.Random(0)
    with open(str(folder / "train.jsonl"), "w") as file:
        for _ in range(texts):
            text = " ".join(chosen.choice(WORDS) for _ in range(seq_len // 3))
            file.write(json.dumps({"type": "pretrain", "text": text}) + "\n")
