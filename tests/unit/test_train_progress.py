"""What a training shows: figures gathered from its messages, plain lines, and the live display on a real (pseudo) terminal."""

import re
import sys
import textwrap
from pathlib import Path

import pytest

from tests import terminal
from verbs import progress

ROOT = Path(__file__).resolve().parents[2]
LINE = {
    "kind": "step", "step": 12, "loss": 2.5, "grad_norm": 0.93, "lr": 1e-3, "step_s": 0.5, "mfu": 0.412, "bubble": 0.3,
    "stage_s": [0.4, 0.3], "mem_gib": [10.0, 20.0], "loss_scale": 1024.0, "skipped": 1,
}  # fmt: skip
SAVE = {"kind": "save", "step": 10, "seconds": 3.2, "stall_s": 0.4, "asynchronous": True}
STARTUP = {"kind": "startup", "step": 1, "seconds": {"libraries": 4.0, "weights": 1.5, "first_step": 0.25}}
MEMORY = {"kind": "memory", "step": 1, "mem_gib": [10.25, 9.5], "planned_gib": [11.0, 9.0]}
MESSAGES = [
    {"step": 12, "total": 400, "loss": 2.6, "tokens": 4000, "learnt_tokens": 3000, "eta_s": 7500.0, "epoch": 0},
    {"step": 13, "total": 400, "loss": 2.5, "tokens": 4000, "learnt_tokens": 3000, "eta_s": 7500.0, "epoch": 1, "line": LINE},
    {"line": {"kind": "eval", "step": 10, "loss": 2.25}},
    {"line": SAVE},
]


def messages_of(figures, clock):
    for number, message in enumerate(MESSAGES):
        clock[0] = 100.0 + 2 * number
        figures.take(message)
    return figures


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_every_figure_of_the_messages_is_known(clock):
    found = dict(messages_of(progress.Figures(400, "run", 2, 8), clock).known())
    assert found == {
        "loss": "2.5000", "eval loss": "2.2500 at step 10", "tokens/s": "2,000 (1,500 learnt)", "gradient norm": "0.93",
        "lr": "0.001", "step": "0.5 s", "MFU": "41.2 %", "bubble": "30.0 % (schedule 11.1 %)",
        "loss scale": "1024, 1 steps skipped", "epoch": "2", "saved": "step 10 in 3.2 s, training stood still for 0.4 s",
    }  # fmt: skip


def test_what_a_run_does_not_tell_is_not_shown(clock):
    """On a CPU MFU is null; older versions have neither learnt tokens nor stages."""
    figures = progress.Figures(9, "", 1, 1)
    assert figures.known() == [] and figures.stages() == [] and figures.left() is None
    figures.take({"step": 1, "total": 9, "loss": 1.0, "tokens": 10, "line": None})
    clock[0] += 1
    figures.take({"step": 2, "total": 9, "loss": 1.0, "tokens": 10})
    figures.take({"line": {"kind": "step", "step": 2, "mfu": None, "mem_gib": [1.0]}})
    assert dict(figures.known()) == {"loss": "1.0000", "tokens/s": "10"} and figures.stages() == [(None, 1.0)]


def test_the_time_left_counts_down_between_messages(clock):
    figures = progress.Figures(9, "", 1, 1)
    figures.take({"step": 1, "total": 9, "tokens": 10, "eta_s": 60.0})
    clock[0] += 20
    assert figures.left() == 40.0
    clock[0] += 100
    assert figures.left() == 0.0 and progress.clock(3725.6) == "1:02:06"


