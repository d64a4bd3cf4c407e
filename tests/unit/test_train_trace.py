"""A traced step: what is noted, how it is kept, what report.html makes of it."""

import json

import pytest

from pipeline_train import trace
from pipeline_train.instructions import Clock
from pipeline_train.report.curves import Curves
from pipeline_train.report.page import build
from pipeline_train.report.schedule import bound, schedule_section
from pipeline_train.trace import Span
from tests.run_folder import lines_of, make_run

# Two stages, two micro-batches; stage 1 is the slower one. Seconds.
SPANS = [
    Span(0, 0, "ForwardPass", 0, 1.0, 0.1), Span(0, 0, "ForwardPass", 1, 1.1, 0.1), Span(0, 0, "BackwardPass", 0, 1.7, 0.2),
    Span(0, 0, "RecvGrad", 0, 1.2, 0.5), Span(0, 0, "BackwardPass", 1, 2.3, 0.2), Span(0, 0, "OptimizerStep", 0, 2.5, 0.1),
    Span(1, 0, "ForwardPass", 0, 1.1, 0.2), Span(1, 0, "BackwardPass", 0, 1.3, 0.4), Span(1, 0, "ForwardPass", 1, 1.7, 0.2),
    Span(1, 0, "BackwardPass", 1, 1.9, 0.4), Span(1, 0, "OptimizerStep", 0, 2.3, 0.3),
    Span(0, 1, "ForwardPass", 0, 1.0, 9.0),
]  # fmt: skip


def test_a_clock_notes_instructions_only_when_asked(monkeypatch):
    clock, now = Clock(cuda=False), [0.0]
    monkeypatch.setattr(clock, "now", lambda: now[0])

    def instruction(name, seconds):
        start = clock.now()
        now[0] += seconds
        clock.note(name, start)

    instruction("ForwardPass", 1.0)
    clock.trace()
    instruction("ForwardPass", 2.0)
    instruction("SendActivation", 0.5)
    assert clock.traced() == [("ForwardPass", 0.0, 2.0), ("SendActivation", 2.0, 0.5)]
    instruction("BackwardPass", 4.0)
    assert clock.traced() == []
    assert clock.take()[0] == 7.0  # computing: forward, forward, backward


def test_what_is_written_is_chromes_format_and_reads_back(tmp_path):
    path = tmp_path / "trace.json"
    trace.write(path, 3, SPANS)
    step, spans = trace.read(path)
    assert step == 3 and [span[:4] for span in spans] == [span[:4] for span in SPANS]
    assert all(abs(a.start - b.start) + abs(a.seconds - b.seconds) < 1e-6 for a, b in zip(spans, SPANS))
    events = json.loads(path.read_text())["traceEvents"]
    assert {"name": "process_name", "ph": "M", "pid": 1, "args": {"name": "stage 1"}} in events
    whole = next(event for event in events if event["ph"] == "X")
    assert whole == {"name": "ForwardPass", "cat": "forward", "ph": "X", "pid": 0, "tid": 0, "ts": 1000000.0, "dur": 100000.0,
                     "args": {"micro_batch": 0}}  # fmt: skip
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("content", ["", "[]", "{", '{"traceEvents": [{"ph": "X"}], "otherData": {"step": 1}}', "[" * 5000])
def test_a_trace_that_cannot_be_read_is_none(tmp_path, content):
    path = tmp_path / "trace.json"
    path.write_text(content)
    assert trace.read(path) == trace.read(tmp_path / "nothing") == (0, [])
    assert schedule_section(tmp_path) == ""


def test_the_bound_is_one_micro_batch_through_all_and_the_slowest_for_the_others():
    assert bound([2.0, 3.0, 1.0], 4) == 6.0 + 3 * 3.0
    assert bound([2.0], 4) == 8.0


def test_the_picture_has_a_row_for_each_stage_and_says_how_good_it_is(tmp_path):
    out = make_run(tmp_path / "out", lines_of(3))
    trace.write(out / "trace.json", 3, SPANS)
    page = build(out, Curves(out / "metrics.jsonl").update())
    section = schedule_section(out)
    assert section in page
    assert [section.count('class="bar %s"' % css) for css in "abc"] == [4, 4, 2]  # the first replica's only
    assert ">stage 0<" in section and ">stage 1<" in section and "backward of micro-batch 2: 0.4 s" in section
    # from 1.0 to 2.5; a micro-batch takes 0.3 and 0.6: 0.3 + 0.6 + 0.6
    assert "Pipelined part: 1.5 s. 1F1B with these stages&#x27; own times needs 1.5 s: 100.0 % of it." in section
