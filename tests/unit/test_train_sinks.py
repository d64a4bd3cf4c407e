"""metrics.jsonl elsewhere: TensorBoard event files read back, W&B against a stand-in, and neither is worth a run."""

import importlib.util
import json
import math
from pathlib import Path

import pytest

from pipeline_train import config, metrics, sinks
from pipeline_train.errors import RunFailed, UserError
from tests.run_folder import step_line

WANDB = """
import os
calls = []
fail_in = os.environ.get("FAKE_WANDB_FAILS", "")
def Settings(**options): return options
class Run:
    id = "run-1"
    def log(self, values, step):
        if fail_in == "log": raise ConnectionError("no route\\nto host")
        calls.append(("log", step, values))
    def finish(self):
        if fail_in == "hang": import time; time.sleep(30)
        if fail_in == "finish": raise ValueError()
        calls.append(("finish",))
def init(**options):
    if fail_in == "init": raise RuntimeError("api_key not configured")
    calls.append(("init", options)); return Run()
"""


def parsed(wandb=False, name="colours"):
    return config.parse({
        "run": {"out": "out", "name": name, "wandb": wandb}, "model": {"path": "m"}, "data": {"train": "t"},
        "parallel": {"pipe": 2},
    })  # fmt: skip


@pytest.fixture
def out(tmp_path):
    (tmp_path / "resolved").mkdir()
    return tmp_path


@pytest.fixture
def wandb(tmp_path, monkeypatch):
    """The stand-in, importable as wandb; -> its recorded calls."""
    (tmp_path / "fake").mkdir()
    (tmp_path / "fake" / "wandb.py").write_text(WANDB)
    monkeypatch.syspath_prepend(str(tmp_path / "fake"))
    monkeypatch.delitem(__import__("sys").modules, "wandb", raising=False)
    yield lambda: __import__("wandb").calls
    __import__("sys").modules.pop("wandb", None)


def without(monkeypatch, *names):
    """As if these packages were not installed."""
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name in names else find(name, *rest))


def written(out, run, lines, done=0):
    """Write ``lines`` through every sink; -> the messages to the launcher."""
    told = []
    opened = sinks.open_metrics(run, out, done, told.append)
    for line in lines:
        opened.write(**line)
    opened.close()
    return told


def curves(out):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(out / "tensorboard"), size_guidance={"scalars": 0})
    found.Reload()
    return {tag: [(event.step, event.value) for event in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def test_what_of_a_line_is_a_curve():
    found = sinks.scalars(step_line(7, loss=2.5, loss_scale=1024.0, skipped=1))
    assert found["train/loss"] == 2.5 and found["train/loss_scale"] == 1024.0 and found["train/skipped"] == 1.0
    assert found["memory_gib/stage_1"] == 0.25 and found["busy_s/stage_0"] == 0.15
    assert "train/mfu" not in found and "train/samples" not in found  # mfu: null on a CPU
    assert sinks.scalars({"kind": "eval", "step": 3, "loss": 1.5, "tokens": 9}) == {"eval/loss": 1.5}
    assert sinks.scalars({"kind": "save", "step": 3, "seconds": 2.0}) == {"save/seconds": 2.0}
    assert sinks.scalars({"kind": "start", "step": 3, "total_steps": 9}) == {}
    assert sinks.scalars({"kind": "step", "step": 3, "loss": None}) == {}  # a line of an older version


def test_event_files_hold_every_curve(out):
    lines = [{"kind": "start", "step": 0, "total_steps": 3}] + [step_line(n) for n in (1, 2, 3)]
    written(out, parsed(), lines + [{"kind": "eval", "step": 3, "loss": 1.5, "tokens": 9}])
    found = curves(out)
    assert [step for step, _ in found["train/loss"]] == [1, 2, 3]
    assert [value for _, value in found["train/loss"]] == pytest.approx([2.999, 2.998, 2.997])  # they are float32
    assert found["eval/loss"] == [(3, 1.5)]
    assert found["memory_gib/stage_0"] == [(1, 0.5), (2, 0.5), (3, 0.5)]


def test_a_resumed_run_shows_no_step_twice(out):
    """Seven steps were written, the checkpoint was at four, the second start gets other values and stops at six: seven is void."""
    written(out, parsed(), [step_line(n, loss=float(n)) for n in range(1, 8)])
    written(out, parsed(), [step_line(n, loss=float(10 * n)) for n in (5, 6)], done=4)
    assert curves(out)["train/loss"] == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0), (5, 50.0), (6, 60.0)]
    lines = metrics.read(out / "metrics.jsonl")  # the file itself keeps everything
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6, 7, 5, 6]


def test_a_run_that_starts_again_from_nothing_voids_everything(out):
    written(out, parsed(), [step_line(n, loss=1.0) for n in (1, 2)])
    written(out, parsed(), [step_line(1, loss=2.0)])
    assert curves(out)["train/loss"] == [(1, 2.0)]


def test_without_the_package_there_are_no_event_files_and_one_line(out, monkeypatch):
    without(monkeypatch, "tensorboard")
    told = written(out, parsed(), [step_line(1), step_line(2)])
    assert [message["say"] for message in told] == [
        'no TensorBoard files: the package tensorboard is not installed (pip install "pipedock[watch]")'
    ]
    assert not (out / "tensorboard").exists() and len(metrics.read(out / "metrics.jsonl")) == 2


