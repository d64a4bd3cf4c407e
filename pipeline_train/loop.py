"""The training loop of one rank. Every rank runs it in step with the others; rank 0 writes metrics and progress."""

import contextlib
import json
import resource
import sys
import time
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple

import torch
import torch.distributed as dist

from . import checkpoint, masters, plan, trace
from .data.feed import Feed, StepRows
from .engine import MicroBatch, Pipeline, StepResult
from .errors import RunFailed
from .instructions import NotFinite
from .loss_scale import OverflowLimit
from .metrics import Metrics, evaluated
from .optimizer import learning_rate
from .plan.cards import peak_flops
from .window import Window

Report = Callable[[Dict[str, Any]], None]  # a progress message, on its way to the terminal


def micro_batches(rows: StepRows, micro: int, replica: int, replicas: int) -> Iterator[MicroBatch]:
    """This replica's micro-batches of a step. Both pipeline ends call it with the same rows, so labels belong to inputs."""
    each = len(rows.ids) // replicas
    for first in range(replica * each, (replica + 1) * each, micro):
        ids, positions, segments, targets = (
            torch.from_numpy(part[first : first + micro]) for part in (rows.ids, rows.positions, rows.segments, rows.targets)
        )
        yield (ids, positions, segments), targets


def peak_memory(cuda: bool) -> float:
    """GiB this process has needed at most: device memory on a GPU, resident memory on a CPU."""
    if cuda:
        return torch.cuda.max_memory_allocated() / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: bytes there, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def against_plan(out: Path, measured: List[float]) -> Dict[str, List[float]]:
    """Fields of a line of kind "memory": GiB per stage, ``measured`` and as prepare has planned them."""
    planned = json.loads((out / "resolved" / "plan.json").read_text(encoding="utf-8"))["gib"]
    return {"mem_gib": [round(m, 4) for m in measured], "planned_gib": [stage["total"] for stage in planned]}


