"""Encoding by many processes, gone on with, kept and found again: always the same bytes, and the same words about what is wrong."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline_train import config, host
from pipeline_train.data import cache, files, making, packing, pool, progress, totals
from pipeline_train.data.encode import TextCodec
from pipeline_train.data.feed import Feed, prepare
from pipeline_train.errors import RunFailed, UserError
from tests.models import tiny_config
from tests.tokenizers import tiny_tokenizer

ROOT = Path(__file__).resolve().parents[2]
WORDS = "red green blue 你好 once upon a time the answer is (42) it's".split()
GOOD = {"type": "instruct", "instruct": "say", "output": "red"}
PICKY = (
    "{% for m in messages %}{% if 'blue' in m.content %}{{ raise_exception('no blue') }}{% endif %}"
    "{{ m.content + eos_token }}{% endfor %}{% if add_generation_prompt %}{{ '' }}{% endif %}"
)


@pytest.fixture(scope="module")
def codec(tmp_path_factory):
    return TextCodec.load(str(tiny_tokenizer(tmp_path_factory.mktemp("bpe"), "bpe")))


@pytest.fixture
def small(monkeypatch):
    """Blocks of some records, and processes for them whatever the size."""
    monkeypatch.setattr(files, "BYTES", 1500)
    monkeypatch.setattr(files, "VALUES", 7)
    monkeypatch.setattr(cache, "SMALL", 0)

    def use(processes):
        monkeypatch.setattr(pool, "cores", lambda: processes)

    use(0)
    return use


def records(count, seed=0, bad=()):
    chosen = random.Random(seed)
    made = []
    for number in range(count):
        text = " ".join(chosen.choice(WORDS) for _ in range(chosen.randint(1, 60)))
        one = [{"type": "pretrain", "text": text}, {"type": "instruct", "instruct": "say it", "output": text},
               {"type": "conversation", "rounds": [["ask", text[:9]], ["ans", text[9:]], ["ask", "more"], ["ans", "no"]]},
               {"instruction": "say", "input": "", "output": text}]  # fmt: skip
        made.append({"type": "pretrain"} if number in bad else chosen.choice(one))
    return made


def write(path, values):
    if path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        keys = sorted({key for value in values for key in value})
        columns = {key: [json.dumps(v[key]) if key == "rounds" and key in v else v.get(key) for v in values] for key in keys}
        columns.pop("rounds", None)
        pyarrow.parquet.write_table(pyarrow.table(columns), str(path))
    elif path.suffix == ".json":
        path.write_text(json.dumps(values, ensure_ascii=False), encoding="utf-8")
    else:
        path.write_text("".join(json.dumps(v, ensure_ascii=False) + "\n" for v in values), encoding="utf-8")
    return path


def encode(path, codec, folder, seq_len=32, say=lambda line: None, **data):
    data.setdefault("cache", "off")
    run = config.parse({
        "run": {"out": "out"}, "model": {"path": "m"}, "data": dict(data, train=str(path)), "parallel": {"pipe": 1},
    })  # fmt: skip
    return prepare(run, codec, "train", folder, seq_len, say)


def contents(folder):
    """{name: bytes} of the encoded files, without the folder's own name in them."""
    return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}


@pytest.mark.parametrize("name", ["d.jsonl", "d.json", "d.parquet"])
def test_however_many_processes_the_files_are_the_same(tmp_path, codec, small, name):
    values = records(150, bad=(3, 70, 71, 149))
    if name == "d.parquet":
        values = [v for v in values if "rounds" not in v]
    path = write(tmp_path / name, values)
    found = []
    for processes in (0, 1, 3):
        small(processes)
        document = encode(path, codec, tmp_path / str(processes), on_bad="skip")
        assert document["bad"] == 4 and len(document["bad_lines"]) == 4 and document["truncated"] > 9 < document["continued"]
        found.append(contents(tmp_path / str(processes)))
    small(0)
    files.BYTES, files.VALUES = 1 << 20, 1000  # one block; the fixture puts them back
    encode(path, codec, tmp_path / "whole", on_bad="skip")
    found.append(contents(tmp_path / "whole"))
    assert len(found[0]) == 8 and all(one == found[0] for one in found[1:])


def said_by_all(path, codec, tmp_path, small, **data):
    """The one message of any number of processes."""
    said = set()
    for processes in (0, 1, 3):
        small(processes)
        with pytest.raises(UserError) as error:
            encode(path, codec, tmp_path / "refused", **data)
        assert list((tmp_path / "refused").iterdir()) == []
        said.add(str(error.value))
    assert len(said) == 1
    return said.pop().split("\n")


