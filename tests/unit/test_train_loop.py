"""The loop's own decisions, without a pipeline. What it trains is tested in tests/integration."""

import json
from types import SimpleNamespace

import numpy as np

from pipeline_train import config, loop, window, worker
from pipeline_train.engine import StepResult


def made(tmp_path, cuda, written):
    """A loop of two stages whose measured memory is 10.12345 and 9 GiB."""
    found = loop.Loop.__new__(loop.Loop)
    found.pipe, found.out = SimpleNamespace(cuda=cuda), tmp_path
    found._per_stage = lambda *mine: [[10.12345, 9.0]]
    found.metrics = SimpleNamespace(write=lambda kind, **fields: written.append(dict(fields, kind=kind)))
    (tmp_path / "resolved").mkdir()
    (tmp_path / "resolved" / "plan.json").write_text(json.dumps({"gib": [{"total": 11.0}, {"total": 8.5}]}))
    return found


def test_on_gpus_the_first_step_s_memory_is_written_beside_the_plan_s(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "peak_memory", lambda cuda: 10.12345)
    written = []
    made(tmp_path, True, written)._compare_memory(1)
    assert written == [{"kind": "memory", "step": 1, "mem_gib": [10.1235, 9.0], "planned_gib": [11.0, 8.5]}]


def test_on_a_cpu_the_plan_s_memory_is_another_thing(tmp_path):
    written = []
    made(tmp_path, False, written)._compare_memory(1)
    assert written == []


def test_the_time_left_is_told_by_the_steps_behind_the_first(tmp_path, monkeypatch):
    """The first one of a start compiles, or at least warms up."""
    now, told = [100.0], []
    monkeypatch.setattr(loop.time, "perf_counter", lambda: now[0])
    found = made(tmp_path, False, [])
    found.report, found.total, found.first = told.append, 10, None
    for number, seconds in ((5, 60.0), (6, 2.0), (7, 4.0)):
        now[0] += seconds
        found._show(number, 1.0, SimpleNamespace(tokens=1, learnt_tokens=1, epoch=0), None)
    assert [one["eta_s"] for one in told] == [None, 2.0 * 4, 3.0 * 3]


def test_an_evaluation_made_up_for_is_not_the_next_step_s_time(tmp_path, monkeypatch):
    now, written = [100.0], []
    monkeypatch.setattr(loop.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(window.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(loop.dist, "broadcast_object_list", lambda values, src: None)
    found = made(tmp_path, False, written)
    found.config = config.parse({
        "run": {"out": "o"}, "model": {"path": "m"}, "data": {"train": "t", "eval": "e"}, "parallel": {"pipe": 1},
        "train": {"log_every": 1, "eval_every": 2},
    })  # fmt: skip

    def takes(seconds, result):
        def call(*how):
            now[0] += seconds
            return result

        return call

    step = StepResult(1.0, 1.0, False, 1.0, 1.0, None)
    found.pipe = SimpleNamespace(cuda=False, loss_scaler=None, evaluate=takes(3600.0, 2.0), train=takes(2.0, step),
                                 watched=SimpleNamespace(agreed=(False, 0)))  # fmt: skip
    rows = SimpleNamespace(tokens=8, learnt_tokens=8, samples=[0], epoch=0, positions=np.arange(8), segments=np.ones(8, int))
    found.feed = found.eval_feed = SimpleNamespace(steps_per_epoch=1, at=lambda step: rows)
    found.total, found.tokens, found.saves, found.losses, found.first, found.report = 4, 0, 0, [], None, None
    found._mine, found._mfu, found._per_stage = lambda rows: iter(()), lambda *how: None, lambda *mine: [[1.0]] * 3
    found.pulse = SimpleNamespace(tick=lambda what: None, step_done=lambda number: None)
    found.saver = SimpleNamespace(poll=lambda: [], finish=lambda: [], save=lambda number: None)
    found.phases = worker.Phases(lambda: now[0])
    found.run(2)
    kinds = [line["kind"] for line in written]
    assert kinds == ["start", "eval", "startup", "step", "step", "eval"]
    assert [line["step_s"] for line in written if line["kind"] == "step"] == [2.0, 2.0]
    assert written[2]["seconds"] == {"evaluation": 3600.0, "first_step": 2.0}


def test_a_checkpoint_goes_on_while_the_run_is_evaluated(tmp_path):
    """An hour's evaluation behind a save: it must not lie unfinished until the next step's end."""
    written, left = [], [[], [{"step": 8, "path": "checkpoints/step_000008"}], []]
    found = made(tmp_path, False, written)
    found.pipe.evaluate = lambda batches, tokens: 2.0
    feed = SimpleNamespace(steps_per_epoch=3, at=lambda step: SimpleNamespace(learnt_tokens=step + 1))
    found._mine = lambda rows: iter(())
    found.saver = SimpleNamespace(poll=lambda: left.pop(0))
    found._evaluate(8, feed)
    assert written == [{"kind": "save", "step": 8, "path": "checkpoints/step_000008"},
                       {"kind": "eval", "step": 8, "loss": 2.0, "tokens": 6}]  # fmt: skip