class Loop:
    """``run`` trains from step ``done`` to ``total``; ``metrics`` and ``report`` are None on every rank but 0.

    ``facts`` describes the data and goes into every checkpoint, so that a resume can tell whether it is still the same. ``phases``:
    worker.Phases of the start-up so far.
    """

    def __init__(
        self,
        pipe: Pipeline,
        out: Path,
        feed: Feed,
        eval_feed: Optional[Feed],
        total: int,
        facts: Dict[str, Any],
        metrics: Optional[Metrics],
        report: Optional[Report],
        phases: Any,
    ) -> None:
        self.pipe, self.config, self.out = pipe, pipe.config, out
        self.feed, self.eval_feed, self.total = feed, eval_feed, total
        self.metrics, self.report, self.phases = metrics, report, phases
        self.memory: List[float] = []
        self.losses: List[float] = []
        self.tokens = self.saves = 0  # trained on; of the saves that were wished for, made
        self.limit = OverflowLimit(self.config.optim.loss_scale)
        self.first: Optional[Tuple[int, float]] = None  # step that this start has done, and when
        self.pulse = pipe.watched.pulse
        self.saver = checkpoint.Saver(pipe, out, facts)

    def run(self, done: int) -> Dict[str, Any]:
        """-> the summary that ends the run (rank 0's; the same numbers on every rank), after a stop that was wished for too; its
        losses are None where ``done`` is all. Raises RunFailed on a loss or gradient that is no number, on every rank at once."""
        began = time.perf_counter()
        missing = self._evaluation_missing(done)
        self._write("start", step=done, total_steps=self.total)
        if missing and self.eval_feed is not None:
            self._evaluate(done, self.eval_feed)
            self.phases.end("evaluation")
        window = Window()
        for step in range(done, self.total):
            self.pulse.tick("reading the step's rows")
            rows = self.feed.at(step)
            self.pulse.tick("starting a step")
            rate = learning_rate(self.config.optim, step, self.total)
            number = step + 1
            traced = self.config.run.trace and number == min(done + trace.STEP, self.total)
            if traced:
                self.pipe.watched.begin_trace()
            try:
                result = self._step(number, rows, rate)
            except RunFailed:  # on every rank at once
                self._saved(self.saver.finish())
                raise
            self.pulse.step_done(number)
            if traced:
                self._keep_trace(number)
            if number == done + 1:
                self.phases.end("first_step")
                self._write("startup", step=number, seconds=self.phases.seconds)
                self._compare_memory(number)
            stop, saves = self.pipe.watched.agreed
            stop = stop and number < self.total
            window.add(result, rows)
            self.losses.append(result.loss)
            self.tokens += rows.tokens
            line = None
            if number % self.config.train.log_every == 0 or number == self.total or stop:
                line = self._log(number, window, result.grad_norm, rate, rows.epoch)
                window = Window()
            self._show(number, result.loss, rows, line)
            started = time.perf_counter()
            if stop or saves > self.saves or self._due(number, self.config.train.save_every):
                self.pulse.tick("saving")
                self.saver.save(number)
            self._saved(self.saver.finish() if stop or number == self.total else self.saver.poll())
            self.saves = saves
            if stop:
                return dict(self._summary(number, time.perf_counter() - began), stopped=True)
            if self.eval_feed is not None and self._due(number, self.config.train.eval_every):
                self._evaluate(number, self.eval_feed)
            window.start += time.perf_counter() - started  # saving and evaluating are not the step's time
        return self._summary(self.total, time.perf_counter() - began)

    def _keep_trace(self, number: int) -> None:
        """Where it cannot be written, the run goes on without."""
        spans = self.pipe.watched.end_trace(self.pipe.pipe_rank, self.pipe.data_rank)
        if self.metrics is not None:
            with contextlib.suppress(OSError):
                trace.write(self.out / trace.NAME, number, spans)

    def _step(self, number: int, rows: StepRows, rate: float) -> StepResult:
        """One step, with nonsense named by its samples."""
        try:
            result = self.pipe.train(self._mine(rows), rows.learnt_tokens, rate)
        except NotFinite as error:
            broken, samples = masters.not_finite(self.pipe), self._samples(rows)
            advice = "These weights hold NaN or Inf: %s" % broken if broken else "Lower optim.lr, or look at these records"
            raise RunFailed("step %d: %s; stopped before the step, the weights are as they were. Its samples: %s. %s"
                            % (number, error, samples, advice)) from None  # fmt: skip
        if result.scale is not None:
            self.limit.after(number, result.skipped, result.scale, self._samples(rows) if result.skipped else "")
        return result

    def _samples(self, rows: StepRows) -> str:
        places = [self.feed.where(sample) for sample in rows.samples[:10]]
        return ", ".join(places) + (", ... (%d more)" % (len(rows.samples) - 10) if len(rows.samples) > 10 else "")

    def _due(self, number: int, every: Optional[int]) -> bool:
        return number == self.total or (every is not None and number % every == 0)

    def _evaluation_missing(self, done: int) -> bool:
        """Whether an earlier start ended between the step ``done``, its save, and its evaluation. Rank 0 looks."""
        if self.eval_feed is None or done == 0 or not self._due(done, self.config.train.eval_every):
            return False
        missing = [self.metrics is not None and not evaluated(self.out / "metrics.jsonl", done)]
        dist.broadcast_object_list(missing, src=0)
        return missing[0]

    def _mine(self, rows: StepRows) -> Iterator[MicroBatch]:
        return micro_batches(rows, self.config.batch.micro, self.pipe.data_rank, self.config.parallel.data)

    def _write(self, kind: str, **fields: Any) -> None:
        if self.metrics is not None:
            self.metrics.write(kind, **fields)

    def _log(self, number: int, window: Window, grad_norm: Optional[float], rate: float, epoch: int) -> Dict[str, Any]:
        seconds = time.perf_counter() - window.start
        self.memory, busy, span = self._per_stage(peak_memory(self.pipe.cuda), window.busy, window.span)
        fields = {
            "step": number, "loss": window.loss / max(1, window.finite), "grad_norm": grad_norm, "lr": rate,
            "tokens": window.tokens, "learnt_tokens": window.learnt, "samples": window.samples,
            "tokens_per_s": window.tokens / seconds, "learnt_tokens_per_s": window.learnt / seconds,
            "step_s": seconds / window.steps, "stage_s": [round(s / window.steps, 6) for s in busy],
            "bubble": 1.0 - sum(busy) / len(busy) / max(span) if max(span) > 0 else None,
            "mem_gib": [round(m, 4) for m in self.memory], "mfu": self._mfu(window, seconds), "epoch": epoch,
        }  # fmt: skip
        if not window.finite:
            fields["loss"] = None
        scaler = self.pipe.loss_scaler
        if scaler is not None:
            fields.update(loss_scale=float(scaler.cur_scale), skipped=window.skipped)
        self._write("step", **fields)
        return fields

    def _per_stage(self, *mine: float) -> List[List[float]]:
        """For each of my numbers: the largest among each stage's replicas."""
        stages = torch.zeros(len(mine), self.config.parallel.pipe, device="cuda" if self.pipe.cuda else "cpu")
        stages[:, self.pipe.pipe_rank] = torch.tensor(mine)
        dist.all_reduce(stages, op=dist.ReduceOp.MAX)
        return [[float(number) for number in row] for row in stages]

    def _compare_memory(self, number: int) -> None:
        """What the first step has needed of each stage beside what the plan expects. A CPU's resident memory is something else."""
        if self.pipe.cuda:
            measured = self._per_stage(peak_memory(self.pipe.cuda))[0]
            self._write("memory", step=number, **against_plan(self.out, measured))

    def _mfu(self, window: Window, seconds: float) -> Optional[float]:
        """Model FLOPs per second over what the devices could do; None where that is not known."""
        peak = peak_flops(torch.cuda.get_device_name()) * self.config.world if self.pipe.cuda else 0.0
        return plan.step_flops(self.pipe.dims, window.tokens, window.pairs) / seconds / peak if peak else None

    def _show(self, number: int, loss: float, rows: StepRows, line: Optional[Dict[str, Any]]) -> None:
        if self.report is None:
            return
        now = time.perf_counter()
        first, since = self.first = self.first or (number, now)  # that step compiles: how long others take it does not tell
        left = (now - since) / (number - first) * (self.total - number) if number > first else None
        self.report({"step": number, "total": self.total, "loss": loss, "tokens": rows.tokens, "learnt_tokens": rows.learnt_tokens,
                     "epoch": rows.epoch, "eta_s": left, "line": line})  # fmt: skip

    def _saved(self, finished: List[Dict[str, Any]]) -> None:
        for fields in finished:
            self._write("save", **fields)

    def _evaluate(self, number: int, feed: Feed) -> None:
        """Mean loss over all learnt tokens of the evaluation data."""
        total, weight = 0.0, 0
        for step in range(feed.steps_per_epoch):
            rows = feed.at(step)
            total += self.pipe.evaluate(self._mine(rows), rows.learnt_tokens) * rows.learnt_tokens
            weight += rows.learnt_tokens
            self._saved(self.saver.poll())  # a checkpoint should not lie unfinished for as long as this takes
        self._write("eval", step=number, loss=total / max(1, weight), tokens=weight)

    def _summary(self, number: int, seconds: float) -> Dict[str, Any]:
        return {
            "steps": number, "loss_first": self.losses[0] if self.losses else None,
            "loss_last": self.losses[-1] if self.losses else None, "seconds": round(seconds, 3),
            "tokens": self.tokens, "peak_gib": [round(m, 4) for m in self.memory],
            "checkpoint": str(checkpoint.folder(self.out, number)),
        }  # fmt: skip