def test_bad_lines_are_listed_in_order_by_any_number_of_processes(tmp_path, codec, small):
    path = write(tmp_path / "d.jsonl", records(400, bad=range(20, 400, 9)))
    said = said_by_all(path, codec, tmp_path, small)
    assert said[0] == "%s: 43 bad records (data.on_bad: skip leaves them out):" % path and len(said) == 22
    assert said[1:21] == ["%s:%d: text: missing, expected text" % (path, 21 + 9 * i) for i in range(20)]
    assert said[21] == "... and 23 more"
    write(path, records(90) + [GOOD] + records(9))
    assert said_by_all(path, codec, tmp_path, small, over_long="fail", seq_len=24)[0].startswith("%s: " % path)
    write(path, [{"type": "pretrain", "text": " "}] * 300)
    assert "nothing to learn in 300 records" in said_by_all(path, codec, tmp_path, small)[0]


def test_what_a_template_refuses_is_the_same_for_any_number_of_processes(tmp_path, codec, small):
    """Sequentially, only a first bad record can be one that the template refuses: nothing behind it is encoded."""
    (tmp_path / "p.jinja").write_text(PICKY)
    picky = TextCodec(codec.tokenizer, str(tmp_path / "p.jinja"))
    fine, blue = (
        {"type": "instruct", "instruct": "red " * 9, "output": "a"},
        {"type": "instruct", "instruct": "blue", "output": "a"},
    )
    path = write(tmp_path / "d.jsonl", [fine] * 30 + [blue] + [fine] * 9 + [{"type": "pretrain"}] + ([fine] * 5 + [blue]) * 20)
    said = said_by_all(path, picky, tmp_path, small)
    assert said[0].startswith("%s: 2 bad records" % path) and len(said) == 3
    assert said[1] == "%s:31: the chat template refuses it: no blue" % path and said[2].startswith("%s:41: text: missing" % path)
    write(path, [fine] * 30 + [{"type": "pretrain"}] + ([fine] * 5 + [blue]) * 20)
    assert len(said_by_all(path, picky, tmp_path, small)) == 2
    small(3)
    document = encode(path, picky, tmp_path / "s", on_bad="skip", seq_len=64)
    assert (document["records"], document["bad"]) == (130, 21) and document["bad_lines"][1].startswith("%s:37: the chat" % path)
    (tmp_path / "unfit.jinja").write_text(
        "{{ messages|length }}{% for m in messages %}{{ m.content + eos_token }}{% endfor %}{% if add_generation_prompt %}"
        "{% endif %}"
    )
    with pytest.raises(UserError, match="the chat template"):
        encode(path, TextCodec(codec.tokenizer, str(tmp_path / "unfit.jinja")), tmp_path / "u", on_bad="skip")


def stop_after(monkeypatch, blocks):
    """Ctrl-C when so many blocks are encoded; -> the list of all that are."""
    seen = []
    real = making.Journal.add

    def add(journal, part):
        if len(seen) == blocks:
            raise KeyboardInterrupt
        seen.append(len(part.ids))
        real(journal, part)

    monkeypatch.setattr(making.Journal, "add", add)
    return seen


@pytest.mark.parametrize("kept", [False, True], ids=["beside", "cache"])
@pytest.mark.parametrize("name", ["d.jsonl", "d.json"])
def test_what_was_interrupted_is_gone_on_with(tmp_path, codec, small, monkeypatch, name, kept):
    path = write(tmp_path / name, records(120, bad=(5,)))
    setting = {"cache": str(tmp_path / "cache") if kept else "off", "on_bad": "skip"}
    encode(path, codec, tmp_path / "whole", on_bad="skip")
    total = len(list(files.blocks(path)))
    for processes in (0, 2):
        small(processes)
        folder = tmp_path / ("stopped%d" % processes)
        shutil.rmtree(str(tmp_path / "cache"), ignore_errors=True)
        for blocks in (3, 4):
            with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
                seen = stop_after(patch, blocks)
                encode(path, codec, folder, **setting)
            assert len(seen) == blocks
        said = []
        with monkeypatch.context() as patch:
            seen = stop_after(patch, 10**6)
            encode(path, codec, folder, say=said.append, **setting)
        assert len(seen) == total - 7 > 3
        assert len(said) == 1 and said[0].startswith("%s: goes on where it was stopped, with " % path)
        assert said[0].endswith("49 records encoded") == (name == "d.json")
        assert contents(folder) == contents(tmp_path / "whole")


