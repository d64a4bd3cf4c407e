"""A data file's lines: recognised by shape, or refused with file, line, field and what was expected."""

import json
import os
import signal
import sys

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline_train.data.records import Tally, read
from pipeline_train.errors import UserError

PRETRAIN = {"type": "pretrain", "text": "once"}
INSTRUCT = {"type": "instruct", "instruct": "name one", "input": "fruit", "output": "pear"}
CONVERSATION = {"type": "conversation", "rounds": [["ask", "a"], ["ans", "b"], ["ask", "c"], ["ask", "d"], ["ans", "e"]]}
REF_QA = {"type": "ref_qa", "reference": "the sky is blue", "rounds": [["ask", "colour?"], ["ans", "blue"]]}
ALPACA = {"instruction": "name one", "input": "fruit", "output": "pear", "id": 7}
SHAREGPT = {
    "conversations": [{"from": "system", "value": "be kind"}, {"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
}
OPENAI = {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}, {"role": "assistant", "content": "b"}]}
ALL = [PRETRAIN, INSTRUCT, CONVERSATION, REF_QA, ALPACA, SHAREGPT, OPENAI]
KINDS = ["pretrain", "instruct", "conversation", "ref_qa", "instruct", "conversation", "conversation"]


def write(tmp_path, text, name="d.jsonl"):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8"))
    return path


def lines(*values):
    return "\n".join(v if isinstance(v, str) else json.dumps(v) for v in values) + "\n"


def refused(path, **options):
    with pytest.raises(UserError) as error:
        list(read(path, **options))
    return str(error.value)


def check_all(records):
    assert [r.kind for r in records] == KINDS
    assert records[0].fields == {"text": "once"}
    assert records[1].fields == records[4].fields == {"instruct": "name one", "input": "fruit", "output": "pear"}
    assert records[2].fields["rounds"] == [("ask", "a"), ("ans", "b"), ("ask", "c"), ("ask", "d"), ("ans", "e")]
    assert records[3].fields["reference"] == "the sky is blue"
    assert records[5].fields == {"rounds": [("ask", "a"), ("ans", "b")], "system": "be kind"}
    assert records[6].fields == {"rounds": [("ask", "a"), ("ans", "b")], "system": None}


@pytest.mark.parametrize(
    "name, text, line_numbers",
    [
        ("d.jsonl", lines(*ALL), [1, 2, 3, 4, 5, 6, 7]),
        ("d.ndjson", "\ufeff" + lines(*ALL).replace("\n", "\r\n\r\n"), [1, 3, 5, 7, 9, 11, 13]),
        ("d.json", json.dumps(ALL, indent=None), [1] * 7),
        ("d.json", "\ufeff\n[\n" + ",\n".join(json.dumps(v) for v in ALL) + "\n]\n", [3, 4, 5, 6, 7, 8, 9]),
        ("d.json", lines(*ALL), [1, 2, 3, 4, 5, 6, 7]),
        ("pretty.json", "\n".join(json.dumps(v, indent=1) for v in ALL[:2]) + lines(*ALL[2:]), None),
        ("d.json5", "// mine\n[" + ",".join(json.dumps(v) for v in ALL) + ",]", [1, 2, 3, 4, 5, 6, 7]),
        ("d.jsonc", "[" + ",/* next */".join(json.dumps(v) for v in ALL) + "]", [1, 2, 3, 4, 5, 6, 7]),
    ],
)
def test_every_shape_in_every_text_format(tmp_path, name, text, line_numbers):
    tally = Tally(name)
    records = list(read(write(tmp_path, text, name), tally=tally))
    check_all(records)
    assert tally.records == 7 and tally.bad == 0
    assert line_numbers is None or [r.line for r in records] == line_numbers


