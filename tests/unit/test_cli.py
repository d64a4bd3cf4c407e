"""The command itself: fast help, one JSON document, exit codes, no tracebacks."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

import pipedock

ROOT = Path(__file__).resolve().parents[2]
RUN = [sys.executable, str(ROOT / "pipedock.py")]


def call(*arguments, **options):
    return subprocess.run(RUN + list(arguments), capture_output=True, text=True, timeout=60, **options)


@pytest.mark.parametrize("arguments", [["-h"]] + [[verb, "-h"] for verb in pipedock.VERBS], ids=" ".join)
def test_help_never_imports_a_heavy_library(arguments):
    heavy = ("torch", "transformers", "deepspeed", "numpy", "starlette", "msgspec", "yaml")
    code = "import sys, pipedock\ntry: pipedock.main(%r)\nexcept SystemExit as e: assert e.code == 0\n" % arguments
    code += "print([m for m in %r if m in sys.modules], file=sys.stderr)" % (heavy,)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=str(ROOT))
    assert done.stderr.strip() == "[]" and "usage: pipedock" in done.stdout


def test_help_is_under_half_a_second():
    """The best of five, so that a busy machine does not fail it."""
    times = []
    for _ in range(5):
        start = time.perf_counter()
        assert call("-h").returncode == 0
        times.append(time.perf_counter() - start)
    assert min(times) < 0.5, times


def test_help_lists_every_verb():
    out = call("-h").stdout
    assert all(verb in out for verb in pipedock.VERBS)


@pytest.mark.parametrize("arguments, message", [
    ([], "the following arguments are required: VERB"),
    (["fly"], "invalid choice: 'fly'"),
    (["migrate"], "the following arguments are required: --config"),
    (["migrate", "--config", "x", "--fast"], "pipedock migrate: unrecognized arguments: --fast. See pipedock migrate -h"),
])  # fmt: skip
def test_wrong_words_are_one_line_and_exit_2(arguments, message):
    done = call(*arguments)
    assert done.returncode == 2 and message in done.stderr and len(done.stderr.strip().splitlines()) == 1
    assert done.stdout == ""


def test_with_json_a_wrong_word_is_a_document_too():
    done = call("plan", "--model", "llama-7b", "--gpus", "x", "--json")
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1
    assert json.loads(done.stdout) == {"error": "argument --gpus: invalid int value: 'x'. See pipedock plan -h"}


def test_the_home_folder_behind_an_equals_sign(tmp_path):
    """Which shells leave as it is; elsewhere it is part of what somebody says."""
    home = dict(os.environ, HOME=str(tmp_path))
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    assert "'gpt2' is not supported" in call("plan", "--model=~/model", env=home).stderr
    assert "~/model: no such folder" in call("plan", "--model", "~/model", env=home, cwd=str(tmp_path)).stderr


def fake(monkeypatch, run):
    module = type(sys)("fake_verb")
    module.HELP, module.add, module.run, module.text = "h", lambda parser: None, run, lambda document: "human %(a)s" % document
    monkeypatch.setitem(sys.modules, "fake_verb", module)
    monkeypatch.setattr(pipedock, "VERBS", {"fake": "fake_verb"})


def test_json_is_exactly_one_document_whatever_libraries_print(monkeypatch, capfd):
    def run(args):
        os.write(1, b"library noise\n")  # pytest's own sys.stdout does not go through file descriptor 1
        subprocess.run(["echo", "noise of a child"])
        return {"a": "é"}

    fake(monkeypatch, run)
    assert pipedock.main(["fake", "--json"]) == 0
    out, err = capfd.readouterr()
    assert json.loads(out) == {"a": "é"} and "noise of a child" in err and "library noise" in err
    assert pipedock.main(["fake"]) == 0
    assert capfd.readouterr().out == "human é\n"
    print("stdout is itself again")
    assert capfd.readouterr().out == "stdout is itself again\n"


@pytest.mark.parametrize(
    "error, code", [(pipedock.UserError("what, where"), 2), (pipedock.RunFailed("it did not hold"), 1), (KeyboardInterrupt(), 130)]
)
def test_exit_codes(monkeypatch, capfd, error, code):
    def run(args):
        raise error

    fake(monkeypatch, run)
    assert pipedock.main(["fake"]) == code
    out, err = capfd.readouterr()
    assert out == "" and err == "pipedock fake: %s\n" % (str(error) or "interrupted")


@pytest.mark.parametrize("error, code, document", [
    (pipedock.UserError("what, where"), 2, {"error": "what, where"}),
    (pipedock.RunFailed("it did not hold", {"holds": False}), 1, {"holds": False, "error": "it did not hold"}),
])  # fmt: skip
def test_json_is_one_document_on_failure_too(monkeypatch, capfd, error, code, document):
    def run(args):
        raise error

    fake(monkeypatch, run)
    assert pipedock.main(["fake", "--json"]) == code
    assert json.loads(capfd.readouterr().out) == document


def test_version():
    assert call("--version").stdout.startswith("pipedock ")


def test_closed_and_full_outputs_are_no_traceback(tmp_path):
    """``>&-`` and a full disk behind stdout."""
    from tests.models import tiny_config

    (tmp_path / "config.json").write_text(json.dumps(tiny_config("llama")))
    command = "%s %s plan --model %s --gpu h100 --seq-len 64" % (*RUN, tmp_path / "config.json")
    closed = subprocess.run(["bash", "-c", command + " >&-"], stderr=subprocess.PIPE, text=True)
    assert (closed.returncode, closed.stderr) == (0, "")
    full = subprocess.run(["bash", "-c", command + " >/dev/full"], stderr=subprocess.PIPE, text=True)
    assert full.returncode == 1
    assert full.stderr == "pipedock plan: the answer cannot be written: No space left on device\n"


def test_a_report_replaces_no_device_and_takes_no_endless_name(tmp_path):
    done = call("report", "--run", str(tmp_path), "--output", "/dev/null")
    assert done.returncode == 2 and done.stderr == "pipedock report: --output: /dev/null: is no file\n"
    done = call("report", "--run", "x" * 5000)
    assert done.returncode == 2 and done.stderr.endswith("x: File name too long\n") and done.stderr.count("\n") == 1


def test_a_message_that_nobody_reads_ends_nothing():
    """``train 2>&1 | head -1``: the reader has gone, the work goes on."""
    code = "import sys; from verbs.progress import say\nfor _ in range(3000): say('x' * 100)\nprint('done')"
    done = subprocess.run(["bash", "-c", "%s -c \"$CODE\" 2> >(head -1 >/dev/null)" % sys.executable], cwd=str(ROOT),
                          env=dict(os.environ, CODE=code), stdout=subprocess.PIPE, text=True)  # fmt: skip
    assert done.returncode == 0 and done.stdout == "done\n"


def test_what_is_kept_is_not_said_to_be_nothing_when_it_cannot_be_read(tmp_path, monkeypatch):
    from pipeline_train import manifest
    from verbs.train import kept

    assert kept(tmp_path).startswith("%s: nothing was saved yet; --resume auto starts again" % tmp_path)

    def unreadable(out):
        raise manifest.Unreadable(out, PermissionError(13, "Permission denied"))

    monkeypatch.setattr(manifest, "find_checkpoint", unreadable)
    assert kept(tmp_path).startswith("%s: cannot be read: Permission denied. That does not make" % tmp_path)