@pytest.mark.parametrize("damage", ["torn", "short", "changed", "other block size", "packing", "no journal"])
def test_only_what_is_whole_is_gone_on_with(tmp_path, codec, small, monkeypatch, damage):
    path = write(tmp_path / "d.jsonl", records(120))
    encode(path, codec, tmp_path / "whole")
    total = len(list(files.blocks(path)))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        if damage == "packing":
            patch.setattr(packing, "pack", lambda *_: os.kill(os.getpid(), signal.SIGINT) or time.sleep(5))
        else:
            stop_after(patch, 6)
        encode(path, codec, tmp_path / "d")
    (part,) = (tmp_path / "d" / "train.encoding").glob("*.part")
    journal, ids = part / "journal", part / "ids.npy"
    lines = journal.read_bytes().splitlines(keepends=True)
    again = total - 6
    if damage == "torn":
        journal.write_bytes(b"".join(lines[:-1]) + lines[-1][:-5])
        again += 1
    elif damage == "short":
        os.truncate(str(ids), ids.stat().st_size - 4)
        again += 1
    elif damage == "changed":
        middle = 128 + 4 * (json.loads(lines[1])["rows"][0] + 3)  # in the second block
        raw = bytearray(ids.read_bytes())
        raw[middle] ^= 1
        ids.write_bytes(bytes(raw))
        again = total - 1
    elif damage == "other block size":
        monkeypatch.setattr(files, "BYTES", 3000)
        again = len(list(files.blocks(path)))
    elif damage == "no journal":
        journal.unlink()
        again = total
    else:
        again = 0
    seen = stop_after(monkeypatch, 10**6)
    encode(path, codec, tmp_path / "d")
    assert len(seen) == again and contents(tmp_path / "d") == contents(tmp_path / "whole")


def test_a_bad_record_is_remembered_over_an_interruption(tmp_path, codec, small, monkeypatch):
    path = write(tmp_path / "d.jsonl", records(120, bad=(5, 90)))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(totals.Totals, "add_checked", lambda *_: os.kill(os.getpid(), signal.SIGINT) or time.sleep(5))
        encode(path, codec, tmp_path / "d")
    assert said_by_all(path, codec, tmp_path, small)[0].startswith("%s: 2 bad records" % path)
    with pytest.raises(UserError, match="2 bad records"):
        encode(path, codec, tmp_path / "d")


def test_kept_data_is_found_by_content(tmp_path, codec, small, monkeypatch):
    path = write(tmp_path / "d.jsonl", records(60, bad=(9,)))
    root = tmp_path / "kept"
    setting = {"cache": str(root), "on_bad": "skip"}
    first = encode(path, codec, tmp_path / "a", **setting)
    entry = root / first["key"]
    assert (tmp_path / "a" / "train.ids.npy").samefile(entry / "ids.npy"), "linked, not copied"
    seen = stop_after(monkeypatch, 10**6)
    said = []
    other = tmp_path / "other.jsonl"
    shutil.copyfile(str(path), str(other))
    second = encode(other, codec, tmp_path / "b", say=said.append, **setting)
    assert said == ["%s: was encoded before; taken from %s" % (other, entry)] and not seen
    assert second["file"] == str(other) and second["bad_lines"] == ["%s:10: text: missing, expected text" % other]
    assert all(str(path) not in line for line in second["warnings"]) and any(str(other) in line for line in second["warnings"])
    assert {**second, "file": 0, "bad_lines": 0, "warnings": 0} == {**first, "file": 0, "bad_lines": 0, "warnings": 0}
    assert encode(other, codec, tmp_path / "b", **setting) == second  # in its own folder already
    shutil.rmtree(str(root))
    assert encode(other, codec, tmp_path / "b", **setting) == second and not seen, "not even the cache is needed then"
    for changed in ({"seq_len": 33}, {"over_long": "drop"}, {"learn": "all"}, {"cache": str(root)}):
        encode(path, codec, tmp_path / "c", **{**setting, **changed})
        assert seen, changed
        seen.clear()
    write(path, records(60, bad=(9,))[:-1])
    encode(path, codec, tmp_path / "c", **setting)
    assert seen and len([p for p in root.iterdir() if p.is_dir()]) == 5


def test_another_tokenizer_is_other_data(tmp_path, codec, small, monkeypatch):
    path = write(tmp_path / "d.jsonl", records(30))
    keys = {encode(path, codec, tmp_path / "a")["key"]}
    near = shutil.copytree(codec.name, str(tmp_path / "near"))
    core = json.loads((tmp_path / "near" / "tokenizer.json").read_text(encoding="utf-8"))
    core["model"]["merges"].reverse()
    (tmp_path / "near" / "tokenizer.json").write_text(json.dumps(core), encoding="utf-8")
    changed = TextCodec.load(near)
    assert changed.identity() == codec.identity(), "what the vocabulary's size and the template do not tell"
    keys.add(encode(path, changed, tmp_path / "a")["key"])
    monkeypatch.setattr(making, "VERSION", 99)
    keys.add(encode(path, codec, tmp_path / "a")["key"])
    assert len(keys) == 3


