"""What serve.ds_generate refuses before it reads a weight."""

import json

import pytest

from pipeline_train import families
from pipeline_train.errors import UserError
from serve import ds_generate
from serve.ds_prompts import Prompt, read_prompts
from tests.models import make_hf, tiny_config
from tests.tokenizers import tiny_tokenizer


def dims(family, **overrides):
    return families.dims_of(tiny_config(family, **overrides))


@pytest.mark.parametrize("family, overrides, world, reason", [
    ("llama", {}, 3, "3 ranks cannot share this model's 4 heads evenly; take one of these numbers of ranks: 1, 2, 4"),
    ("llama", {"num_key_value_heads": 2}, 4, "2 key-value heads evenly; take one of these numbers of ranks: 1, 2"),
    ("llama", {"intermediate_size": 81}, 2, "81 feed-forward columns evenly; take one of these numbers of ranks: 1"),
    ("bloom", {"n_head": 6}, 4, "6 heads evenly; take one of these numbers of ranks: 1, 2, 3, 6"),
])  # fmt: skip
def test_ranks_that_cannot_share(family, overrides, world, reason):
    with pytest.raises(UserError) as error:
        ds_generate.check_ranks(dims(family, **overrides), world)
    assert str(error.value).endswith(reason)


def test_ranks_that_can_share():
    for world in (1, 2, 4):
        ds_generate.check_ranks(dims("llama"), world)
        ds_generate.check_ranks(dims("bloom"), world)


@pytest.mark.parametrize("wanted, own, cuda, version, chosen", [
    (None, "bfloat16", True, "0.19.8", "bf16"),
    (None, "float16", True, "0.9.2", "fp16"),
    (None, "float16", False, "0.19.8", "fp32"),
    (None, None, True, "0.19.8", "fp32"),
    ("bf16", "float32", False, "0.19.8", "bf16"),
])  # fmt: skip
def test_dtype(monkeypatch, wanted, own, cuda, version, chosen):
    monkeypatch.setattr(ds_generate.compat, "versions", lambda: {"deepspeed": version})
    assert ds_generate.dtype_of(wanted, {"torch_dtype": own} if own else {}, cuda) == chosen
    assert ds_generate.dtype_of(wanted, {"dtype": own} if own else {}, cuda) == chosen  # transformers 5 writes this


@pytest.mark.parametrize("wanted, own, cuda, version, reason", [
    (None, "bfloat16", True, "0.9.2", "bf16 is not known to the inference engine of deepspeed 0.9.2; give --dtype fp16 or fp32"),
    ("fp16", "float16", False, "0.19.8", "--dtype fp16: needs a GPU, and none is here; give --dtype fp32"),
])  # fmt: skip
def test_dtype_that_is_not_there(monkeypatch, wanted, own, cuda, version, reason):
    monkeypatch.setattr(ds_generate.compat, "versions", lambda: {"deepspeed": version})
    with pytest.raises(UserError) as error:
        ds_generate.dtype_of(wanted, {"torch_dtype": own}, cuda)
    assert str(error.value) == reason


def test_prompts_of_a_file(tmp_path):
    plain, lines = tmp_path / "p.txt", tmp_path / "p.jsonl"
    plain.write_text("one\n\n  two\u2028three\n", encoding="utf-8")
    lines.write_text('{"prompt": "a\\nb", "more": 1}\n\n{"prompt": "c"}\n', encoding="utf-8")
    assert read_prompts(["zero"], str(plain)) == ["zero", "one", "  two\u2028three"]
    assert read_prompts([], str(lines)) == ["a\nb", "c"]


@pytest.mark.parametrize("name, content, reason", [
    ("none.txt", None, "--prompts {}: cannot be read: No such file or directory"),
    ("empty.txt", b"\n \n", "no prompt: give --prompt TEXT, or --prompts FILE with one a line"),
    ("bytes.txt", b"\xff\xfe\x00", "--prompts {}: is not UTF-8 text"),
    ("bad.jsonl", b'{"prompt": "x"}\n{"text": "x"}\n', '{} line 2: expected a JSON object with a text "prompt"'),
    ("list.jsonl", b"[1]\n", '{} line 1: expected a JSON object with a text "prompt"'),
    ("number.jsonl", b'{"prompt": 3}\n', '{} line 1: expected a JSON object with a text "prompt"'),
])  # fmt: skip
def test_prompts_that_are_none(tmp_path, name, content, reason):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError) as error:
        read_prompts([], str(path))
    assert str(error.value) == reason.format(path)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tiny_tokenizer(tmp_path_factory.mktemp("model"), "bpe")
    make_hf(folder, tiny_config("llama", vocab_size=520, max_position_embeddings=16))
    return folder


@pytest.mark.parametrize("arguments, reason", [
    (["--prompt", "word " * 20], "prompt 1: its {n} tokens and --max-new-tokens 4 are more than the model's context of 16"),
    (["--prompt", "x", "--prompt", ""], "prompt 2 has no tokens"),
    (["--prompt", "x", "--max-new-tokens", "0"], "--max-new-tokens 0: at least 1 is needed"),
    (["--prompt", "x", "--batch", "-1"], "--batch -1: at least 1 is needed"),
])  # fmt: skip
def test_the_command_says_it_in_one_line(model, capfd, arguments, reason):
    arguments = (["--max-new-tokens", "4"] if "--max-new-tokens" not in arguments else []) + arguments
    assert ds_generate.main(["--model", str(model)] + arguments) == 2
    out, err = capfd.readouterr()
    head, _, tail = reason.partition("{n}")
    line = err.strip().splitlines()[-1]
    assert out == "" and line.startswith("serve.ds_generate: " + head) and line.endswith(tail) and "Traceback" not in err


def test_too_many_ranks(model, capfd, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert ds_generate.main(["--model", str(model), "--prompt", "x"]) == 2
    assert capfd.readouterr().err.strip().endswith("take one of these numbers of ranks: 1, 2, 4")


def test_another_rank_leaves_the_word_to_the_first(model, monkeypatch):
    held = []
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(ds_generate.time, "sleep", held.append)
    assert ds_generate.main(["--model", str(model / "none"), "--prompt", "x"]) == 2
    assert held == [ds_generate.HOLD_S]


@pytest.mark.parametrize("lost, reason", [("tokenizer", "its tokenizer cannot be loaded: "), ("model.safetensors", "its weights")])
def test_a_folder_that_lacks_something(model, tmp_path, capfd, lost, reason):
    for path in model.iterdir():
        if lost not in path.name:
            (tmp_path / path.name).write_bytes(path.read_bytes())
    assert ds_generate.main(["--model", str(tmp_path), "--prompt", "x", "--max-new-tokens", "2"]) == 2
    line = capfd.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("serve.ds_generate: %s: %s" % (tmp_path, reason))


def test_rows_are_cut_behind_the_first_stop():
    assert ds_generate.cut([5, 2, 7, 2], [2, 9]) == [5, 2]
    assert ds_generate.cut([5, 7], [2]) == [5, 7]


def test_one_object_a_line():
    class Tokenizer:
        def decode(self, ids, skip_special_tokens):
            assert skip_special_tokens
            return "".join(map(str, ids))

    batch = [Prompt("p\u2028q", [1]), Prompt("é", [2])]
    lines = list(ds_generate.lines(Tokenizer(), batch, [[3, 4], [5]], 7.123))
    assert [json.loads(line)["text"] for line in lines] == ["34", "5"]
    assert json.loads(lines[0])["prompt"] == "p\u2028q" and json.loads(lines[0])["tokens_per_s"] == 7.12