def test_parquet_with_the_columns_of_all_shapes(tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="the parquet extra is not installed")
    parquet = pytest.importorskip("pyarrow.parquet")
    openai = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    table = pyarrow.Table.from_pylist(
        [PRETRAIN, INSTRUCT, CONVERSATION, REF_QA, ALPACA, SHAREGPT, openai],
        schema=pyarrow.schema(
            [(n, pyarrow.string()) for n in ("type", "text", "instruct", "instruction", "input", "output", "reference")]
            + [("rounds", pyarrow.list_(pyarrow.list_(pyarrow.string())))]
            + [("conversations", pyarrow.list_(pyarrow.struct([("from", pyarrow.string()), ("value", pyarrow.string())])))]
            + [("messages", pyarrow.list_(pyarrow.struct([("role", pyarrow.string()), ("content", pyarrow.string())])))]
        ),
    )
    parquet.write_table(table, tmp_path / "d.parquet")
    records = list(read(tmp_path / "d.parquet"))
    check_all(records)
    assert records[6].where.endswith("d.parquet: row 7")
    assert "not a readable Parquet file" in refused(write(tmp_path, b"PAR1 but not really", "x.parquet"))


BAD = [
    ({"type": "pretrain"}, "text: missing, expected text"),
    ({"type": "pretrain", "text": 5}, "text: expected text, got a number"),
    ({"type": "pretrain", "text": None}, "text: expected text, got null"),
    ({"type": "instruct", "instruct": "a"}, "output: missing, expected text"),
    ({"type": "instruct", "instruct": "a", "ouput": "b"}, 'output: missing, but there is "ouput"; did you mean "output"?'),
    ({"type": "instruct", "instruct": "a", "output": "b", "Input": "c"},
     'input: missing, but there is "Input"; did you mean "input"?'),
    ({"type": "instruct", "instruct": " ", "output": "b"}, "instruct: expected text, got only blanks"),
    ({"type": "instruct", "instruct": "", "output": "b"}, "instruct: expected text, got an empty string"),
    ({"type": "instruct", "instruct": "a", "output": ["b"]}, "output: expected text, got a list"),
    ({"type": "instruct", "instruct": "a", "input": 4, "output": "b"}, "input: expected text or null, got a number"),
    ({"type": "conversation"}, 'rounds: missing, expected a list of ["ask", text] or ["ans", text]'),
    ({"type": "conversation", "rounds": "ask"}, "rounds: expected a list, got text"),
    ({"type": "conversation", "rounds": []}, "rounds: expected at least one question and one answer, got none"),
    ({"type": "conversation", "rounds": [["ask", "a"], "b"]}, 'rounds[1]: expected ["ask", text] or ["ans", text], got text'),
    ({"type": "conversation", "rounds": [["ask"]]}, 'rounds[0]: expected ["ask", text] or ["ans", text], got a list of 1'),
    ({"type": "conversation", "rounds": [["ask", "a"], ["answer", "b"]]}, 'rounds[1][0]: expected "ask" or "ans", got "answer"'),
    ({"type": "conversation", "rounds": [["ask", "a"], ["ans", 3.5]]}, "rounds[1][1]: expected text, got a number"),
    ({"type": "conversation", "rounds": [["ans", "a"]]}, "rounds[0]: expected a question before this answer"),
    ({"type": "conversation", "rounds": [["ask", "a"], ["ans", "b"], ["ans", "c"]]},
     "rounds[2]: expected a question before this answer"),
    ({"type": "conversation", "rounds": [["ask", ""]]}, "rounds[0]: expected text, got an empty string"),
    ({"type": "ref_qa", "rounds": [["ask", "a"]]}, "reference: missing, expected text"),
    ({"type": "ref_qa", "reference": "", "rounds": [["ask", "a"]]}, "reference: expected text, got an empty string"),
    ({"type": "chat", "text": "a"}, 'type: expected one of pretrain, instruct, conversation, ref_qa, got "chat"'),
    ({"text": "a"}, 'type: missing; add "type": "pretrain" to learn all of "text"'),
    ({}, "found an empty object"),
    ({"question": "a"}, "found the keys question"),
    ([1, 2], "expected an object {...}, got a list"),
    ("5", "expected an object {...}, got a number"),
    ({"instruction": "a", "output": True}, "output: expected text, got true or false"),
    ({"instruction": "", "output": "b"}, "instruction: expected text, got an empty string"),
    ({"messages": [{"role": "user"}]}, "messages[0].content: missing, expected text"),
    ({"messages": [{"role": "tool", "content": "x"}]}, 'messages[0].role: expected system, user or assistant, got "tool"'),
    ({"messages": [{"role": "user", "content": "x"}, {"role": "system", "content": "y"}]},
     "messages[1].role: expected system, user or assistant (system only as the first)"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "text": ""}]}]},
     'content[0].type: expected "text" (other parts cannot be trained), got "image_url"'),
    ({"messages": [{"role": "user", "content": None}]}, "messages[0].content: expected text or a list, got null"),
    ({"messages": {}}, "messages: expected a list, got an object"),
    ({"conversations": [{"from": "me", "value": "a"}]}, 'conversations[0].from: expected system, human or gpt, got "me"'),
    ({"conversations": [{"from": "gpt", "value": "a"}]}, "conversations[0]: expected a question before this answer"),
    ({"conversations": [{"from": "human"}]}, "conversations[0].value: missing, expected text"),
    ('{"type": "pretrain", "text": NaN}', "text: expected text, got a number"),
    ('{"type": "pretrain", "text": "\\ud83d"}', "text: expected valid text, got half a surrogate pair '\\ud83d'"),
    ('{"type": "pretrain", "text": "a"', "not valid JSON: Expecting ',' delimiter (column 33)"),
    ('{"type": "pretrain", "text": "a"} // mine', "not valid JSON: comments are JSON5; rename the file to .json5"),
    ('{"type": "pretrain", "text": "a",}', "not valid JSON: a trailing comma is JSON5; rename the file to .json5"),
    ("[" * 100000, "nested too deeply"),
]  # fmt: skip