def test_damaged_data_is_made_again(tmp_path, codec, small, monkeypatch):
    path = write(tmp_path / "d.jsonl", records(30))
    root = tmp_path / "kept"
    entry = root / encode(path, codec, tmp_path / "a", cache=str(root))["key"]
    want = contents(tmp_path / "a")
    for name in ("ids.npy", "slots.npy", "facts.json"):
        raw = bytearray((entry / name).read_bytes())
        raw[-9] ^= 1
        (entry / name).unlink()
        (entry / name).write_bytes(b"{" if name == "facts.json" else bytes(raw))
        said = []
        encode(path, codec, tmp_path / "b", cache=str(root), say=said.append)
        assert said == ["%s: is damaged; %s is encoded again" % (entry, path)] and contents(tmp_path / "b") == want
        shutil.rmtree(str(tmp_path / "b"))
    (tmp_path / "a" / "train.learn.npy").unlink()
    said = []
    assert encode(path, codec, tmp_path / "a", cache=str(root), say=said.append) and "taken from" in said[0]
    assert contents(tmp_path / "a") == want


def altered(*names, **values):
    """-> a mutation of a JSON file: {**it, **values} in the object under ``names``; None takes a key out."""

    def mutate(path):
        whole = found = json.loads(path.read_text(encoding="utf-8"))
        for name in names:
            found = found[name]
        for name, value in values.items():
            found[name] = value(found[name]) if callable(value) else value
            if value is None:
                del found[name]
        path.write_text(json.dumps(whole), encoding="utf-8")

    return mutate


def holding(raw):
    def mutate(path):
        path.unlink()
        path.write_bytes(raw)

    return mutate


def a_folder(path):
    path.unlink()
    path.mkdir()
    (path / "x").write_text("")


def a_pipe(path):
    path.unlink()
    os.mkfifo(str(path))


def one_more(number):
    return number + 1


FACTS = {
    **{text: holding(text.encode()) for text in ("", "{", "{}", "[]", "7", "null", '{"records": 5}', '{"sha256": []}', '"x"')},
    "no text": holding(b"\xff"), "nested": holding(b"[" * 100_000), "gone": Path.unlink, "a folder": a_folder,
    "no counts": altered(counts=None), "counts 7": altered(counts=7), "counts []": altered(counts=[]),
    "records changed": altered("counts", records=one_more), "records as text": altered("counts", records=str),
    "learnt gone": altered("counts", learnt_tokens=None), "samples changed": altered(samples=one_more),
    "tokens gone": altered(tokens=None), "lengths changed": altered("lengths", max=one_more), "shown gone": altered(shown=None),
    "shown 5": altered("shown", bad=5), "hash changed": altered("sha256", ids="0" * 64), "hash gone": altered("sha256", ids=None),
    "head changed": altered("heads", ids="x"), "seal 5": altered(seal=5), "no seal": altered(seal=None),
}  # fmt: skip


@pytest.fixture(scope="module")
def kept_once(tmp_path_factory, codec):
    """(a data file, its document, a cache with it, a folder with it)"""
    folder = tmp_path_factory.mktemp("once")
    path = write(folder / "d.jsonl", records(12))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pool, "cores", lambda: 0)
        document = encode(path, codec, folder / "a", cache=str(folder / "kept"))
    return path, document, folder / "kept", folder / "a"


@pytest.mark.parametrize("mutation", FACTS.values(), ids=FACTS)
def test_facts_that_are_not_what_was_written_are_damage(tmp_path, codec, small, kept_once, mutation):
    path, want, kept, whole = kept_once
    root = Path(shutil.copytree(str(kept), str(tmp_path / "kept")))
    entry = root / want["key"]
    mutation(entry / "facts.json")
    said = []
    assert encode(path, codec, tmp_path / "b", cache=str(root), say=said.append) == want
    assert said == ["%s: is damaged; %s is encoded again" % (entry, path)] and contents(tmp_path / "b") == contents(whole)
    assert contents(entry) == contents(kept / want["key"])


def inside(mutate):
    """For the facts in a run's own train.json."""

    def mutation(path):
        aside = path.with_name("facts")
        aside.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8"))["facts"]))
        mutate(aside)
        altered(facts=lambda _: json.loads(aside.read_text()))(path)
        aside.unlink()

    return mutation


OWN = {name: inside(mutate) for name, mutate in FACTS.items() if " " in name and name not in ("no text", "a folder")}
OWN.update({name: mutate for name, mutate in FACTS.items() if name not in OWN and name != "a folder"})
OWN.update({"facts 5": altered(facts=5), "no facts": altered(facts=None), "no key": altered(key=None),
            "records above": altered(records=one_more)})  # fmt: skip


@pytest.mark.parametrize("mutation", OWN.values(), ids=OWN)
def test_a_runs_own_facts_are_believed_as_they_were_written_only(tmp_path, codec, small, kept_once, monkeypatch, mutation):
    path, want, _, whole = kept_once
    shutil.copytree(str(whole), str(tmp_path / "a"))
    mutation(tmp_path / "a" / "train.json")
    assert encode(path, codec, tmp_path / "a") == want and contents(tmp_path / "a") == contents(whole)


