"""A small bloom to train from scratch: config.json and a byte-level BPE tokenizer learnt from the records' own text.

    python ci/demo/bloom.py RECORDS.jsonl OUTPUT_DIR

No weights are written: run.yaml says ``init: random``.
"""

import json
import sys
from pathlib import Path
from typing import Iterator

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import BloomConfig, PreTrainedTokenizerFast

SPECIAL = ["<unk>", "<s>", "</s>", "<pad>"]  # bloom's own, in its order


def lines(records: str) -> Iterator[str]:
    for line in Path(records).read_text(encoding="utf-8").splitlines():
        yield from ("%s: %s" % ("Assistant" if kind == "ans" else "Human", text) for kind, text in json.loads(line)["rounds"])


def tokenizer_of(records: str) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=2048, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(lines(records), trainer)
    unk, bos, eos, pad = SPECIAL
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token=unk, bos_token=bos, eos_token=eos, pad_token=pad, model_max_length=512
    )


def main(records: str, output: str) -> None:
    tokenizer = tokenizer_of(records)
    size = -(-len(tokenizer) // 64) * 64
    config = BloomConfig(
        vocab_size=size, hidden_size=256, n_layer=4, n_head=8, seq_length=512,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    config.architectures = ["BloomForCausalLM"]
    tokenizer.save_pretrained(output)
    config.save_pretrained(output)
    print("%s: bloom of %d blocks, %d tokens in its vocabulary" % (output, config.n_layer, len(tokenizer)))


if __name__ == "__main__":
    main(*sys.argv[1:])