def test_where_there_is_no_terminal_lines_come_now_and_then(clock, capsys):
    """Steps every five seconds and the last one; evaluations, saves and what the user should know always."""
    shown = progress.Progress(6, "run", 2, 8)
    assert isinstance(shown.view, progress.Lines)  # pytest's stderr is no terminal
    for step in range(1, 7):
        shown.show({"step": step, "total": 6, "loss": 3.0 - step, "tokens": 100, "learnt_tokens": 50, "eta_s": 6.0 - step,
                    "line": dict(LINE, step=step)})  # fmt: skip
        clock[0] += 2
    shown.show({"line": {"kind": "eval", "step": 6, "loss": 2.25}})
    shown.show({"line": SAVE})
    shown.show({"line": STARTUP})
    shown.show({"line": MEMORY})
    shown.show({"say": "something [bold]to know"})
    shown.close()
    assert capsys.readouterr().err.splitlines() == [
        "step 1/6  loss 2.0000  mfu 41.2 %  eta 0:00:05",
        "step 4/6  loss -1.0000  50 (25 learnt) tokens/s  mfu 41.2 %  eta 0:00:02",
        "step 6/6  loss -3.0000  50 (25 learnt) tokens/s  mfu 41.2 %  eta 0:00:00",
        "step 6: eval loss 2.2500", "saved step 10 in 3.2 s, training stood still for 0.4 s",
        "start-up took 5.8 s: libraries 4.0 s, weights 1.5 s, first step 0.2 s",
        "memory after step 1, GiB measured of planned: stage 0: 10.25 of 11.00, stage 1: 9.50 of 9.00", "something [bold]to know",
    ]  # fmt: skip


def shown_in_a_terminal(messages, last="", stages=2, **options):
    """A process that shows ``messages``, says something in between and ends with ``last``."""
    code = """
        import sys, time
        sys.path.insert(0, %r)
        from verbs.progress import Progress, say
        shown = Progress(400, "my [bold]run", %d, 8)
        try:
            for message in %r:
                shown.show(message)
                time.sleep(0.05)
            say("said through stderr")
            shown.show({"say": "to know: [red]x"})
            time.sleep(1.2)  # four frames
            %s
        finally:
            shown.close()
    """ % (str(ROOT), stages, messages, last or "pass")
    return terminal.run([sys.executable, "-c", textwrap.dedent(code)], **options)


def test_the_display_shows_every_figure_and_leaves_the_cursor():
    ended = shown_in_a_terminal(MESSAGES)
    screen = "\n".join(ended.screen)
    assert ended.code == 0 and ended.cursor
    for text in ("my [bold]run  step 13/400", "loss 2.5000", "eval loss 2.2500 at step 10", "learnt)", "gradient norm 0.93",
                 "lr 0.001", "MFU 41.2 %", "bubble 30.0 % (schedule 11.1 %)", "loss scale 1024", "saved step 10 in 3.2 s",
                 ", 2:0"):  # fmt: skip
        assert text in screen, (text, screen)
    assert re.search(r"stage 0  busy 0\.4 s +━+[╺╸]?━* +80\.0 % +10\.00 GiB", screen)
    assert re.search(r"stage 1  busy 0\.3 s +━+[╺╸]?━* +60\.0 % +20\.00 GiB", screen)
    assert ended.screen[:2] == ["said through stderr", "to know: [red]x"]  # above the display, which is there once
    assert screen.count("step 13/400") == 1
    assert b"\x1b[?25l" in ended.written and ended.written.rindex(b"\x1b[?25h") > ended.written.rindex(b"\x1b[?25l")
    assert b"\x1b[2J" not in ended.written  # redrawn in place: the screen is never cleared


def test_no_color_and_a_dumb_terminal():
    colourless = shown_in_a_terminal(MESSAGES, NO_COLOR="1")
    assert "loss 2.5000" in "\n".join(colourless.screen) and colourless.cursor
    assert not re.search(rb"\x1b\[[0-9;]*3[0-9]", colourless.written)  # no colour is ever set
    dumb = terminal.run(["env", "TERM=dumb", sys.executable, "-c", "import sys; sys.path.insert(0, %r)\n"
                         "from verbs.progress import Progress\np = Progress(1)\n"
                         "p.show({'step': 1, 'total': 1, 'loss': 2.0, 'tokens': 1})\np.close()" % str(ROOT)])  # fmt: skip
    assert dumb.written == b"step 1/1  loss 2.0000\r\n"


@pytest.mark.parametrize("columns", [20, 40, 60])
def test_a_narrow_terminal_shows_everything_once(columns):
    """A line that the terminal itself wraps would be left behind at each redrawing."""
    ended = shown_in_a_terminal(MESSAGES, columns=columns)
    screen = "\n".join(ended.screen)
    assert ended.code == 0 and ended.cursor and "Traceback" not in screen
    assert screen.count("13/400") == screen.count("loss 2.5000") == screen.count("epoch 2") == 1
    assert len([line for line in ended.screen if line.startswith("sta")]) == 2