@pytest.mark.parametrize("name, mutation", [
    ("ids.npy", lambda path: path.write_bytes(path.read_bytes().replace(b"<i4", b"<f4"))),
    ("offsets.npy", lambda path: path.write_bytes(path.read_bytes().replace(b", 3)", b", 1)"))),
    ("starts.npy", holding(b"")), ("learn.npy", holding(b"PK\x03\x04")), ("ids.npy", a_folder), ("slots.npy", Path.unlink),
    ("", lambda path: (shutil.rmtree(str(path)), path.write_text("a file"))),
    ("", lambda path: (shutil.rmtree(str(path)), path.symlink_to("nowhere"))),
    ("", lambda path: (shutil.rmtree(str(path)), path.mkdir())),
])  # fmt: skip
def test_an_entry_that_is_none_is_damage(tmp_path, codec, small, kept_once, name, mutation):
    path, want, kept, whole = kept_once
    root = Path(shutil.copytree(str(kept), str(tmp_path / "kept")))
    shutil.rmtree(str(root / want["key"]))
    shutil.copytree(str(kept / want["key"]), str(root / want["key"]))
    mutation(root / want["key"] / name if name else root / want["key"])
    said = []
    assert encode(path, codec, tmp_path / "b", cache=str(root), say=said.append) == want
    assert "is damaged" in said[0] and len(said) == 1 and contents(tmp_path / "b") == contents(whole)


LINES = {
    **{text: lambda _, text=text: text.encode() + b"\n" for text in ("5", "{}", "[]", "null", '"x"', "[" * 100_000)},
    **{"rows %r" % (rows,): lambda told, rows=rows: dict(told, rows=rows) for rows in (
        None, 5, [], [1, 2], [-1, 0, 0], [2**40] * 3, [10**30] * 3, [True] * 3, ["1"] * 3, [1.0] * 3, {"0": 1, "1": 1, "2": 1})},
    "rows too many": lambda told: dict(told, rows=told["rows"] + [1]),
    "no rows": lambda told: {name: told[name] for name in ("checksum", "counts", "shown")},
    **{"%s %r" % (name, value): lambda told, name=name, value=value: dict(told, **{name: value})
       for name in ("checksum", "counts", "shown") for value in (None, 5, -1, "x", [], {})},
    "counts changed": lambda told: dict(told, counts=dict(told["counts"], records=99)),
    "counts of text": lambda told: dict(told, counts=dict(told["counts"], records="9")),
    "counts too few": lambda told: dict(told, counts={"records": 1}),
    "shown other": lambda told: dict(told, shown={"odd": ["x"]}),
}  # fmt: skip


@pytest.fixture(scope="module")
def begun(tmp_path_factory, codec):
    """(a data file, a cache with its first 3 blocks, how many there are, the encoded files)"""
    folder = tmp_path_factory.mktemp("begun")
    path = write(folder / "d.jsonl", records(30))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pool, "cores", lambda: 0)
        patch.setattr(files, "BYTES", 1500)
        patch.setattr(files, "VALUES", 7)
        patch.setattr(cache, "SMALL", 0)
        encode(path, codec, folder / "whole")
        with pytest.raises(KeyboardInterrupt):
            stop_after(patch, 3)
            encode(path, codec, folder / "a", cache=str(folder / "kept"))
        return path, folder / "kept", len(list(files.blocks(path))), folder / "whole"


@pytest.mark.parametrize("mutation", LINES.values(), ids=[name[:20] for name in LINES])
def test_a_line_of_the_journal_that_is_damaged_ends_it(tmp_path, codec, small, begun, monkeypatch, mutation):
    path, kept, total, whole = begun
    root = Path(shutil.copytree(str(kept), str(tmp_path / "kept")))
    (journal,) = root.glob("*.part/journal")
    lines = journal.read_bytes().splitlines(keepends=True)
    line = mutation(json.loads(lines[2]))
    lines[2] = line if isinstance(line, bytes) else (json.dumps(line) + "\n").encode()
    journal.write_bytes(b"".join(lines))
    seen = stop_after(monkeypatch, 10**6)
    encode(path, codec, tmp_path / "b", cache=str(root))
    assert len(seen) == total - 1 and contents(tmp_path / "b") == contents(whole)


@pytest.mark.parametrize("name, mutation", [
    ("ids.npy", a_folder), ("journal", a_folder), ("offsets.npy", a_pipe), ("journal", a_pipe),
    ("", lambda path: (shutil.rmtree(str(path)), path.write_text("a file"))),
    ("", lambda path: (shutil.rmtree(str(path)), path.symlink_to("nowhere"))),
])  # fmt: skip
def test_what_was_begun_and_is_no_file_is_begun_anew(tmp_path, codec, small, begun, monkeypatch, name, mutation):
    path, kept, total, whole = begun
    root = Path(shutil.copytree(str(kept), str(tmp_path / "kept")))
    (part,) = root.glob("*.part")
    mutation(part / name if name else part)
    seen = stop_after(monkeypatch, 10**6)
    encode(path, codec, tmp_path / "b", cache=str(root))
    assert len(seen) == total and contents(tmp_path / "b") == contents(whole)