def test_event_files_that_cannot_be_written_cost_one_line(out):
    (out / "tensorboard").write_text("a file where the folder should be")
    told = written(out, parsed(), [step_line(1), step_line(2)])
    assert len(told) == 1 and told[0]["say"].startswith("TensorBoard is left out from here on, the run goes on: ")
    assert len(metrics.read(out / "metrics.jsonl")) == 2


def test_the_launcher_hears_of_evaluations_and_saves(out):
    """Lines of steps reach it with the progress message of the step."""
    evaluation = {"kind": "eval", "step": 1, "loss": 1.5, "tokens": 9}
    assert written(out, parsed(), [step_line(1), evaluation]) == [{"line": evaluation}]


def test_numbers_that_json_has_not_are_null_everywhere(out):
    written(out, parsed(), [step_line(1, loss=math.nan), step_line(2)])
    assert metrics.read(out / "metrics.jsonl")[0]["loss"] is None
    assert [step for step, _ in curves(out)["train/loss"]] == [2]


def test_a_full_disk_is_one_line(out):
    opened = metrics.Metrics(out / "metrics.jsonl")
    opened.file.close()
    opened.file = open("/dev/full", "w")
    with pytest.raises(RunFailed, match="^/dev/full: cannot be written: No space left on device$"):
        opened.write("step", step=1)


def test_wandb_gets_the_configuration_and_every_curve(out, wandb):
    lines = [step_line(1), {"kind": "eval", "step": 1, "loss": 1.5, "tokens": 9}, step_line(2)]
    lines.append({"kind": "save", "step": 1, "path": "p", "seconds": 2.0, "stall_s": 0.5})  # it went on behind step 2
    assert [message for message in written(out, parsed(True), lines) if "say" in message] == []
    (_, options), *logged, end = wandb()
    assert options["project"] == "pipedock" and options["name"] == "colours" and options["dir"] == str(out)
    assert options["config"]["parallel"]["pipe"] == 2 and options["settings"]["init_timeout"] == sinks.INIT_S
    assert options["id"] is None and end == ("finish",)
    assert [step for _, step, _ in logged] == [1, 1, 2, 2]  # W&B refuses a step smaller than the last
    assert logged[0][2]["train/loss"] == 2.999 and logged[1][2] == {"eval/loss": 1.5} and logged[3][2]["save/stall_s"] == 0.5


def test_a_resumed_run_goes_on_in_the_same_wandb_run(out, wandb):
    written(out, parsed("my-project"), [step_line(1)])
    written(out, parsed("my-project"), [step_line(2)], done=1)
    begins = [call[1] for call in wandb() if call[0] == "init"]
    assert [begin["id"] for begin in begins] == [None, "run-1"] and {begin["resume"] for begin in begins} == {"allow"}
    assert {begin["project"] for begin in begins} == {"my-project"}


@pytest.mark.parametrize("where, reason", [
    ("init", "api_key not configured"), ("log", "no route to host"), ("finish", "ValueError"),
    ("hang", "not everything was sent within 0.2 s; `wandb sync` sends it"),
])  # fmt: skip
def test_wandb_that_fails_is_said_once_and_the_run_goes_on(out, wandb, monkeypatch, where, reason):
    monkeypatch.setenv("FAKE_WANDB_FAILS", where)
    monkeypatch.setattr(sinks, "FINISH_S", 0.2)
    told = written(out, parsed(True), [step_line(1), step_line(2), step_line(3)])
    assert [m["say"] for m in told] == ["W&B is left out from here on, the run goes on: " + reason]
    assert len(metrics.read(out / "metrics.jsonl")) == 3 and len(curves(out)["train/loss"]) == 3


def test_a_missing_wandb_is_found_before_anything_starts(tmp_path, monkeypatch):
    from pipeline_train.prepare import prepare

    without(monkeypatch, "wandb")
    run = parsed(True)
    run.run.out = str(tmp_path / "out")
    line = r'^run.yaml: run.wandb: the package wandb is not installed. pip install "pipedock\[watch\]", or remove the key$'
    with pytest.raises(UserError, match=line):
        prepare(run, Path("run.yaml"), None, lambda text: None)
    assert not (tmp_path / "out").exists()
    sinks.check(parsed(False), "run.yaml")


@pytest.mark.parametrize("value, message", [
    ("", "run.yaml: run.wandb: is empty; give true or the name of a W&B project, or remove the key"),
    (3, "run.yaml: run.wandb: expected"),
])  # fmt: skip
def test_a_wandb_key_that_names_nothing_is_refused(value, message):
    with pytest.raises(UserError) as caught:
        parsed(value)
    assert str(caught.value).startswith(message)
    assert parsed("a project").run.wandb == "a project"


def test_a_spoilt_wandb_record_is_no_reason_to_fail(out, wandb):
    (out / "resolved" / sinks.WANDB_ID).write_text("{")
    told = written(out, parsed(True), [step_line(1)])
    assert len(told) == 1 and told[0]["say"].startswith("W&B is left out")
    assert json.loads((out / "metrics.jsonl").read_text())["step"] == 1
