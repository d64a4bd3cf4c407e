"""``pipedock data``: its document, its page, its exit codes."""

import argparse
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline_train.errors import UserError
from tests.models import tiny_config
from tests.tokenizers import tiny_tokenizer
from verbs import data

ROOT = Path(__file__).resolve().parents[2]
RECORDS = [
    {"type": "instruct", "instruct": "Name one.", "output": "Red 你好"},
    {"type": "conversation", "rounds": [["ask", "hi"], ["ans", "Paris"], ["ask", "more"], ["ans", "is blue"]]},
    {"type": "pretrain", "text": "once upon a time " * 40},
    {"type": "conversation", "rounds": [["ask", "hi"]]},
    {"type": "pretrain"},
    {"instruction": "a", "input": "", "output": "b" * 400},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("verb")
    tiny_tokenizer(folder / "model", "spm")
    config = tiny_config("llama", vocab_size=512)
    (folder / "model" / "config.json").write_text(json.dumps(config))
    (folder / "d.jsonl").write_text("".join(json.dumps(r) + "\n" for r in RECORDS))
    (folder / "run.yaml").write_text(
        "run: {out: runs/x}\nmodel: {path: model}\nparallel: {pipe: 2}\nbatch: {global: 2}\n"
        "data: {train: d.jsonl, on_bad: skip, eval: d.jsonl}\n"
    )
    return folder


def run(folder, monkeypatch, *args):
    """The verb in this process; -> what it wrote for a person."""
    monkeypatch.chdir(folder)
    parser = argparse.ArgumentParser()
    data.add(parser)
    parsed = parser.parse_args(["--config", "run.yaml", *args])
    parsed.json, parsed.answer = False, io.StringIO()
    assert data.run(parsed) is None
    return parsed.answer.getvalue()


def test_the_document(folder):
    done = subprocess.run(
        [sys.executable, str(ROOT / "pipedock.py"), "data", "--config", "run.yaml", "--json"],
        cwd=str(folder), capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    counted = {key: found[key] for key in ("records", "bad", "truncated", "dropped", "continued", "nothing_to_learn", "seq_len")}
    assert counted == {
        "records": 5, "bad": 1, "truncated": 1, "dropped": 0, "continued": 1, "nothing_to_learn": 1, "seq_len": 128,
    }  # fmt: skip
    assert found["kinds"] == {"instruct": 2, "conversation": 2, "pretrain": 1}
    assert 0 < found["learnt_tokens"] < found["tokens"] == round(found["packing_efficiency"] * found["rows"] * 128)
    assert found["bad_lines"] == ["d.jsonl:5: text: missing, expected text"]
    assert found["stop_tokens"] == ["</s>"] and found["steps_per_epoch"] == -(-found["rows"] // 2)
    prompt, learnt = found["sample"]["pieces"]
    assert prompt["text"].startswith("<s>") and prompt["text"].endswith("### Response:") and not prompt["learnt"]
    assert learnt == {"text": "Red 你好</s>", "learnt": True}
    assert found["eval"]["tokens"] == found["tokens"] and found["eval"]["hash"] == found["hash"]
    assert not (folder / "runs").exists()


def test_the_page_marks_the_learnt_span(folder, monkeypatch):
    page = run(folder, monkeypatch, "--set", "data.eval=null", "--set", "data.seq_len=64")
    assert "d.jsonl: 5 records (2 conversation, 2 instruct, 1 pretrain), 1 bad\n" in page
    assert "skipped: d.jsonl:5: text: missing, expected text\n" in page
    assert 'warning: d.jsonl: "input": "" counts as no input (1 records)\n' in page
    assert "learnt between ⟦ and ⟧:\n" in page and "first sample, its first" not in page
    assert "### Response:⟦Red" in page and "\x1b" not in page


def test_a_users_mistake_is_one_message(folder, monkeypatch):
    with pytest.raises(UserError) as error:
        run(folder, monkeypatch, "--set", "data.on_bad=fail")
    assert str(error.value) == (
        "d.jsonl: 1 bad record (data.on_bad: skip leaves them out):\nd.jsonl:5: text: missing, expected text"
    )
    with pytest.raises(UserError, match="data.seq_len: 256 is over the model's 128 positions"):
        run(folder, monkeypatch, "--set", "data.seq_len=256")
    (folder / "small").mkdir()
    (folder / "small" / "config.json").write_text(json.dumps(tiny_config("llama", vocab_size=300)))
    for file in (folder / "model").glob("tok*"):
        (folder / "small" / file.name).write_bytes(file.read_bytes())
    with pytest.raises(UserError, match="config.json: vocab_size: 300, but the tokenizer has ids up to 511"):
        run(folder, monkeypatch, "--set", "model.path=small")
    with pytest.raises(UserError, match="no such"):
        run(folder, monkeypatch, "--set", "model.path=./nowhere")


def test_colour_where_the_terminal_has_it():
    from pipeline_train.data import report

    document = {
        "file": "d", "kinds": {"instruct": 1}, "records": 1, "bad": 0, "bad_lines": [], "tokens": 2, "learnt_tokens": 1,
        "lengths": {"min": 2, "median": 2, "mean": 2, "p95": 2, "max": 2}, "seq_len": 8, "truncated": 0, "dropped": 0,
        "continued": 0, "nothing_to_learn": 0, "rows": 1, "packing_efficiency": 0.25, "steps_per_epoch": 1, "warnings": [],
        "template": "default",
        "sample": {"pieces": [{"text": "a", "learnt": False}, {"text": "b", "learnt": True}], "ids": 3, "shown": 2},
    }  # fmt: skip
    assert report.text(document, colour=True).endswith(
        "first sample, its first 2 tokens (default template), learnt in green:\na\x1b[1;32mb\x1b[0m"
    )
    assert report.text(document).endswith("\na⟦b⟧")


def test_data_that_is_mostly_lost_says_so_in_the_last_line(folder, monkeypatch):
    lost, good = {"instruction": "word " * 200, "output": "x"}, {"instruction": "a", "output": "x"}
    (folder / "lost.jsonl").write_text("".join(json.dumps(r) + "\n" for r in [lost] * 3 + [good] * 2))
    (folder / "half.jsonl").write_text("".join(json.dumps(r) + "\n" for r in [lost] * 2 + [good] * 2))
    options = ("--set", "data.eval=null", "--set", "data.train=%s", "--set", "data.over_long=%s")
    for over_long in ("truncate", "drop"):
        page = run(folder, monkeypatch, *(" ".join(options) % ("lost.jsonl", over_long)).split())
        assert page.splitlines()[-1] == (
            "warning: lost.jsonl: MOST OF IT IS NOT LEARNT: 3 of 5 records give nothing; raise data.seq_len (128), or see what "
            "their answers are"
        )
        assert "MOST" not in run(folder, monkeypatch, *(" ".join(options) % ("half.jsonl", over_long)).split())
    page = run(folder, monkeypatch, "--set", "data.eval=lost.jsonl")
    assert "warning: lost.jsonl: MOST" in page, "the eval data's too"