def test_where_no_link_can_be_made_there_is_a_copy(tmp_path, codec, small, monkeypatch):
    def refuse(*_):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    path = write(tmp_path / "d.jsonl", records(30))
    key = encode(path, codec, tmp_path / "a", cache=str(tmp_path / "kept"))["key"]
    assert not (tmp_path / "a" / "train.ids.npy").samefile(tmp_path / "kept" / key / "ids.npy")
    encode(path, codec, tmp_path / "b")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_auto_keeps_what_is_worth_it_under_the_users_cache(tmp_path, codec, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    path = write(tmp_path / "d.jsonl", records(30))
    encode(path, codec, tmp_path / "a", cache="auto")
    encode(path, codec, tmp_path / "b", cache=False)
    assert [cache.root_of(off, 10**9) for off in ("off", False)] == [None, None], "YAML reads off as false"
    assert cache.root_of(True, 10**9) == cache.root_of("auto", 10**9) == tmp_path / "x" / "pipedock" / "data"
    assert not (tmp_path / "x").exists(), "a small file"
    monkeypatch.setattr(cache, "SMALL", 100)
    monkeypatch.setattr(pool, "cores", lambda: 0)
    key = encode(path, codec, tmp_path / "c", cache="auto")["key"]
    assert (tmp_path / "x" / "pipedock" / "data" / key / "ids.npy").exists()
    (tmp_path / "in the way").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "in the way"))
    said = []
    encode(path, codec, tmp_path / "e", cache="auto", say=said.append)
    assert said == ["%s/pipedock/data: Not a directory; the encoded data is not kept there" % (tmp_path / "in the way")]
    with pytest.raises(UserError) as error:
        encode(path, codec, tmp_path / "d", cache=str(tmp_path / "in the way" / "x"))
    assert str(error.value) == "data.cache: %s: Not a directory" % (tmp_path / "in the way" / "x")


