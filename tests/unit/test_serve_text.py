"""Text token by token equals the text as a whole: byte-level BPE, sentencepiece spaces and characters cut into bytes."""

import json
import threading
import time

import pytest

pytest.importorskip("starlette", reason="the embedded server needs Python 3.10")
from serve.embedded.errors import ApiError  # noqa: E402
from serve.embedded.text import Spelling, Text  # noqa: E402
from tests.tokenizers import CHATML, KINDS, tiny_tokenizer  # noqa: E402

ANSWERS = [" Paris is the capital of France.", " 你好，世界 🎉🧑‍🚀 naïve", " a  b\n\n  c\td", " def f(x):\n    return x", " ☃"]


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    root = tmp_path_factory.mktemp("tokenizers")
    return {
        kind: Text(str(tiny_tokenizer(root / kind, kind, chat_template=CHATML, special=["<|im_start|>", "<|im_end|>"])))
        for kind in KINDS
    }


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("answer", ANSWERS)
def test_pieces_add_up_to_the_answer(texts, kind, answer):
    """The answer's tokens are those behind the prompt in the whole text, as a trained model produces them."""
    text, prompt = texts[kind], "### Human: hi\n### Assistant:"
    ids, whole = text.encode(prompt, True), text.encode(prompt + answer, True)
    assert whole[: len(ids)] == ids, "the seam is not the subject here"
    spelling = Spelling(text, ids)
    pieces = [spelling.add(token) for token in whole[len(ids) :]]
    assert "".join(pieces) == spelling.whole() == answer


@pytest.mark.parametrize("kind", ["bpe", "spm"])
def test_a_character_of_several_tokens_comes_with_its_last(texts, kind):
    text = texts[kind]
    ids, whole = text.encode("a", True), text.encode("a🎉", True)
    spelling = Spelling(text, ids)
    pieces = [spelling.add(token) for token in whole[len(ids) :]]
    assert len(pieces) > 1 and pieces[-1] == "🎉" and set(pieces[:-1]) == {""}


@pytest.mark.parametrize("kind", ["bpe", "spm"])
def test_what_never_becomes_a_character_is_left_out(texts, kind):
    text = texts[kind]
    ids, whole = text.encode("a", True), text.encode("ab🎉", True)
    spelling = Spelling(text, ids)
    assert "".join(spelling.add(token) for token in whole[len(ids) : -1]) == spelling.whole() == "b"
    assert spelling.rest() == ""


def test_text_held_back_behind_a_broken_character_comes_at_the_end(texts):
    """Bytes of a random model: each token ends inside a character, so nothing is shown until no token follows."""
    text = texts["bpe"]
    half = text.encode("🎉", False)[:1]
    spelling = Spelling(text, text.encode("a", True))
    pieces = [spelling.add(token) for token in half + text.encode("b", False) + half]
    assert "".join(pieces) + spelling.rest() == spelling.whole() == "\ufffdb"


def test_special_tokens_show_in_their_event_and_not_in_the_text(texts):
    text = texts["bpe"]
    end = text.tokenizer.convert_tokens_to_ids("<|im_end|>")
    spelling = Spelling(text, text.encode("a", True))
    assert spelling.add(text.encode("b", False)[0]) == "b"
    assert spelling.add(end) == "<|im_end|>" and end in text.special_ids
    assert spelling.whole() == "b"


def test_a_special_token_without_a_role_is_special(tmp_path):
    """As in folders made from GGUF: the end of a turn is marked special in tokenizer.json and named nowhere else."""
    folder = tiny_tokenizer(tmp_path, "bpe", special=["<|im_end|>"])
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        settings = json.loads((folder / name).read_text())
        settings.pop("additional_special_tokens", None)
        settings.pop("extra_special_tokens", None)
        (folder / name).write_text(json.dumps(settings))
    text = Text(str(folder))
    end = text.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert end not in text.tokenizer.all_special_ids and end in text.special_ids and text.decode([end], skip_special=True) == ""


def test_spaces_are_not_tidied(texts):
    for text in texts.values():
        ids = text.encode("a", True)
        whole = text.encode("a , b . don 't", True)
        spelling = Spelling(text, ids)
        assert "".join(spelling.add(one) for one in whole[len(ids) :]) == spelling.whole() == " , b . don 't"


