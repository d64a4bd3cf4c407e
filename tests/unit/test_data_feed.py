"""Encoded files and the feed: every sample once per epoch, no target across samples, any step without the ones before it."""

import json
import os
import random

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline_train import config
from pipeline_train.data import arrays, files, making
from pipeline_train.data.encode import IGNORED, TextCodec
from pipeline_train.data.feed import Feed, prepare
from pipeline_train.data.records import read
from pipeline_train.errors import UserError
from tests.tokenizers import tiny_tokenizer

WORDS = "red green blue 你好 once upon a time the answer is (42) it's".split()


@pytest.fixture(scope="module")
def codec(tmp_path_factory):
    return TextCodec.load(str(tiny_tokenizer(tmp_path_factory.mktemp("spm"), "spm")))


def text(words, seed):
    chosen = random.Random(seed)
    return " ".join(chosen.choice(WORDS) for _ in range(words))


def mixed(count, seed=0):
    chosen = random.Random(seed)
    made = []
    for i in range(count):
        kind = chosen.choice(["pretrain", "instruct", "conversation"])
        if kind == "pretrain":
            made.append({"type": kind, "text": text(chosen.randint(1, 90), i)})
        elif kind == "instruct":
            made.append({"type": kind, "instruct": text(3, i), "output": text(chosen.randint(0, 20), i + 1)})
        else:
            rounds = [["ask" if r % 2 == 0 else "ans", text(chosen.randint(1, 9), i + r)] for r in range(chosen.randint(1, 6))]
            made.append({"type": kind, "rounds": rounds})
    return made


def run_config(path, **data):
    return config.parse({
        "run": {"out": "out"}, "model": {"path": "m"}, "data": dict(data, train=str(path)), "parallel": {"pipe": 1},
    })  # fmt: skip


def encode(tmp_path, codec, values, seq_len=128, **data):
    path = tmp_path / "d.jsonl"
    path.write_text("".join(json.dumps(v, ensure_ascii=False) + "\n" for v in values), encoding="utf-8")
    return prepare(run_config(path, **data), codec, "train", tmp_path / "data", seq_len)


def opened(tmp_path, seq_len=128, rows_per_step=4, seed=42, pack=True, pad_id=1):
    return Feed.open(
        tmp_path / "data", "train", seq_len=seq_len, rows_per_step=rows_per_step, seed=seed, pack=pack, pad_id=pad_id
    )  # fmt: skip


def samples_of(rows):
    """[(ids, targets)] of a step, checking positions, padding and segment numbers on the way."""
    found = []
    for ids, positions, segments, targets in zip(rows.ids, rows.positions, rows.segments, rows.targets):
        used = int((segments > 0).sum())
        assert (segments[used:] == 0).all() and (positions[used:] == 0).all() and (targets[used:] == IGNORED).all()
        assert (ids[used:] == 1).all()
        assert segments[:used].tolist() == sorted(segments[:used].tolist())
        for segment in range(1, int(segments.max()) + 1):
            place = segments == segment
            assert positions[place].tolist() == list(range(int(place.sum())))
            found.append((ids[place].tolist(), targets[place].tolist()))
    return found


def expected(tmp_path, codec, seq_len):
    """Sorted [(ids, targets)] of all samples, from the records one by one."""
    found = []
    for record in read(tmp_path / "d.jsonl"):
        sequence = codec.encode(record)
        ids, targets = sequence.ids, sequence.targets
        if record.kind == "pretrain":
            for cut in range(0, len(ids) - 1, seq_len):
                stop = min(cut + seq_len, len(ids) - 1)
                found.append((ids[cut:stop], targets[cut:stop]))
        else:
            last = max((i for i in range(min(seq_len, len(ids))) if targets[i] != IGNORED), default=-1) + 1
            if last:
                found.append((ids[:last], targets[:last]))
    return sorted(found)


