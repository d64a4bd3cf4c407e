"""Small real tokenizers, trained in the process: folders that ``AutoTokenizer.from_pretrained`` loads.

bpe        byte-level BPE (GPT-2 style), no BOS added, eos ``<|endoftext|>``
bpe-bos    the same, adding ``<s>`` in front of every text
spm        sentencepiece BPE with byte fallback, llama style, fast (tokenizer.json and tokenizer.model), BOS added
spm-slow   the same model as the folder of an old llama: tokenizer.model and no tokenizer.json
spm-2023   the same, its special tokens marked "normalized": a text holds ``</s>`` only behind a blank
spm-new    the same with ``legacy: false`` (no ``▁`` put after a special token)
"""

import io
import json
from pathlib import Path
from typing import Any, Iterable, List, Optional, Union

KINDS = ("bpe", "bpe-bos", "spm", "spm-slow", "spm-2023", "spm-new")

CHATML = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

TEXTS = [
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.",
    "Below is an instruction that describes a task, paired with an input that provides further context.",
    "### Instruction:\nName three colours.\n\n### Response:Red, green and blue.",
    "### Human: What is the capital of France?\n### Assistant: Paris is the capital of France.\n",
    "### Reference:\nThe sky looks blue because air scatters short waves.\n### Human: Why is the sky blue?\n### Assistant: Air.",
    "Hello, how are you today? I am fine, thank you (really). The answer is 42; 3 + 4 = 7.",
    "你好，你今天怎么样？我很好，谢谢。法国的首都是巴黎。",
    "什么是人工智能？人工智能是工程和科学的分支，致力于构建具有思维的机器。",
    "def add(a, b):\n    return a + b\n\nprint(add(1, 2))  # 3",
    "It's a dog's life: don't worry, we'll see what they've found. Émile déjà vu naïve façade.",
]


def tiny_tokenizer(
    folder: Union[str, Path],
    kind: str = "bpe",
    texts: Optional[Iterable[str]] = None,
    vocab: int = 512,
    chat_template: Optional[str] = None,
    special: Iterable[str] = (),
) -> Path:
    """Train and save one; ``special`` names further special tokens, ``chat_template`` is stored in tokenizer_config.json.

    ``vocab`` is an upper bound before ``special`` for bpe (at least 260) and exact for sentencepiece (at least 400).
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    corpus = list(texts) if texts is not None else TEXTS
    if kind.startswith("bpe"):
        tokenizer = _bpe(corpus, vocab, bos=kind == "bpe-bos")
    elif kind in KINDS:
        tokenizer = _spm(folder, corpus, vocab, kind)
    else:
        raise ValueError("unknown tokenizer kind %r" % kind)
    if special:
        tokenizer.add_special_tokens({"additional_special_tokens": list(special)})
    tokenizer.save_pretrained(str(folder))
    if kind == "spm-2023":
        _normalize_special(folder)
    if chat_template is not None:
        path = folder / "tokenizer_config.json"
        config = json.loads(path.read_text(encoding="utf-8"))
        config["chat_template"] = chat_template
        path.write_text(json.dumps(config, ensure_ascii=False, indent=1), encoding="utf-8")
    return folder


def _bpe(corpus: List[str], vocab: int, bos: bool) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    names = ["<|endoftext|>", "<pad>"] + (["<s>"] if bos else [])
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=names, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    core.train_from_iterator(corpus, trainer)
    if bos:
        core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", core.token_to_id("<s>"))])
    more = {"bos_token": "<s>"} if bos else {}
    return PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|endoftext|>", pad_token="<pad>", clean_up_tokenization_spaces=False, **more
    )


def _spm(folder: Path, corpus: List[str], vocab: int, kind: str) -> Any:
    import sentencepiece
    from transformers import LlamaTokenizer, LlamaTokenizerFast

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([line for text in corpus for line in text.split("\n") if line]),
        model_writer=model, vocab_size=vocab, model_type="bpe", byte_fallback=True, character_coverage=0.98,
        normalization_rule_name="identity", remove_extra_whitespaces=False, split_digits=True, allow_whitespace_only_pieces=True,
        unk_id=0, bos_id=1, eos_id=2, pad_id=-1, num_threads=1, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    path = folder / "tokenizer.model"
    path.write_bytes(model.getvalue())
    legacy = kind != "spm-new"
    slow = LlamaTokenizer(vocab_file=str(path), legacy=legacy, add_bos_token=True, clean_up_tokenization_spaces=False)
    if kind == "spm-slow":
        return slow
    slow.save_pretrained(str(folder))
    return LlamaTokenizerFast.from_pretrained(str(folder), legacy=legacy)


def _normalize_special(folder: Path) -> None:
    """The files that transformers of 2023 wrote for a llama, under the class name that still reads them as they are."""
    core = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    for token in core["added_tokens"]:
        token["normalized"] = True
    (folder / "tokenizer.json").write_text(json.dumps(core, ensure_ascii=False), encoding="utf-8")
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    config.pop("added_tokens_decoder", None)
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    (folder / "tokenizer_config.json").write_text(json.dumps(config, ensure_ascii=False), encoding="utf-8")
    marked = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
    path = folder / "special_tokens_map.json"
    special = json.loads(path.read_text(encoding="utf-8"))
    for name, text in (("bos_token", "<s>"), ("eos_token", "</s>"), ("unk_token", "<unk>")):
        special[name] = dict(marked, content=text)
    path.write_text(json.dumps(special, ensure_ascii=False), encoding="utf-8")