def test_a_long_answer_costs_no_more_per_token(texts):
    text = texts["bpe"]
    spelling, lengths = Spelling(text, text.encode("a", True)), []
    remembered = text.few

    def spy(ids):
        lengths.append(len(ids))
        return remembered(ids)

    text.few = spy
    try:
        for token in text.encode("hello world " * 300, False):
            spelling.add(token)
    finally:
        text.few = remembered
    assert max(lengths) < 20 and remembered.cache_info().hits > len(lengths) / 2


def test_special_tokens_are_added_to_prompts_and_not_to_chats(texts):
    text = texts["bpe-bos"]
    bos = text.tokenizer.bos_token_id
    assert text.encode("a", True)[0] == bos and text.encode("a", False)[0] != bos
    chat = text.render([{"role": "user", "content": "a"}])
    assert chat.endswith("<|im_start|>assistant\n") and text.encode(chat, False).count(bos) == 0


def test_offsets_are_characters(texts):
    found = texts["bpe"].offsets("é你 b", True)
    assert "".join(one[1] for one in found if one[1])[-2:] == " b" and found[-1][3] == 4


def test_a_trailing_assistant_message_goes_on(texts):
    text = texts["bpe"]
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "The answer"}]
    assert text.render(messages).endswith("<|im_start|>assistant\nThe answer")


def test_contents_of_several_parts_and_tool_calls(texts):
    text = texts["bpe"]
    parts = [{"type": "text", "text": "x"}, {"type": "text", "text": "y"}]
    assert "<|im_start|>user\nxy<|im_end|>" in text.render([{"role": "user", "content": parts}])
    calls = text.render([{"role": "assistant", "tool_calls": [{"id": 1}]}, {"role": "user", "content": "a"}])
    assert '[{"id":1}]' in calls
    with pytest.raises(ApiError) as caught:
        text.render([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}])
    assert caught.value.kind == "template_error"


def test_no_template_and_a_template_that_raises(tmp_path):
    bare = Text(str(tiny_tokenizer(tmp_path / "bare", "bpe")))
    with pytest.raises(ApiError) as caught:
        bare.render([{"role": "user", "content": "a"}])
    assert caught.value.body() == {"error": "Template error: template not found", "error_type": "template_error"}
    strict = Text(str(tiny_tokenizer(tmp_path / "strict", "bpe", chat_template="{{ raise_exception('user first') }}")))
    with pytest.raises(ApiError, match="Template error: user first"):
        strict.render([{"role": "system", "content": "a"}])
    config = tmp_path / "other.json"
    config.write_text(json.dumps({"chat_template": [{"name": "default", "template": "T:{{ messages[0]['content'] }}"}]}))
    assert Text(str(tmp_path / "bare"), tokenizer_config=str(config)).render([{"role": "user", "content": "a"}]) == "T:a"


def test_a_template_in_a_jinja_file_is_read(tmp_path):
    folder = tiny_tokenizer(tmp_path, "bpe")
    (folder / "chat_template.jinja").write_text("J:{{ messages[0]['content'] }}")
    assert Text(str(folder)).render([{"role": "user", "content": "a"}]) == "J:a"


def test_stop_ids_are_the_tokenizers_and_the_generation_configs(texts):
    text = texts["spm"]
    assert text.stop_ids == {2}
    text.add_stop_ids([5, 2])
    assert text.stop_ids == {2, 5}
    text.add_stop_ids(None)
    text.add_stop_ids(7)
    assert text.stop_ids == {2, 5, 7}


@pytest.mark.parametrize("call", [lambda text, long: text.encode(long, True), lambda text, long: text.offsets(long, True)])
def test_a_long_prompt_leaves_pythons_lock_to_others(texts, call):
    """Otherwise nobody is answered while a megabyte is tokenized."""
    begin, long = threading.Event(), "a " * 200000
    thread = threading.Thread(target=lambda: begin.wait() and call(texts["bpe"], long))
    thread.start()
    begin.set()
    turns = 0
    while thread.is_alive():
        time.sleep(0.005)
        turns += 1
    assert turns > 5  # one or two with the lock held


def test_a_tokenizer_that_transformers_cannot_read(tmp_path, monkeypatch):
    """It answers False, where it should raise."""
    from transformers import AutoTokenizer

    from pipeline_train.errors import UserError

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *args, **options: False)
    with pytest.raises(UserError) as error:
        Text(str(tmp_path))
    assert str(error.value) == "%s: its tokenizer cannot be read; export the model again" % tmp_path