@pytest.mark.parametrize("value, message", BAD, ids=[m[:40] for _, m in BAD])
def test_a_bad_line_says_file_line_field_and_what_was_expected(tmp_path, value, message):
    path = write(tmp_path, lines(PRETRAIN, value))
    said = refused(path).split("\n")
    assert said[0] == "%s: 1 bad record (data.on_bad: skip leaves them out):" % path
    assert said[1].startswith("%s:2: " % path) and message in said[1] and len(said) == 2
    tally = Tally(path, "skip")
    assert [r.kind for r in read(path, "skip", tally)] == ["pretrain"]
    assert (tally.records, tally.bad) == (1, 1) and message in tally.messages[0]


def test_every_bad_line_is_listed_up_to_twenty(tmp_path):
    path = write(tmp_path, lines(PRETRAIN, *[{"type": "pretrain"}] * 25, PRETRAIN))
    said = refused(path).split("\n")
    assert said[0].startswith("%s: 25 bad records" % path) and len(said) == 22
    assert said[1].startswith("%s:2: text" % path) and said[20].startswith("%s:21: text" % path)
    assert said[21] == "... and 5 more"
    only = refused(write(tmp_path, lines({"type": "pretrain"}, "x")), on_bad="skip").split("\n")
    assert only[0].endswith("2 bad records and no good one:") and len(only) == 3


def test_nothing_comes_after_the_first_bad_line(tmp_path):
    """So that nothing is encoded in vain; the rest of the file is only looked through for more."""
    path = write(tmp_path, lines(PRETRAIN, {"type": "pretrain"}, PRETRAIN))
    seen = []
    with pytest.raises(UserError):
        for record in read(path):
            seen.append(record.line)
    assert seen == [1]


def test_bad_bytes_name_their_column(tmp_path):
    path = write(tmp_path, lines(PRETRAIN).encode() + b'{"type": "pretrain", "text": "\xff"}\n')
    assert "%s:2: not UTF-8 text (byte 0xff at column 31)" % path in refused(path)
    path = write(tmp_path, b'[\n{"type": "pretrain", "text": "\xff"}]', "d.json")
    assert refused(path) == "%s:2: not UTF-8 text (byte 0xff)" % path


def test_what_only_python_writes_is_no_harm_where_it_is_not_read(tmp_path):
    text = '{"type": "pretrain", "text": "a", "score": NaN, "n": %s, "e": 1e999}\n' % ("9" * 5000)
    assert [r.fields for r in read(write(tmp_path, text))] == [{"text": "a"}]
    assert [r.fields for r in read(write(tmp_path, "[%s]" % text, "d.json"))] == [{"text": "a"}]


def test_blank_inputs_count_as_absent_once_for_the_file(tmp_path):
    path = write(tmp_path, lines(*[dict(ALPACA, input="")] * 3, dict(ALPACA, input=None), dict(INSTRUCT, input=" \n"), ALPACA))
    tally = Tally(path)
    assert [r.fields["input"] for r in read(path, tally=tally)] == [None] * 5 + ["fruit"]
    assert tally.blank_inputs == 4