def test_old_and_too_many_entries_go(tmp_path, codec, small, monkeypatch):
    root = tmp_path / "kept"
    keys = []
    for number in range(4):
        path = write(tmp_path / "d.jsonl", records(20, seed=number))
        keys.append(encode(path, codec, tmp_path / "a", cache=str(root))["key"])
        os.utime(str(root / keys[-1]), (time.time() - 1000 + number,) * 2)
    (root / (keys[3] + ".part")).mkdir()
    size = sum(file.stat().st_size for file in (root / keys[1]).iterdir())
    monkeypatch.setattr(cache, "MOST_BYTES", 100 * size)
    cache.prune(root, keys[0])
    assert {path.name for path in root.iterdir() if path.is_dir()} == {*keys, keys[3] + ".part"}
    monkeypatch.setattr(cache, "MOST_BYTES", size // 2)
    with cache.alone(root, keys[1], print):  # in use
        cache.prune(root, keys[0])
    assert {path.name for path in root.iterdir()} == {name for key in keys[:2] for name in (key, key + ".lock")}
    monkeypatch.setattr(cache, "MOST_BYTES", 100 * size)
    monkeypatch.setattr(cache, "MOST_S", 500)
    cache.prune(root, keys[0])
    assert {path.name for path in root.iterdir()} == {keys[0], keys[0] + ".lock"}


@pytest.mark.parametrize("how", ["its files go", "it is renamed", "it cannot be removed"])
def test_pruning_beside_another_process_never_fails(tmp_path, monkeypatch, how):
    """Another process takes an entry away between two looks at it."""
    for number, key in enumerate("abc"):
        (tmp_path / (key + ".lock")).write_text("")
        (tmp_path / key).mkdir()
        (tmp_path / key / "ids.npy").write_text("x")
        os.utime(str(tmp_path / key), (number, number))
    (tmp_path / "c").rename(tmp_path / "c.part")
    real, remove = Path.iterdir, cache.remove

    def vanishing(path):
        if path.name == "b" and how == "it is renamed":
            path.rename(path.with_name("elsewhere"))
        found = list(real(path))
        if path.name == "b" and how == "its files go":
            shutil.rmtree(str(path))
        return iter(found)

    def refused(path):
        if path.name == "b" and how == "it cannot be removed":
            raise PermissionError(13, "Permission denied")
        remove(path)

    monkeypatch.setattr(Path, "iterdir", vanishing)
    monkeypatch.setattr(cache, "remove", refused)
    cache.prune(tmp_path, "none")
    left = {path.name for path in real(tmp_path)}
    assert left - {"b", "elsewhere"} == {"b.lock"}, "the others are pruned"
    held = cache._lock(tmp_path / "b.lock")
    assert held is not None, "and its lock was let go"
    held.close()
    cache.prune(tmp_path / "gone", "none")


def test_an_entry_that_is_a_file_is_pruned(tmp_path):
    for name in ("a.lock", "a", "a.part"):
        (tmp_path / name).write_text("x")
        os.utime(str(tmp_path / name), (0, 0))
    cache.prune(tmp_path, "none")
    assert list(tmp_path.iterdir()) == []


def test_without_a_home_nothing_is_kept_and_one_line_says_so(tmp_path, codec, small, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(host, "cache_folder", lambda: None)
    path = write(tmp_path / "d.jsonl", records(5))
    said = []
    encode(path, codec, tmp_path / "a", cache="auto", say=said.append)
    assert said == ["no home folder is known (set HOME, XDG_CACHE_HOME or data.cache); the encoded data is not kept for other runs"]
    assert {found.name for found in tmp_path.iterdir()} == {"a", "d.jsonl"}


def test_the_file_must_not_change_meanwhile(tmp_path, codec, small, monkeypatch):
    path = write(tmp_path / "d.jsonl", records(30))
    real = pool.encoded

    def grow(*args):
        with path.open("a") as file:
            file.write(json.dumps(GOOD) + "\n")
        return real(*args)

    monkeypatch.setattr(pool, "encoded", grow)
    with pytest.raises(UserError) as error:
        encode(path, codec, tmp_path / "a", cache=str(tmp_path / "kept"))
    assert str(error.value) == "%s: was changed while it was read; start again" % path
    assert [p for p in (tmp_path / "kept").iterdir() if p.is_dir()] == []


def test_a_full_disk_is_one_line_and_keeps_what_is_done(tmp_path, codec, small, monkeypatch):
    path = write(tmp_path / "d.jsonl", records(60))
    real = making.Journal.add

    def full(journal, part):
        if journal.blocks == 2:
            raise OSError(28, "No space left on device")
        real(journal, part)

    with monkeypatch.context() as patch:
        patch.setattr(making.Journal, "add", full)
        with pytest.raises(UserError) as error:
            encode(path, codec, tmp_path / "a", cache=str(tmp_path / "kept"))
    assert str(error.value) == "%s: the encoded data cannot be written: No space left on device" % (tmp_path / "kept")
    said = []
    encode(path, codec, tmp_path / "a", cache=str(tmp_path / "kept"), say=said.append)
    assert "goes on where it was stopped" in said[0]


class Deadly:
    """A codec whose spans kill their process at some record."""

    def __init__(self, codec):
        self.codec = codec

    def __getattr__(self, name):
        return getattr(self.codec, name)

    @property
    def spans(self):
        return self

    def plan(self, record):
        if record.line == 60 and os.getpid() != MAIN:
            os.kill(os.getpid(), signal.SIGKILL)
        return self.codec.spans.plan(record)

    def sequences(self, plans):
        return self.codec.spans.sequences(plans)


MAIN = os.getpid()


def test_a_killed_worker_is_an_error_and_no_hang(tmp_path, codec, small):
    path = write(tmp_path / "d.jsonl", records(120))
    small(2)
    with pytest.raises(RunFailed) as error:
        encode(path, Deadly(codec), tmp_path / "d")
    assert str(error.value) == (
        "a process that encodes the data was killed, perhaps because memory ran out; start again: it goes on from there"
    )
    said = []
    encode(path, codec, tmp_path / "d", say=said.append)
    encode(path, codec, tmp_path / "whole")
    assert contents(tmp_path / "d") == contents(tmp_path / "whole")


def test_spawned_processes_make_the_same(tmp_path, codec, small, monkeypatch):
    """As on systems whose libraries do not survive a fork."""
    path = write(tmp_path / "d.jsonl", records(60))
    encode(path, codec, tmp_path / "a")
    monkeypatch.setattr(pool, "START", "spawn")
    small(1)
    encode(path, codec, tmp_path / "b")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=60))
def test_statistics_of_lengths_are_numpys(lengths):
    found = totals.statistics(np.bincount(lengths, minlength=31))
    low, middle, high = np.percentile(lengths, [0, 50, 95])
    assert (found["min"], found["max"], found["mean"]) == (low, max(lengths), round(float(np.mean(lengths)), 1))
    assert found["median"] == pytest.approx(middle) and found["p95"] == pytest.approx(high)