@pytest.mark.parametrize("pack", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("seq_len", [16, 128])
def test_every_sample_once_an_epoch_and_targets_stay_inside(tmp_path, codec, seq_len, pack):
    statistics = encode(tmp_path, codec, mixed(60), seq_len)
    feed = opened(tmp_path, seq_len, pack=pack)
    want = expected(tmp_path, codec, seq_len)
    orders = set()
    step = 0
    for epoch in range(3):
        got, tokens, learnt, numbers = [], 0, 0, []
        for _ in range(feed.steps_per_epoch):
            rows = feed.at(step)
            assert rows.epoch == epoch == feed.epoch_of(step)
            assert rows.ids.dtype == rows.positions.dtype == rows.segments.dtype == rows.targets.dtype == np.int64
            assert rows.ids.shape == rows.targets.shape == (4, seq_len)
            found = samples_of(rows)
            assert rows.tokens == sum(len(ids) for ids, _ in found) and len(found) == len(rows.samples)
            assert rows.learnt_tokens == int((rows.targets != IGNORED).sum())
            got += found
            tokens, learnt, numbers = tokens + rows.tokens, learnt + rows.learnt_tokens, numbers + rows.samples
            step += 1
        orders.add(tuple(numbers))
        assert sorted(got) == want and sorted(numbers) == list(range(len(want)))
        assert (tokens, learnt) == (statistics["tokens"], statistics["learnt_tokens"])
    assert len(orders) == 3, "the order is another one in each epoch"
    assert statistics["samples"] == len(want) and statistics["records"] == 60
    assert feed.efficiency() == pytest.approx(statistics["tokens"] / (feed.rows * seq_len))


def test_any_step_in_any_order_is_the_same(tmp_path, codec):
    encode(tmp_path, codec, mixed(60))
    total = 5 * opened(tmp_path).steps_per_epoch
    in_order = opened(tmp_path)
    before = [in_order.at(step) for step in range(total)]
    other = opened(tmp_path)
    steps = list(range(total))
    random.Random(1).shuffle(steps)
    for step in steps:
        for mine, theirs in zip(other.at(step), before[step]):
            assert np.array_equal(mine, theirs)
    alone = opened(tmp_path).at(total - 1)
    assert np.array_equal(alone.ids, before[-1].ids) and alone.epoch == 4
    assert not np.array_equal(opened(tmp_path, seed=43).at(0).ids, before[0].ids)
    with pytest.raises(AssertionError):
        alone = in_order.at(-1)


def test_the_last_step_of_an_epoch_is_filled_with_empty_rows(tmp_path, codec):
    encode(tmp_path, codec, [{"type": "pretrain", "text": text(5, i)} for i in range(5)])
    feed = opened(tmp_path, pack=False)
    assert feed.steps_per_epoch == 2
    rows = feed.at(1)
    assert rows.segments.max(axis=1).tolist() == [1, 0, 0, 0] and len(rows.samples) == 1
    assert (rows.targets[1:] == IGNORED).all() and (rows.ids[1:] == 1).all()
    assert feed.at(2).epoch == 1


def test_long_text_goes_on_in_the_next_sample_and_loses_no_target(tmp_path, codec):
    statistics = encode(tmp_path, codec, [{"type": "pretrain", "text": text(200, 0)}], seq_len=32)
    (record,) = read(tmp_path / "d.jsonl")
    ids = codec.encode(record).ids
    offsets = np.load(tmp_path / "data" / "train.offsets.npy")
    feed = opened(tmp_path, 32, rows_per_step=100)
    assert statistics["continued"] == 1 and statistics["truncated"] == 0
    assert statistics["tokens"] == statistics["learnt_tokens"] == len(ids) - 1 == offsets[:, 1].sum()
    rows = feed.at(0)
    parts = dict(zip(rows.samples, range(100)))  # a full row each
    targets = [t for sample in range(len(offsets)) for t in rows.targets[parts[sample]][: offsets[sample, 1]].tolist()]
    assert targets == ids[1:]
    exact = text(200, 0)  # a text whose last id would be a sample of its own has no such sample
    length = len(ids) - 1
    for seq_len in (length, length - 1, length // 2):
        made = encode(tmp_path, codec, [{"type": "pretrain", "text": exact}], seq_len=seq_len)
        assert made["samples"] == -(-length // seq_len) and made["learnt_tokens"] == length


LONG = {"type": "instruct", "instruct": "say", "output": text(60, 0)}
DEEP = {"type": "instruct", "instruct": text(300, 0), "output": "x"}
SHORT = {"type": "instruct", "instruct": "say", "output": "red"}


def test_over_long_is_cut_without_a_fake_eos_and_counted(tmp_path, codec):
    statistics = encode(tmp_path, codec, [LONG, DEEP, SHORT], seq_len=128)
    assert (statistics["truncated"], statistics["nothing_to_learn"], statistics["samples"]) == (2, 1, 2)
    lost = "1 records are lost: within data.seq_len (128) there is no room for an answer: %s:2 (" % (tmp_path / "d.jsonl")
    assert any(line.startswith(lost) for line in statistics["warnings"]), statistics["warnings"]
    offsets = np.load(tmp_path / "data" / "train.offsets.npy")
    ids = np.load(tmp_path / "data" / "train.ids.npy")
    start, length, line = offsets[0].tolist()
    cut = ids[start : start + length + 1].tolist()
    (record, _, _) = read(tmp_path / "d.jsonl")
    assert (length, line) == (128, 1) and cut == codec.encode(record).ids[:129] and codec.eos_id not in cut
    assert offsets[1, 2] == 3 and ids[-1] == codec.eos_id


def test_what_follows_the_last_learnt_token_of_a_cut_sample_is_not_kept(tmp_path, codec):
    rounds = [["ask", "a"], ["ans", "red"], ["ask", text(100, 3)], ["ans", "b"]]
    encode(tmp_path, codec, [{"type": "conversation", "rounds": rounds}], seq_len=64)
    ids, learn = (np.load(tmp_path / "data" / ("train.%s.npy" % name)) for name in ("ids", "learn"))
    assert len(ids) < 64 and learn[-1] and ids[-1] == codec.eos_id


def test_prompts_are_learnt_too_where_run_yaml_says_so(tmp_path, codec):
    """Up to the last answer, over-long prompts up to seq_len; an end of turn in between is no accident."""
    rounds = [["ask", "a"], ["ans", "red"], ["ask", "b"], ["ans", "blue"], ["ask", "c"]]
    values = [{"type": "conversation", "rounds": rounds}, DEEP, SHORT, {"type": "pretrain", "text": text(200, 4)}]
    answers = encode(tmp_path, codec, values)
    made = encode(tmp_path, codec, values, learn="all")
    ids, learn, offsets = (np.load(tmp_path / "data" / ("train.%s.npy" % name)) for name in ("ids", "learn", "offsets"))
    whole = [codec.encode(record).ids for record in read(tmp_path / "d.jsonl")]
    whole[1] = whole[1][:129]
    assert ids.tolist() == sum(whole, []) and learn.tolist() == sum([[False] + [True] * (len(one) - 1) for one in whole], [])
    assert offsets[:3, 2].tolist() == [1, 2, 3] and made["learnt_tokens"] == sum(len(one) - 1 for one in whole)
    assert (answers["nothing_to_learn"], made["nothing_to_learn"], made["truncated"]) == (1, 0, 1)
    assert made["hash"] != answers["hash"] and made["warnings"] == codec.notes


def test_the_default_of_what_is_learnt_has_no_part_in_the_key(tmp_path, codec, monkeypatch):
    """Data that was encoded before there was data.learn is found again."""
    digested = []
    monkeypatch.setattr(making, "_digest", lambda parts: digested.append(parts) or "0" * 64)
    for learn in ("answers", "all"):
        encode(tmp_path, codec, [SHORT], learn=learn)
    keys = [parts for parts in digested if ".jsonl" in parts]
    assert len(keys) == 2 and keys[1] == keys[0] + ["all"]


def test_over_long_dropped_or_refused(tmp_path, codec):
    statistics = encode(tmp_path, codec, [LONG, DEEP, SHORT], seq_len=128, over_long="drop")
    assert (statistics["dropped"], statistics["truncated"], statistics["samples"]) == (2, 0, 1)
    with pytest.raises(UserError) as error:
        encode(tmp_path, codec, [SHORT, LONG, DEEP] + [LONG] * 30, seq_len=128, over_long="fail", on_bad="skip")
    said = str(error.value).split("\n")
    assert said[0].endswith("d.jsonl: 32 records over data.seq_len (128) and data.over_long is fail:")
    assert said[1].endswith("d.jsonl:2: %d tokens" % (len(codec.encode(list(read(tmp_path / "d.jsonl"))[1]).ids) - 1))
    assert len(said) == 22 and said[-1] == "... and 12 more"
    long_text = [{"type": "pretrain", "text": text(300, 0)}, {"type": "pretrain", "text": "red"}]
    assert encode(tmp_path, codec, long_text, seq_len=128, over_long="fail")["continued"] == 1


@pytest.mark.parametrize(
    "values, seq_len, why",
    [
        ([{"type": "conversation", "rounds": [["ask", "a"]]}], 128,
         "1 records (0 truncated, 0 dropped, 0 continued, 1 nothing to learn)"),
        ([{"type": "pretrain", "text": " "}] * 3, 128, "nothing to learn in 3 records"),
        ([DEEP, DEEP], 64, "in 2 records (2 truncated, 0 dropped, 0 continued, 2 nothing to learn)"),
    ],
    ids=["no answer", "blank", "prompts too long"],
)  # fmt: skip
def test_a_run_with_nothing_to_learn_is_refused(tmp_path, codec, values, seq_len, why):
    with pytest.raises(UserError) as error:
        encode(tmp_path, codec, values, seq_len)
    assert why in str(error.value) and "\n" not in str(error.value)
    assert list((tmp_path / "data").iterdir()) == []


def test_the_hash_is_of_content_and_codec(tmp_path, codec, monkeypatch):
    values = mixed(20)
    first = encode(tmp_path, codec, values)["hash"]
    assert encode(tmp_path, codec, values)["hash"] == first
    ids = np.load(tmp_path / "data" / "train.ids.npy")
    assert encode(tmp_path, codec, values[:-1])["hash"] != first
    assert encode(tmp_path, codec, values, seq_len=64)["hash"] != first
    (tmp_path / "data" / "train.json").unlink()
    monkeypatch.setattr(files, "BYTES", 700)  # in many blocks
    assert encode(tmp_path, codec, values)["hash"] == first
    assert np.array_equal(ids, np.load(tmp_path / "data" / "train.ids.npy"))
    monkeypatch.undo()
    monkeypatch.setattr(codec, "stop_ids", [7])
    assert encode(tmp_path, codec, values)["hash"] != first


def test_bad_records_end_it_and_leave_no_files(tmp_path, codec):
    with pytest.raises(UserError, match="d.jsonl:2: text: missing"):
        encode(tmp_path, codec, [SHORT, {"type": "pretrain"}, SHORT])
    assert list((tmp_path / "data").iterdir()) == []
    statistics = encode(tmp_path, codec, [SHORT, {"type": "pretrain"}, SHORT], on_bad="skip")
    assert (statistics["records"], statistics["bad"], statistics["samples"]) == (2, 1, 2)
    assert statistics["bad_lines"][0].endswith("d.jsonl:2: text: missing, expected text")


def test_half_a_surrogate_pair_anywhere_is_a_bad_record(tmp_path, codec):
    bad = [
        '{"\\ud800": 1}', '{"instruction": "a", "output": "b", "\\ud800": 1}', '{"type": "pretrain", "text": "\\ud800"}',
        '{"type": "conversation", "rounds": [["\\ud800", "x"]]}', '{"messages": [{"role": "\\ud800", "content": "x"}]}',
        '{"type": "\\ud800"}',
    ]  # fmt: skip
    path = tmp_path / "d.jsonl"
    path.write_text("\n".join(bad + ['{"type": "pretrain", "text": "Red, green and blue."}']) + "\n")
    result = prepare(run_config(path, on_bad="skip"), codec, "train", tmp_path / "data", 128)
    assert (result["records"], result["bad"], len(result["bad_lines"])) == (1, len(bad), len(bad))
    assert all(line.startswith("%s:%d: " % (path, n)) and "ud800" in line for n, line in enumerate(result["bad_lines"], 1))
    assert json.loads((tmp_path / "data" / "train.json").read_text(encoding="utf-8"))["bad_lines"] == result["bad_lines"]
    with pytest.raises(UserError) as error:
        prepare(run_config(path), codec, "train", tmp_path / "data", 128)
    assert str(error.value).encode("utf-8") and "6 bad records" in str(error.value)


def test_a_file_name_that_is_no_text(tmp_path, codec):
    path = tmp_path / os.fsdecode(b"d\x80.jsonl")
    path.write_text('{"type": "pretrain", "text": "Red, green and blue."}\n')
    prepare(run_config(path), codec, "train", tmp_path / "data", 128)
    assert json.loads((tmp_path / "data" / "train.json").read_text(encoding="utf-8"))["file"] == str(path)


def test_what_a_template_refuses_is_a_bad_record(tmp_path, codec, tmp_path_factory):
    picky = tmp_path_factory.mktemp("t") / "picky.jinja"
    picky.write_text(
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "{{ m.content + eos_token }}{% endfor %}{% if add_generation_prompt %}{{ '' }}{% endif %}"
    )
    strict = TextCodec(codec.tokenizer, str(picky))
    chats = [[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]]
    chats.append([{"role": "system", "content": "s"}] + chats[0])
    with pytest.raises(UserError, match="d.jsonl:2: the chat template refuses it: no system"):
        encode(tmp_path, strict, [{"messages": m} for m in chats])
    statistics = encode(tmp_path, strict, [{"messages": m} for m in chats], on_bad="skip")
    assert (statistics["records"], statistics["bad"]) == (1, 1)


def test_warnings_once_for_the_file(tmp_path, codec, monkeypatch):
    values = [{"instruction": "a", "input": "", "output": "b"}] * 3 + [{"instruction": "a", "output": "one</s>two"}]
    monkeypatch.setattr(codec, "notes", ["about the tokenizer"])
    assert encode(tmp_path, codec, values)["warnings"] == [
        "about the tokenizer",
        '%s: "input": "" counts as no input (3 records)' % (tmp_path / "d.jsonl"),
        "%s: 1 learnt texts hold an end token of the model in their middle; it would learn to stop there" % (tmp_path / "d.jsonl"),
    ]
    assert encode(tmp_path, codec, [SHORT])["warnings"] == ["about the tokenizer"]
    some = [dict(SHORT, lang="en", source=1), dict(SHORT, source=2)] + [dict(SHORT, **{"k%d" % n: 1}) for n in range(7)]
    assert encode(tmp_path, codec, some)["warnings"][1:] == [
        "%s: nothing is made of these keys: source (2 records), k0 (1 records), k1 (1 records), k2 (1 records), k3 (1 records), "
        "k4 (1 records), k5 (1 records), k6 (1 records), and 1 more" % (tmp_path / "d.jsonl")
    ]


def test_opening_what_is_not_there_or_was_encoded_otherwise(tmp_path, codec):
    with pytest.raises(UserError, match="train.json: no encoded data here; the run's data folder is incomplete"):
        opened(tmp_path)
    encode(tmp_path, codec, [SHORT])
    with pytest.raises(UserError, match="train.json: was encoded for seq_len 128, not 64; encode it again"):
        opened(tmp_path, 64)
    assert opened(tmp_path).where(0) == "%s:1" % (tmp_path / "d.jsonl")
    with pytest.raises(UserError, match="data.eval: is not set"):
        prepare(run_config(tmp_path / "d.jsonl"), codec, "eval", tmp_path / "data", 64)


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path, codec):
    (tmp_path / "data").write_text("a file is in the way")
    with pytest.raises(UserError) as error:
        encode(tmp_path, codec, [SHORT])
    assert str(error.value).startswith("%s: the encoded data cannot be written: " % (tmp_path / "data"))


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.lists(st.integers(-(2**31), 2**31 - 1), max_size=9), max_size=5), st.sampled_from([0, 3]))
def test_a_growing_array_is_an_npy_file(tmp_path, pieces, columns):
    if columns:
        pieces = [piece[: len(piece) // 3 * 3] for piece in pieces]
    path = tmp_path / "a.npy"
    array = arrays.GrowingArray(path, np.int32, columns)
    for piece in pieces:
        array.append(piece)
    array.close()
    flat = np.array([x for piece in pieces for x in piece], np.int32)
    assert np.array_equal(np.load(path), flat.reshape(-1, 3) if columns else flat)
    if len(flat):
        assert np.array_equal(arrays.load(path), np.load(path))
