"""Training ids == the ids a server makes of the same prompt, for every kind of tokenizer, both formats, every turn."""

import json
import random
import shutil

import pytest
import transformers
from transformers import AutoTokenizer

from pipeline_train.data import tokens
from pipeline_train.data.encode import TextCodec
from pipeline_train.data.records import Record
from pipeline_train.data.template import TemplateRefused, instruct_prompt, messages_of, render
from pipeline_train.errors import RunFailed, UserError
from tests.tokenizers import CHATML, KINDS, TEXTS, tiny_tokenizer

OLD = tuple(int(n) for n in transformers.__version__.split(".")[:2]) < (4, 34)
SPECIAL = ["<|im_start|>", "<|im_end|>"]
ROUNDS = [
    ("ask", "What is the capital of France?"), ("ans", "Paris is the capital (of France)."), ("ask", "more"), ("ask", "你好"),
    ("ans", "法国的首都是巴黎 😀\n\n1. naïve"), ("ask", "  blanks \n"), ("ans", "\n:) "), ("ask", "not answered"),
]  # fmt: skip
ANSWERS = ["Red, green", " red", "(Red)", ":red", "\nred", "\n\n red", "法国", "😀", "42", "'s", ".", ") ok"]


def record(kind, **fields):
    return Record(kind, fields, "d.jsonl:1")


TALK = record("conversation", rounds=ROUNDS, system=None)
RECORDS = [
    TALK,
    record("conversation", rounds=ROUNDS[:2], system="Be kind."),
    record("ref_qa", reference="The sky looks blue.", rounds=ROUNDS[:5], system=None),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = {}

    def make(kind, chat=False):
        if (kind, chat) not in made:
            path = tmp_path_factory.mktemp(kind)
            made[kind, chat] = tiny_tokenizer(
                path, kind, chat_template=CHATML if chat else None, special=SPECIAL if chat else (), texts=TEXTS + [":) ;) :("] * 9
            )
        return str(made[kind, chat])

    return make


def answers(sequence):
    """[(start, stop)] of the learnt spans."""
    learn = sequence.learn + [False]
    starts = [i for i in range(1, len(learn)) if learn[i] and not learn[i - 1]]
    return [(i, learn.index(False, i)) for i in starts]


def chat_route(server, messages):
    """What a server makes of messages with the exported tokenizer alone."""
    if not hasattr(server, "apply_chat_template"):  # transformers before 4.34; test_data_template has the renderer's own proof
        text = render(server.init_kwargs["chat_template"], messages, True, tokens.template_tokens(server))
        return server(text, add_special_tokens=False)["input_ids"]
    return server.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)


