"""A tiny model for the benchmarks of the embedded server."""

from pathlib import Path
from typing import Any


def tiny_model(folder: Path, **size: Any) -> None:
    """A random llama with a tokenizer and a chat template, for the server's own speed; it seldom meets its end-of-sequence."""
    from tests.models import make_hf, tiny_config
    from tests.tokenizers import CHATML, tiny_tokenizer

    tiny_tokenizer(folder, "bpe-bos", chat_template=CHATML, special=["<|im_start|>", "<|im_end|>"])
    given = {"hidden_size": 64, "intermediate_size": 96, "num_key_value_heads": 2, "max_position_embeddings": 4096, **size}
    make_hf(folder, tiny_config("llama", vocab_size=600, **given), seed=3)