@pytest.mark.parametrize("record", [
    dict(CONVERSATION, system="be kind"), {"conversations": SHAREGPT["conversations"][1:], "system": "be kind"},
    dict(OPENAI, system="be kind"), {"instruction": "a", "input": " ", "output": "b", "system": "be kind"},
    dict(REF_QA, system="be kind"), dict(SHAREGPT, system="what the first message says holds"),
])  # fmt: skip
def test_a_system_text_beside_the_messages(tmp_path, record):
    found = list(read(write(tmp_path, lines(record))))
    assert found[0].fields["system"] == "be kind" and found[0].fields["rounds"][0][0] == "ask"


def test_an_alpaca_record_with_a_history_is_a_conversation(tmp_path):
    path = write(tmp_path, lines(dict(ALPACA, history=[["one", "1"], ["two", ""]]), dict(ALPACA, history=[], system="")))
    found = list(read(path))
    assert (found[0].kind, found[0].fields["system"]) == ("conversation", None)
    assert found[0].fields["rounds"] == [("ask", "one"), ("ans", "1"), ("ask", "two"), ("ans", ""),
                                         ("ask", "name one\nfruit"), ("ans", "pear")]  # fmt: skip
    assert found[1].kind == "instruct"


@pytest.mark.parametrize("record, message", [
    (dict(ALPACA, history=[["one"]]), "history[0]"),
    (dict(ALPACA, history=[[" ", "1"]]), "history[0]: expected text, got only blanks"),
    (dict(ALPACA, system="s", instruction=" "), "instruction: expected text, got only blanks"),
    ({"messages": [dict(OPENAI["messages"][0]), dict(OPENAI["messages"][1], weight=0)]},
     "messages[1].weight: expected 1 or none, got 0; every answer of a record is learnt"),
    ({"conversations": [SHAREGPT["conversations"][1], dict(SHAREGPT["conversations"][2], weight=0)]},
     "conversations[1].weight: expected 1 or none, got 0"),
])  # fmt: skip
def test_histories_and_weights_that_cannot_be_learnt_from(tmp_path, record, message):
    assert message in refused(write(tmp_path, lines(record)))


def test_keys_that_nothing_is_made_of_are_counted(tmp_path):
    said = [dict(OPENAI["messages"][0], name="Ann"), dict(OPENAI["messages"][1], weight=1, reasoning_content="hm")]
    values = [{"messages": said, "tools": [{"x": 1}], "functions": []}, dict(CONVERSATION, tools="t", id=None, n=0), ALPACA,
              {"type": [], "conversations": SHAREGPT["conversations"]}, dict(PRETRAIN, **{"a\n": 1, "x" * 50: 3})]  # fmt: skip
    tally = Tally("d")
    assert len(list(read(write(tmp_path, lines(*values)), tally=tally))) == 5
    assert tally.unused == {"messages[].name": 1, "messages[].reasoning_content": 1, "tools": 2, "n": 1, "id": 1,
                            "'a\\n'": 1, "x" * 40: 1}  # fmt: skip
    list(read(write(tmp_path, lines(*[dict(PRETRAIN, **{"k%d" % n: 1}) for n in range(50)])), tally=tally))
    assert len(tally.unused) == 20


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("d.jsonl", "", "{}: holds no records"),
        ("d.jsonl", "\n \r\n", "{}: holds no records"),
        ("d.json", "[]", "{}: holds no records"),
        ("d.json", "", "{}: holds no records"),
        ("d.txt", "x", "{}: cannot tell its format; name it .jsonl, .ndjson, .json, .json5, .jsonc, .parquet"),
        ("d.jsonl", "[1]", "{}: is one JSON list, not a record per line; rename it to .json"),
        ("d.jsonl", b"\x1f\x8b\x08", "{}: is packed by gzip; unpack it"),
        ("d.jsonl", "x".encode("utf-16"), "{}: is UTF-16 text; save it as UTF-8"),
        ("d.json", '[\n{"text": "a"}, // mine\n]', "{}:2: not valid JSON: comments are JSON5; rename the file to .json5"),
        ("d.json", '/* mine */ [{"text": "a"}]', "{}:1: not valid JSON: comments are JSON5; rename the file to .json5"),
        ("d.json", '[{"text": "a"} /* x */]', "{}:1: not valid JSON: comments are JSON5; rename the file to .json5"),
        ("d.json", '[{"text": "a"}]\n// end', "{}:2: not valid JSON: comments are JSON5; rename the file to .json5"),
        ("d.json", '[{"text":\n"a", // mine\n}]', "{}:2: not valid JSON: comments are JSON5; rename the file to .json5"),
        ("d.json", '[{"text": "a",\n}]', "{}:2: not valid JSON: a trailing comma is JSON5; rename the file to .json5"),
        ("d.json", '[{"text": "a"},\n]', "{}:2: not valid JSON: a trailing comma is JSON5; rename the file to .json5"),
        ("d.json", '[\n{"text": "a"}\n', "{}:3: not valid JSON: the list is not closed"),
        ("d.json", '[{"text": "a"} {"text": "b"}]', '{}:1: not valid JSON: expected "," or "]" after this record'),
        ("d.json", "[] x", "{}:1: not valid JSON: there is more after the list"),
        ("d.json", '[{"text" "a"}]', "{}:1: not valid JSON: Expecting ':' delimiter (column 10)"),
        ("d.json", "[" * 100000, "{}:1: nested too deeply"),
        ("d.json5", "[{,]", "{}: not valid JSON5: "),
    ],
)
def test_a_file_that_cannot_be_read_on_is_one_line(tmp_path, name, text, message):
    path = write(tmp_path, text, name)
    for on_bad in ("fail", "skip"):
        said = refused(path, on_bad=on_bad)
        assert said.split("\n")[-1].startswith(message.format(path)), said


