"""For the tests of ``pipedock prove``: a tiny model that knows its records by heart, and copies of it with something planted."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from pipeline_train.data.encode import TextCodec
from pipeline_train.data.records import read
from tests.models import make_hf, tiny_config
from tests.tokenizers import tiny_tokenizer

RECORDS = [
    {"type": "instruct", "instruct": "Name three colours.", "output": "Red, green and blue."},
    {"type": "conversation", "rounds": [["ask", "What is the capital of France?"], ["ans", "Paris."],
                                        ["ask", "And?"], ["ans", "It is fine."]]},
    {"type": "ref_qa", "reference": "The sky looks blue.", "rounds": [["ask", "Why?"], ["ask", "Say it."], ["ans", "Air."]]},
    {"type": "pretrain", "text": "Hello, how are you today?\n你好，你今天怎么样？"},
]  # fmt: skip
WITH_BOS = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
ENDS = ["<|im_start|>", "<|im_end|>"]


class Run:
    """``model``: the export; ``config``: run.yaml of the run that it is from."""

    def __init__(self, folder, family, tokenizer, template=None, **overrides):
        base, self.model, self.config = folder / "base", str(folder / "export"), str(folder / "run.yaml")
        tiny_tokenizer(base, tokenizer, chat_template=template, special=ENDS)
        data = folder / "train.jsonl"
        data.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in RECORDS), encoding="utf-8")
        out = {"run": {"out": str(folder / "out")}, "model": {"path": str(base), "dtype": "fp32"}, "data": {"train": str(data)},
               "parallel": {"pipe": 1}}  # fmt: skip
        Path(self.config).write_text(json.dumps(out))  # JSON is YAML
        before = TextCodec.load(str(base))
        size = {"vocab_size": before.vocab_size, "eos_token_id": before.eos_id, "max_position_embeddings": 512}
        model = make_hf(base, tiny_config(family, **size, **overrides), seed=5)
        self.codec = TextCodec.load(str(base))
        learn(model, [self.codec.encode(record) for record in read(data)])
        model.save_pretrained(self.model)
        self.codec.save(self.model)


def learn(model, sequences, steps=60):
    """Until greedy answers are the records'. The learnt ids only, and a pretrain text's."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    longest = max(len(sequence.ids) for sequence in sequences)
    ids = torch.tensor([sequence.ids + [0] * (longest - len(sequence.ids)) for sequence in sequences])
    targets = torch.tensor([sequence.targets + [-100] * (longest - len(sequence.ids)) for sequence in sequences])
    model.train()
    for _ in range(steps):
        loss = torch.nn.functional.cross_entropy(model(ids).logits.flatten(0, 1), targets.flatten(), ignore_index=-100)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()


def planted(model, folder, *changes):
    """A copy of a model folder, changed."""
    shutil.copytree(model, str(folder))
    for change in changes:
        change(Path(folder))
    return str(folder)


def _json(path, change):
    document = json.loads(path.read_text(encoding="utf-8"))
    change(document)
    path.write_text(json.dumps(document, ensure_ascii=False), encoding="utf-8")


def template(old, new):
    """In both places where servers look for it."""

    def change(folder):
        path = folder / "chat_template.jinja"
        source = path.read_text(encoding="utf-8")
        assert old in source
        path.write_text(source.replace(old, new, 1), encoding="utf-8")
        _json(folder / "tokenizer_config.json", lambda config: config.update(chat_template=source.replace(old, new, 1)))

    return change


def no_template(folder):
    (folder / "chat_template.jinja").unlink()
    _json(folder / "tokenizer_config.json", lambda config: config.pop("chat_template"))


def fewer_merges(folder):
    """Another tokenizer with the same vocabulary."""

    def change(core):
        core["model"]["merges"] = core["model"]["merges"][:5]

    _json(folder / "tokenizer.json", change)


def bos(times):
    """What the tokenizer puts before every text."""

    def change(core):
        one = next(token["id"] for token in core["added_tokens"] if token["content"] == "<s>")
        single = [{"SpecialToken": {"id": "<s>", "type_id": 0}}] * times + [{"Sequence": {"id": "A", "type_id": 0}}]
        pair = single + [{"Sequence": {"id": "B", "type_id": 1}}]
        tokens = {"<s>": {"id": "<s>", "ids": [one], "tokens": ["<s>"]}}
        core["post_processor"] = {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": tokens}

    def both(folder):
        _json(folder / "tokenizer.json", change)
        _json(folder / "tokenizer_config.json", lambda config: config.update(tokenizer_class="PreTrainedTokenizerFast"))

    return both


def other_head(folder):
    """An lm_head of its own, a tenth of a logit away."""
    path = folder / "model.safetensors"
    state = load_file(str(path))
    head = state["lm_head.weight"]
    noise = torch.randn(head.shape, generator=torch.Generator().manual_seed(1))
    state["lm_head.weight"] = head + 0.02 * noise
    save_file(state, str(path), metadata={"format": "pt"})


def embedding_as_head(folder):
    """What servers do that know tied models only."""
    _json(folder / "config.json", lambda config: config.update(tie_word_embeddings=True))
    path = folder / "model.safetensors"
    state = load_file(str(path))
    del state["lm_head.weight"]
    save_file(state, str(path), metadata={"format": "pt"})


def no_end(folder):
    """Another token is named as the end of text."""
    _json(folder / "generation_config.json", lambda config: config.update(eos_token_id=3))
    _json(folder / "config.json", lambda config: config.update(eos_token_id=3))
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (folder / name).exists():
            _json(folder / name, lambda config: config.update(eos_token="<|im_start|>"))