def test_progress_is_a_line_now_and_then(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    said = []
    with progress.Progress("d.jsonl", said.append) as shown:
        shown.start("encoding", 5_000_000, done=1_000_000)
        for second in range(1, 12):
            now[0] += 1
            shown.at(1_000_000 + second * 200_000)
        now[0] += 5
        shown.at(2_000, "records")
    assert said == [
        "d.jsonl: encoding, 40 % (2 of 5 MB, 0.2 MB/s, 0:00:15 left)",
        "d.jsonl: encoding, 60 % (3 of 5 MB, 0.2 MB/s, 0:00:10 left)",
        "d.jsonl: encoding, 2000 records",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def large(tmp_path_factory, codec):
    """A run.yaml with data that takes two processes some seconds."""
    folder = tmp_path_factory.mktemp("large")
    shutil.copytree(codec.name, str(folder / "model"))
    (folder / "model" / "config.json").write_text(json.dumps(tiny_config("llama", vocab_size=512)))
    lines = "".join(json.dumps(v, ensure_ascii=False) + "\n" for v in records(1000))
    (folder / "d.jsonl").write_text(lines * (1_300_000 // len(lines.encode("utf-8")) + 1), encoding="utf-8")
    (folder / "run.yaml").write_text(
        "run: {out: x}\nmodel: {path: model}\nparallel: {pipe: 1}\ndata: {train: d.jsonl, cache: kept}\n"
    )
    return folder


def start(folder):
    code = "import sys; sys.path.insert(0, %r); from pipeline_train.data import cache, files, pool; " % str(ROOT)
    code += "pool.cores = lambda: 2; cache.SMALL, files.BYTES = 0, 50_000; import pipedock; "
    code += "sys.exit(pipedock.main(['data', '--config', 'run.yaml']))"
    pipes = {"stderr": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", code], cwd=str(folder), start_new_session=True, **pipes)


def wait_for_blocks(folder, number):
    end = time.monotonic() + 60
    while time.monotonic() < end:
        journals = list((folder / "kept").glob("*.part/journal"))
        if journals and journals[0].read_bytes().count(b"\n") > number:
            return
        time.sleep(0.05)
    raise AssertionError("no block was encoded in a minute")


def group(pid):
    """Processes of a process group that live."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[2]) == pid and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return found


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="processes are looked up in /proc")
@pytest.mark.parametrize("how", ["Ctrl-C", "killed"])
def test_no_process_outlives_the_command_and_the_next_one_goes_on(large, how):
    shutil.rmtree(str(large / "kept"), ignore_errors=True)
    running = start(large)
    wait_for_blocks(large, 2)
    assert len(group(running.pid)) == 3
    if how == "Ctrl-C":
        os.killpg(running.pid, signal.SIGINT)  # as a terminal sends it: to all of them
    else:
        os.kill(running.pid, signal.SIGKILL)
    _, said = running.communicate(timeout=30)
    end = time.monotonic() + 20
    while group(running.pid) and time.monotonic() < end:
        time.sleep(0.1)
    assert group(running.pid) == []
    if how == "Ctrl-C":
        assert running.returncode == 130 and said.splitlines()[-1] == "pipedock data: interrupted" and "Traceback" not in said
        return
    done = start(large)
    out, said = done.communicate(timeout=120)
    assert done.returncode == 0 and "goes on where it was stopped, with " in said and " records (" in out


def test_two_at_once_make_it_once(tmp_path, codec, small, monkeypatch):
    path = write(tmp_path / "d.jsonl", records(60))
    begun, go_on = threading.Event(), threading.Event()
    seen = stop_after(monkeypatch, 10**6)
    real = making.Journal.add

    def slow(journal, part):
        begun.set()
        assert go_on.wait(60)
        real(journal, part)

    monkeypatch.setattr(making.Journal, "add", slow)
    said = {"a": [], "b": []}

    def told(line):
        said["b"].append(line)
        go_on.set()

    def run(name, say):
        encode(path, codec, tmp_path / name, cache=str(tmp_path / "kept"), say=say)

    first = threading.Thread(target=run, args=("a", said["a"].append))
    first.start()
    assert begun.wait(60)
    run("b", told)
    first.join(60)
    assert (
        said["a"] == [] and len(said["b"]) == 2 and said["b"][0].endswith(": another process is encoding this data; waiting for it")
    )
    assert said["b"][1].startswith("%s: was encoded before; taken from " % path)
    assert len(seen) == len(list(files.blocks(path))) and contents(tmp_path / "a") == contents(tmp_path / "b")


def test_the_feed_of_kept_data(tmp_path, codec, small):
    path = write(tmp_path / "d.jsonl", records(60))
    encode(path, codec, tmp_path / "a", cache=str(tmp_path / "kept"))
    encode(path, codec, tmp_path / "b")
    options = {"seq_len": 32, "rows_per_step": 3, "seed": 1, "pack": True, "pad_id": 0}
    feeds = [Feed.open(tmp_path / name, "train", **options) for name in ("a", "b")]
    for step in (0, 5, 10**9):
        for mine, theirs in zip(*(feed.at(step) for feed in feeds)):
            assert np.array_equal(mine, theirs)