@pytest.mark.parametrize("chat", [False, True], ids=["default", "chatml"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_turn_is_trained_on_what_the_server_will_see(folder, tmp_path, kind, chat):
    """The exported folder, read by transformers alone, gives for every turn the ids that training has before its answer."""
    codec = TextCodec.load(folder(kind, chat))
    codec.save(tmp_path)
    server = AutoTokenizer.from_pretrained(str(tmp_path))
    for item in RECORDS:
        sequence = codec.encode(item)
        turns = codec.format.turns(item.kind, item.fields)
        spans = answers(sequence)
        assert len(spans) == len(turns) == sum(who == "ans" for who, _ in item.fields["rounds"])
        messages = messages_of(item.kind, item.fields, chat)
        asked = [messages[:i] for i, m in enumerate(messages) if m["role"] == "assistant"]
        for (start, stop), turn, before in zip(spans, turns, asked):
            assert chat_route(server, before) == sequence.ids[:start] == codec.chat_ids(before)
            if not chat:
                assert server(turn.prompt)["input_ids"] == sequence.ids[:start] == codec.prompt_ids(turn.prompt)
            assert sequence.ids[stop - 1] == codec.stop_ids[0] and codec.stop_ids[0] not in sequence.ids[start : stop - 1]
            said = codec.decode(sequence.ids[: stop - 1])[len(codec.decode(sequence.ids[:start])) :]
            assert said == turn.answer
    assert codec.encode(TALK).ids[-1] == codec.stop_ids[0]  # the last ask has no answer and is not trained


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("answer", ANSWERS)
def test_the_instruct_prompt_keeps_its_ids_whatever_is_answered(folder, kind, answer):
    codec = TextCodec.load(folder(kind))
    sequence = codec.encode(record("instruct", instruct="Name three.", input=None, output=answer))
    prompt = instruct_prompt("Name three.")
    (start, stop), = answers(sequence)  # fmt: skip
    assert sequence.ids[:start] == AutoTokenizer.from_pretrained(folder(kind))(prompt)["input_ids"]
    assert sequence.ids[stop - 1 :] == [codec.eos_id]
    assert codec.decode(sequence.ids[start - 1 : stop - 1]).lstrip(" ") == ":" + answer  # no blank comes in at the seam
    assert sequence.targets == [-100] * (start - 1) + sequence.ids[start:] + [-100]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("answer", ANSWERS)
def test_a_continuation_brings_no_blank_of_its_own(folder, kind, answer):
    """What stands in where prompt and answer merge."""
    codec = TextCodec.load(folder(kind))
    prompt = codec.prompt_ids("### Response:")
    assert codec.decode(prompt + codec.spans.continuation(answer)) == codec.decode(prompt) + answer
    assert codec.spans.continuation("") == []


def test_a_token_that_merges_across_the_seam(folder):
    """ ":" + ":)" would be one token of the whole text; the server's prompt ends with ":" alone."""
    codec = TextCodec.load(folder("bpe"))
    joint = tokens.raw(codec.tokenizer, "### Response:)")
    alone = tokens.raw(codec.tokenizer, "### Response:")
    assert joint[: len(alone)] != alone, "the fixture lost its point"
    sequence = codec.encode(record("instruct", instruct="smile", input=None, output=") ok"))
    (start, _), = answers(sequence)  # fmt: skip
    assert sequence.ids[:start] == codec.prompt_ids(instruct_prompt("smile"))
    assert codec.decode(sequence.ids[start:-1]) == ") ok"


def test_a_merge_in_the_history_is_the_servers_and_not_learnt(folder, tmp_path):
    """A template with no blank before the answer: the first answer merges into its prompt once it is history."""
    template = tmp_path / "tight.jinja"
    template.write_text(
        "{% for m in messages %}{{ m['role'] + ':' + m['content'] + '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    )
    codec = TextCodec.load(folder("bpe", True), str(template))
    rounds = [("ask", "smile"), ("ans", ") sure"), ("ask", "again"), ("ans", ") yes")]
    sequence = codec.encode(record("conversation", rounds=rounds, system=None))
    first, second = codec.format.turns("conversation", {"rounds": rounds, "system": None})
    (start, stop), (last, _) = answers(sequence)
    assert sequence.ids[:last] == tokens.raw(codec.tokenizer, second.prompt)
    assert codec.decode(sequence.ids[start:stop]) == " sure<|im_end|>" and codec.decode(sequence.ids[:start]).endswith(
        "assistant:)"
    )
    assert codec.decode(sequence.ids[last:]) == ") yes<|im_end|>"
    assert sequence.ids[: len(tokens.raw(codec.tokenizer, first.prompt))] != tokens.raw(codec.tokenizer, first.prompt)


def test_a_history_that_is_split_elsewhere_is_learnt_from_behind_the_seam(tmp_path):
    """ "ab" is one token of the prompt; with the answer "c" behind it, "a" and "bc" are: "bc" belongs to no answer."""
    path = tiny_tokenizer(tmp_path / "m", "bpe", texts=["bc " * 60 + "ab " * 20], special=SPECIAL, vocab=262)
    (tmp_path / "x.jinja").write_text(
        "{% for m in messages %}{{ ('q' if m['role'] == 'user' else 'ab') + m['content'] + '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'ab' }}{% endif %}"
    )
    codec = TextCodec.load(str(path), str(tmp_path / "x.jinja"))
    names = codec.tokenizer.convert_ids_to_tokens
    assert names(tokens.raw(codec.tokenizer, "ab")) == ["ab"] and names(tokens.raw(codec.tokenizer, "abcz")) == ["a", "bc", "z"]
    sequence = codec.encode(record("conversation", rounds=[("ask", "1"), ("ans", "cz"), ("ask", "2"), ("ans", "cz")], system=None))
    marked = ["*" + name if learn else name for name, learn in zip(names(sequence.ids), sequence.learn)]
    assert marked[:7] == ["q", "1", "<|im_end|>", "a", "bc", "*z", "*<|im_end|>"]
    assert marked[7:] == ["q", "2", "<|im_end|>", "ab", "*c", "*z", "*<|im_end|>"]


@pytest.mark.parametrize("kind, lead", [("bpe", 0), ("bpe-bos", 1), ("spm", 1)])
def test_pretrain_text_is_learnt_whole_with_eos(folder, kind, lead):
    codec = TextCodec.load(folder(kind))
    sequence = codec.encode(record("pretrain", text="It's 你好 :)"))
    assert sequence.ids == AutoTokenizer.from_pretrained(folder(kind))("It's 你好 :)")["input_ids"] + [codec.eos_id]
    assert sequence.ids[:lead] == [codec.tokenizer.bos_token_id] * lead
    assert sequence.targets == sequence.ids[1:] + [-100]
    assert codec.encode(record("pretrain", text=" \n")).ids == []


def test_blank_answers_are_history_and_not_learnt(folder):
    codec = TextCodec.load(folder("bpe"))
    rounds = [("ask", "a"), ("ans", " "), ("ask", "b"), ("ans", "c"), ("ask", "d"), ("ans", "")]
    sequence = codec.encode(record("conversation", rounds=rounds, system=None))
    (start, stop), = answers(sequence)  # fmt: skip
    assert codec.decode(sequence.ids[start:stop]) == " c<|endoftext|>" and stop == len(sequence.ids)
    assert codec.encode(record("instruct", instruct="a", input=None, output="")).ids == []


@pytest.mark.parametrize("chat", [False, True], ids=["default", "chatml"])
@pytest.mark.parametrize("kind", KINDS)
def test_an_export_encodes_as_before(folder, tmp_path, kind, chat):
    codec = TextCodec.load(folder(kind, chat))
    codec.save(tmp_path)
    again = TextCodec.load(str(tmp_path))
    assert again.notes == [] and again.identity() == codec.identity() and again.format.own == chat
    for item in RECORDS + [record("instruct", instruct="i", input="x", output="o")]:
        assert again.encode(item) == codec.encode(item)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert config["chat_template"] == (tmp_path / "chat_template.jinja").read_text(encoding="utf-8") == codec.chat_template
    assert (tmp_path / "tokenizer.model").exists() == kind.startswith("spm")
    assert config["eos_token"] == ("<|im_end|>" if chat else codec.tokenizer.convert_ids_to_tokens(codec.eos_id))


def test_a_saved_tokenizer_that_gives_other_ids_is_a_failure(folder, tmp_path, monkeypatch):
    codec = TextCodec.load(folder("bpe"))
    other = tiny_tokenizer(tmp_path / "other", "bpe", texts=["1 a " * 50])
    (tmp_path / "other" / "tokenizer.json").rename(tmp_path / "tokenizer.json")
    save = codec.tokenizer.save_pretrained

    def broken(out):
        save(out)
        shutil.copyfile(str(tmp_path / "tokenizer.json"), out + "/tokenizer.json")

    monkeypatch.setattr(codec.tokenizer, "save_pretrained", broken)
    with pytest.raises(RunFailed, match="the saved tokenizer gives other ids than the one it was made from"):
        codec.save(other)


def test_generation_stops_at_the_turns_end_first_then_at_eos_and_what_the_model_listed(folder, tmp_path):
    path = tiny_tokenizer(tmp_path / "m", "bpe", chat_template=CHATML, special=SPECIAL)
    listed = {"eos_token_id": [0, 5, 512], "temperature": 0.6, "_from_model_config": True}
    (path / "generation_config.json").write_text(json.dumps(listed))
    codec = TextCodec.load(str(path))
    start, end = codec.tokenizer.convert_tokens_to_ids(SPECIAL)
    assert (start, end) == (512, 513) and codec.stop_ids == [513, 0, 5]  # 512 begins turns
    codec.save(tmp_path / "out")
    saved = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert saved == {"temperature": 0.6, "eos_token_id": [513, 0, 5], "pad_token_id": 1}
    (path / "generation_config.json").write_text("[1")
    assert TextCodec.load(str(path)).stop_ids == [513, 0]


def chatml_with_wrong_eos(folder, **more):
    """What transformers makes of a GGUF file: bos and eos are the token that begins turns, and BOS is added."""
    path = tiny_tokenizer(folder, "spm", chat_template=CHATML, special=SPECIAL)
    tokenizer = AutoTokenizer.from_pretrained(str(path))
    tokenizer.bos_token = tokenizer.eos_token = "<|im_start|>"
    tokenizer.add_bos_token = True
    for key, value in more.items():
        setattr(tokenizer, key, value)
    return tokenizer


def test_an_eos_that_begins_turns_is_replaced_and_no_bos_is_put_before_it(tmp_path):
    tokenizer = chatml_with_wrong_eos(tmp_path / "a")
    assert tokenizer("a")["input_ids"][0] == tokenizer.convert_tokens_to_ids("<|im_start|>")
    codec = TextCodec(tokenizer, "auto", "m")
    assert codec.notes[-2:] == [  # before them, with transformers of 2023, the one about special tokens
        "m: its end-of-sequence token <|im_start|> does not end a turn; <|im_end|> does and replaces it",
        "m: its chat template has no BOS; the tokenizer no longer adds one",
    ]
    assert codec.stop_ids == [codec.eos_id] == [codec.tokenizer.convert_tokens_to_ids("<|im_end|>")]
    codec.save(tmp_path / "out")
    saved = AutoTokenizer.from_pretrained(str(tmp_path / "out"))
    assert saved.eos_token == "<|im_end|>" and saved("a")["input_ids"] == saved("a", add_special_tokens=False)["input_ids"]
    default = TextCodec(chatml_with_wrong_eos(tmp_path / "b"), "default", "m")  # known from the template even when that is not used
    assert default.tokenizer.eos_token == "<|im_end|>" and default.stop_ids == [default.eos_id]


@pytest.mark.skipif(OLD, reason="transformers of this age cannot read GGUF")
def test_a_gguf_file_is_never_saved_as_the_sentencepiece_model(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + b"\0" * 1000)
    codec = TextCodec(
        chatml_with_wrong_eos(tmp_path / "a", vocab_file=str(tmp_path / "model.gguf"), clean_up_tokenization_spaces=True)
    )
    codec.save(tmp_path / "out")
    assert not (tmp_path / "out" / "tokenizer.model").exists()
    saved = (tmp_path / "out" / "tokenizer_config.json").read_text(encoding="utf-8")
    assert str(tmp_path) not in saved and json.loads(saved)["clean_up_tokenization_spaces"] is False
    assert TextCodec.load(str(tmp_path / "out")).encode(TALK) == codec.encode(TALK)


def test_a_template_that_writes_bos_itself(folder):
    codec = TextCodec(AutoTokenizer.from_pretrained(folder("bpe-bos", True)), "auto")
    assert codec.notes and not codec.prompt_ids("a")[0] == codec.tokenizer.bos_token_id
    for bos in ("{{ bos_token }}", "<s>"):
        tokenizer = AutoTokenizer.from_pretrained(folder("bpe-bos", True))
        tokenizer.chat_template = bos + CHATML
        codec = TextCodec(tokenizer, "auto")
        assert codec.notes == [] and codec.encode(TALK).ids[:2] == [codec.tokenizer.bos_token_id, 512]
        turn = codec.format.turns(TALK.kind, TALK.fields)[0]
        assert codec.prompt_ids(turn.prompt[len("<s>") :]) == codec.chat_ids([{"role": "user", "content": ROUNDS[0][1]}])


def test_a_tokenizer_whose_chat_route_cannot_be_made_equal_is_noted(folder):
    """Here <s> swallows the blank behind it, and the first word after it gets no ``▁`` of its own."""
    from tokenizers import Tokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder("spm-new"))
    core = json.loads(tokenizer.backend_tokenizer.to_str())
    next(token for token in core["added_tokens"] if token["content"] == "<s>")["rstrip"] = True
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(core))
    codec = TextCodec(tokenizer, "auto", "m")
    if OLD:  # these always put a ``▁`` there
        assert codec.chat_ids([{"role": "user", "content": "a"}]) == codec.prompt_ids("### Human: a\n### Assistant:")
    else:
        assert codec.notes == ["m: the chat route cannot give the ids of /generate with this tokenizer; use /generate"]


def test_the_vocabulary_must_fit_the_model(folder):
    codec = TextCodec.load(folder("bpe"))
    codec.check_vocab(512)
    codec.check_vocab(600)
    with pytest.raises(UserError, match="config.json: vocab_size: 511, but the tokenizer has ids up to 511; they do not belong"):
        codec.check_vocab(511)


def without_eos(folder, **changes):
    path = tiny_tokenizer(folder, "bpe")
    config = json.loads((path / "tokenizer_config.json").read_text())
    config.update(changes)
    (path / "tokenizer_config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    (path / "special_tokens_map.json").unlink()
    return str(path)


def test_no_eos_is_refused_unless_the_template_has_an_end(tmp_path):
    with pytest.raises(UserError, match="the tokenizer has no end-of-sequence token; set eos_token in tokenizer_config.json"):
        TextCodec.load(without_eos(tmp_path / "a", eos_token=None))
    path = tiny_tokenizer(tmp_path / "b", "bpe", chat_template=CHATML, special=SPECIAL)
    tokenizer = AutoTokenizer.from_pretrained(str(path))
    tokenizer.eos_token = None
    codec = TextCodec(tokenizer)
    assert codec.tokenizer.eos_token == "<|im_end|>" and codec.stop_ids == [513]


def test_a_tokenizer_that_ends_every_prompt_is_made_to_stop_it(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder("spm"))
    tokenizer.add_eos_token = True
    assert tokenizer("a")["input_ids"][-1] == 2
    codec = TextCodec(tokenizer)
    assert codec.prompt_ids("a")[-1] != 2 and codec.encode(record("pretrain", text="a")).ids.count(2) == 1
    from tokenizers.processors import TemplateProcessing

    tokenizer = AutoTokenizer.from_pretrained(folder("bpe"))
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A <pad>", special_tokens=[("<pad>", 1)])
    with pytest.raises(UserError, match="the tokenizer appends tokens to every prompt .*<pad>.*; set add_eos_token to false"):
        TextCodec(tokenizer)


def refused(path, template="auto"):
    with pytest.raises(UserError) as error:
        TextCodec.load(str(path), template)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_what_cannot_be_loaded_is_one_line(folder, tmp_path):
    assert refused(tmp_path / "no") == "%s: no such model folder" % (tmp_path / "no")
    line = "%s: no tokenizer there (tokenizer.json or tokenizer.model); copy the base model's"
    assert refused(tmp_path) == line % tmp_path
    path = tiny_tokenizer(tmp_path / "a", "bpe")
    (path / "tokenizer.json").write_text('{"version": "1.0"')
    assert "its tokenizer cannot be loaded" in refused(path)
    (path / "tokenizer.json").write_text('{"version": "1.0"}')
    assert "its tokenizer cannot be loaded" in refused(path)
    bpe = folder("bpe")
    assert refused(bpe, "alpaca") == "data.template: expected auto, default or the path of a .jinja file, got alpaca"
    assert refused(bpe, "no.jinja").startswith("data.template: no.jinja cannot be read")
    (tmp_path / "x.jinja").write_text("{% for m in messages %}")
    assert "its chat template cannot be rendered: line 1 of the chat template" in refused(bpe, str(tmp_path / "x.jinja"))
    (tmp_path / "x.jinja").write_text("{% for m in messages %}{{ m.content }}\n{% endfor %}")
    assert "puts no special token after an answer, so the model could not learn to stop" in refused(bpe, str(tmp_path / "x.jinja"))


def test_a_record_that_the_template_refuses(folder, tmp_path):
    (tmp_path / "x.jinja").write_text(
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
        "{{ '<|im_start|>' + m.content + '<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>' }}{% endif %}"
    )
    codec = TextCodec.load(folder("bpe", True), str(tmp_path / "x.jinja"))
    assert len(answers(codec.encode(RECORDS[0]))) == 3
    with pytest.raises(TemplateRefused, match="System role not supported"):
        codec.encode(RECORDS[1])


def test_an_end_token_that_swallows_text_around_it_is_refused(folder):
    from tokenizers import AddedToken

    tokenizer = AutoTokenizer.from_pretrained(folder("bpe", True))
    tokenizer.add_tokens([AddedToken("<|im_end|>\n<|im_start|>", normalized=False)], special_tokens=True)
    with pytest.raises(UserError, match="does not keep <|im_end|> apart from the text around it"):
        TextCodec(tokenizer)


@pytest.mark.parametrize("chat", [False, True], ids=["default", "chatml"])
@pytest.mark.parametrize("kind", ["spm-slow", "spm-new"])
def test_a_slow_tokenizer_is_trained_as_a_slow_server_sees_it(folder, kind, chat):
    """Servers of the 0.8 age read llama tokenizers with the slow class."""
    codec = TextCodec(AutoTokenizer.from_pretrained(folder(kind, chat), use_fast=False))
    server = AutoTokenizer.from_pretrained(folder(kind, chat), use_fast=False)
    assert not server.is_fast
    for item in RECORDS:
        sequence = codec.encode(item)
        messages = messages_of(item.kind, item.fields, chat)
        asked = [messages[:i] for i, m in enumerate(messages) if m["role"] == "assistant"]
        for (start, _), turn, before in zip(answers(sequence), codec.format.turns(item.kind, item.fields), asked):
            assert server(turn.prompt, add_special_tokens=not chat)["input_ids"] == sequence.ids[:start] == codec.chat_ids(before)


def one_by_one(codec, item):
    """The rule spelled plainly, one text at a time: prompt as a server has it, then the answer as its continuation."""
    tokenizer, end = codec.tokenizer, codec.end
    if item.kind == "pretrain":
        ids = tokens.whole(tokenizer, item.fields["text"]) + [codec.eos_id] if item.fields["text"].strip() else []
        return ids, [False] + [True] * (len(ids) - 1) if ids else []
    turns = codec.format.turns(item.kind, item.fields)
    while turns and not turns[-1].learn:
        turns.pop()
    ids, learn, done = [], [], ""

    def some(text):
        if done:
            return tokens.raw(tokenizer, end.token + text)[1:]
        return tokens.raw(tokenizer, text) if codec.format.own else tokens.whole(tokenizer, text)

    for turn in turns:
        asked = turn.prompt[len(done) :]
        prompt, both = some(asked), some(asked + turn.answer + end.text)
        start = len(prompt)
        if both[:start] != prompt:
            alone = prompt + codec.spans.continuation(turn.answer + end.before) + [codec.end_id]
            if turn is turns[-1]:
                both = alone
            else:
                start = len(both) - min(tokens.common_suffix(alone, both), len(alone) - start)
        ids += both
        learn += [False] * start + [turn.learn] * (len(both) - start)
        done = turn.prompt + turn.answer + end.text
    return ids, [False] + learn[1:] if ids else []


def any_text(chosen):
    pieces = ANSWERS + [
        " ",
        "\n",
        "",
        "</s>",
        "<s>",
        "<|im_end|>",
        "<|endoftext|>",
        "é",
        "e\u0301",
        "\u200b",
        "a" * 40,
        "    ",
        "\t",
    ]
    pieces += [t[i : i + 9] for t in TEXTS for i in range(0, len(t), 9)]
    return "".join(chosen.choice(pieces) for _ in range(chosen.randint(0, 12)))


def any_record(chosen):
    kind = chosen.choice(["pretrain", "instruct", "conversation", "ref_qa"])
    if kind == "pretrain":
        return record(kind, text=any_text(chosen))
    if kind == "instruct":
        return record(kind, instruct=any_text(chosen), input=chosen.choice([None, any_text(chosen)]), output=any_text(chosen))
    rounds = [(("ask", "ans")[i % 2], any_text(chosen)) for i in range(chosen.randint(1, 7))]
    more = {"reference": any_text(chosen)} if kind == "ref_qa" else {}
    return record(kind, rounds=rounds, system=chosen.choice([None, any_text(chosen)]), **more)


@pytest.mark.parametrize("chat", [False, True], ids=["default", "chatml"])
@pytest.mark.parametrize("kind", KINDS)
def test_many_records_at_once_get_the_ids_of_each_alone(folder, kind, chat, monkeypatch):
    codec = TextCodec.load(folder(kind, chat))
    assert codec.spans.many.direct == codec.tokenizer.is_fast  # transformers of today makes a fast one of spm-slow
    chosen = random.Random(kind + str(chat))
    items = [any_record(chosen) for _ in range(150)] + RECORDS
    want = [one_by_one(codec, item) for item in items]
    plans = [codec.spans.plan(item) for item in items]
    for together in (1 << 16, 50):
        monkeypatch.setattr(tokens, "TOGETHER", together)
        assert [tuple(s) for s in codec.spans.sequences(plans)] == want
    codec.spans.many.direct = False  # a class that is not transformers' own
    assert [tuple(s) for s in codec.spans.sequences(plans)] == want
    assert sum(any(learn) for _, learn in want) > 90 and any(not ids for ids, _ in want)


def test_what_a_tokenizer_file_says_of_cutting_and_padding_is_not_done(folder):
    codec = TextCodec.load(folder("bpe"))
    plans = [codec.spans.plan(item) for item in RECORDS]
    want = codec.spans.sequences(plans)
    codec.tokenizer.backend_tokenizer.enable_truncation(5)
    codec.tokenizer.backend_tokenizer.enable_padding(length=900)
    assert codec.spans.sequences(plans) == want


def test_the_fingerprint_knows_vocabulary_merges_and_rules(folder, tmp_path):
    """Equal for the same files elsewhere, another for anything that may change an id."""
    prints = {}
    for kind in KINDS:
        for chat in (False, True):
            codec = TextCodec.load(folder(kind, chat))
            again = shutil.copytree(folder(kind, chat), str(tmp_path / ("%s%d" % (kind, chat))))
            assert TextCodec.load(again).fingerprint() == codec.fingerprint()
            prints[kind, chat] = json.dumps(codec.fingerprint())
    different = [prints[kind, chat] for kind in ("bpe", "bpe-bos", "spm", "spm-2023") for chat in (False, True)]
    assert len(set(different)) == 8
    path = tmp_path / "bpe0" / "tokenizer.json"
    core = json.loads(path.read_text(encoding="utf-8"))
    core["model"]["merges"][-1], core["model"]["merges"][-2] = core["model"]["merges"][-2], core["model"]["merges"][-1]
    path.write_text(json.dumps(core), encoding="utf-8")
    assert json.dumps(TextCodec.load(str(tmp_path / "bpe0")).fingerprint()) != prints["bpe", False]
    slow = TextCodec.load(folder("spm-slow"))
    slow.tokenizer.add_tokens(["naïve"])  # slow or made fast
    assert json.dumps(slow.fingerprint()) != prints["spm-slow", False]