def test_many_stages_become_one_line():
    line = dict(LINE, stage_s=[0.1 * n for n in range(1, 33)], mem_gib=[float(n) for n in range(32)])
    ended = shown_in_a_terminal([dict(MESSAGES[0], line=line)], stages=32, rows=24)
    assert "32 stages: busy 0.1 to 3.2 s (stage 31), 0.00 to 31.00 GiB (stage 31)" in ended.screen


# The command itself, its training replaced by a few messages and an end.
COMMAND = """
import sys, time
from pathlib import Path
from types import SimpleNamespace as Fake
sys.path.insert(0, %(root)r)
import pipedock
from pipeline_train.errors import RunFailed, Stopped

def prepared(loaded, *unused):
    out = Path(loaded.run.out)
    (out / "resolved").mkdir(parents=True)
    return Fake(config=loaded, out=out, gpus=0, total=400, resume=None, done=0, dims=None,
                evaluate=False)

def training(prepared, show, *unused):
    (prepared.out / "metrics.jsonl").write_text('{"kind": "start", "step": 0, "total_steps": 400}\\n'
                                                '{"kind": "step", "step": 1, "loss": 2.5}\\n')
    for message in %(messages)r:
        show(message)
        time.sleep(0.2)
    %(end)s
    return {"steps": 400, "loss_first": 3.0, "loss_last": 2.0, "tokens": 9, "seconds": 1.0, "peak_gib": [0.5], "checkpoint": "c"}

sys.modules["pipeline_train.prepare"] = Fake(prepare=prepared)  # the real ones import torch
sys.modules["pipeline_train.launch"] = Fake(launch=training)
sys.modules["pipeline_train.selftest_run"] = Fake(once=lambda *unused: None)
sys.exit(pipedock.main(["train", "--config", %(config)r]))
"""


def trained_in_a_terminal(tmp_path, end, **options):
    (tmp_path / "run.yaml").write_text(
        '{"run": {"out": "%s", "name": "colours"}, "model": {"path": "m"}, "data": {"train": "t"}, "parallel": {"pipe": 2}}'
        % (tmp_path / "out")
    )
    code = COMMAND % {"root": str(ROOT), "messages": MESSAGES, "end": end, "config": str(tmp_path / "run.yaml")}
    return terminal.run([sys.executable, "-c", code], columns=160, **options), (tmp_path / "out" / "report.html").read_text()


def test_a_failure_is_the_last_thing_on_the_screen(tmp_path):
    ended, report = trained_in_a_terminal(tmp_path, "raise RunFailed('rank 1: the <disk> is full. Log: x')")
    assert ended.code == 1 and ended.cursor
    assert ended.screen[-1] == "pipedock train: rank 1: the <disk> is full. Log: x"
    assert "nothing was saved yet" in " ".join(ended.screen[-4:-1]) and "loss 2.5000" in "\n".join(ended.screen[:-1])
    assert ">failed</span>" in report and "rank 1: the &lt;disk&gt; is full. Log: x" in report


def test_ctrl_c_ends_the_display_too(tmp_path):
    end = "print('now', flush=True); time.sleep(30)"
    ended, report = trained_in_a_terminal(tmp_path, end, interrupt_at=b"now")
    assert ended.code == 130 and ended.cursor and ended.screen[-1] == "pipedock train: interrupted"
    assert ">interrupted</span>" in report


def test_a_finished_run_names_its_report(tmp_path):
    ended, report = trained_in_a_terminal(tmp_path, "pass")
    screen = "".join(ended.screen)
    assert ended.code == 0 and ended.cursor and "report: %s" % (tmp_path / "out" / "report.html") in screen
    assert "400 steps, loss 3.0000 -> 2.0000" in screen and ">finished</span>" in report


def test_a_run_stopped_by_a_signal_is_not_called_failed(tmp_path):
    ended, report = trained_in_a_terminal(tmp_path, "raise Stopped('stopped by SIGTERM after saving step 12')")
    assert ended.code == 1 and ">stopped</span>" in report