def test_no_file_and_a_folder(tmp_path):
    assert refused(tmp_path / "no.jsonl") == "%s: no such file" % (tmp_path / "no.jsonl")
    assert refused(tmp_path) == "%s: is a folder; name one file of it" % tmp_path


@pytest.mark.parametrize("package, name", [("json5", "d.json5"), ("pyarrow.parquet", "d.parquet")])
def test_a_missing_extra_is_named(tmp_path, monkeypatch, package, name):
    monkeypatch.setitem(sys.modules, package, None)
    said = refused(write(tmp_path, "[]", name))
    assert "needs the package %s: pip install 'pipedock[" % package.split(".")[0] in said


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(["ask", "ans", "user", "text"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["type", "text", "rounds", "messages", "conversations", "role", "content", "from", "value", "instruction", "output"]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)
KIND = st.sampled_from(["pretrain", "instruct", "conversation", "ref_qa", "?"])


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        JSON | st.builds(lambda value, kind: dict(value, type=kind) if isinstance(value, dict) else value, JSON, KIND), max_size=5
    )
)
def test_any_json_is_records_or_one_message(tmp_path, values):
    forms = [("h.json", json.dumps(values))]
    if not values or not isinstance(values[0], list):  # a .jsonl that starts with a list is taken for a .json
        forms.append(("h.jsonl", lines(*map(json.dumps, values))))
    for name, text in forms:
        path = write(tmp_path, text, name)
        tally = Tally(path, "skip")
        try:
            good = list(read(path, "skip", tally))
        except UserError:
            good = []
        assert len(good) == tally.records and tally.records + tally.bad == len(values)
        assert all(message.startswith(str(path)) for message in tally.messages)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.binary(max_size=60) | st.text('[]{}",:/*\\\n atextpr1', max_size=60).map(str.encode),
    st.sampled_from([".json", ".jsonl", ".json5"]),
)
def test_any_bytes_are_records_or_one_message(tmp_path, raw, suffix):
    path = write(tmp_path, raw, "h" + suffix)
    with pytest.raises(UserError) as error:
        list(read(path, "fail"))
    assert str(error.value).startswith(str(path))


def test_a_pipe_or_a_device_is_refused_at_once(tmp_path):
    def too_long(*_):
        raise AssertionError("it waits for a writer")

    os.mkfifo(str(tmp_path / "d.jsonl"))
    (tmp_path / "null.json").symlink_to("/dev/null")
    before = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(20)
    try:
        for path in (tmp_path / "d.jsonl", tmp_path / "null.json"):
            with pytest.raises(UserError) as error:
                list(read(path, "fail"))
            assert str(error.value) == "%s: is not a regular file; write the data into one" % path
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
