"""The training loop of one rank. Every rank runs it in step with the others; rank 0 writes metrics and progress."""

import math
import resource
import sys
import time
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional

import torch
import torch.distributed as dist

from . import checkpoint, plan
from .data.feed import Feed, StepRows
from .engine import MicroBatch, Pipeline, StepResult, learning_rate
from .errors import RunFailed
from .metrics import Metrics, peak_flops

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


class Window:
    """Sums over the steps since the last logged line."""

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.steps = self.tokens = self.learnt = self.samples = self.pairs = self.skipped = 0
        self.loss = 0.0

    def add(self, loss: float, rows: StepRows, skipped: bool) -> None:
        self.steps += 1
        self.loss += loss
        self.tokens += rows.tokens
        self.learnt += rows.learnt_tokens
        self.samples += len(rows.samples)
        self.skipped += int(skipped)
        self.pairs += int((rows.positions + 1)[rows.segments > 0].sum())  # a token attends to its position + 1 keys


class Loop:
    """``run`` trains from step ``done`` to ``total``; ``metrics`` and ``report`` are None on every rank but 0.

    ``facts`` describes the data and goes into every checkpoint, so that a resume can tell whether it is still the same.
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
    ) -> None:
        self.pipe, self.config, self.out = pipe, pipe.config, out
        self.feed, self.eval_feed, self.total, self.facts = feed, eval_feed, total, facts
        self.metrics, self.report = metrics, report
        self.memory: List[float] = []
        self.losses: List[float] = []
        self.tokens = 0

    def run(self, done: int) -> Dict[str, Any]:
        """-> the summary that ends the run (rank 0's; the same numbers on every rank). Raises RunFailed on a loss that is
        not a number."""
        began, window = time.perf_counter(), Window()
        self._write("start", step=done, total_steps=self.total)
        for step in range(done, self.total):
            rows = self.feed.at(step)
            rate = learning_rate(self.config.optim, step, self.total)
            result = self.pipe.train(self._mine(rows), rows.learnt_tokens, rate)
            self._stop_on_nonsense(step, rows, result)
            window.add(result.loss, rows, result.skipped)
            self.losses.append(result.loss)
            self.tokens += rows.tokens
            number = step + 1
            if number % self.config.train.log_every == 0 or number == self.total:
                self._log(number, window, result.grad_norm, rate, rows.epoch)
                window = Window()
            self._show(number, result.loss, rows.tokens, began, done)
            started = time.perf_counter()
            if self._due(number, self.config.train.save_every):
                self._save(number)
            if self.eval_feed is not None and self._due(number, self.config.train.eval_every):
                self._evaluate(number)
            window.start += time.perf_counter() - started  # saving and evaluating are not the step's time
        return self._summary(time.perf_counter() - began)

    def _stop_on_nonsense(self, step: int, rows: StepRows, result: StepResult) -> None:
        """A loss or a gradient that is not a number ends the run, on every rank at once. With fp16 a gradient that is not
        is an overflow: the step was skipped and the loss scale lowered."""
        skipped = result.skipped and self.config.model.dtype != "fp16"
        if math.isfinite(result.loss) and not skipped:
            return
        what = "gradient is not a number" if skipped and math.isfinite(result.loss) else "loss is %s" % result.loss
        samples = _some([self.feed.where(sample) for sample in rows.samples])
        raise RunFailed("step %d: the %s, stopped before saving. Its samples: %s. Lower optim.lr, or look at these records"
                        % (step + 1, what, samples))  # fmt: skip

    def _due(self, number: int, every: Optional[int]) -> bool:
        return number == self.total or (every is not None and number % every == 0)

    def _mine(self, rows: StepRows) -> Iterator[MicroBatch]:
        return micro_batches(rows, self.config.batch.micro, self.pipe.data_rank, self.config.parallel.data)

    def _write(self, kind: str, **fields: Any) -> None:
        if self.metrics is not None:
            self.metrics.write(kind, **fields)

    def _log(self, number: int, window: Window, grad_norm: Optional[float], rate: float, epoch: int) -> None:
        seconds = time.perf_counter() - window.start
        self.memory = self._memory_per_stage()
        fields = {
            "step": number, "loss": window.loss / window.steps, "grad_norm": grad_norm, "lr": rate, "tokens": window.tokens,
            "learnt_tokens": window.learnt, "samples": window.samples, "tokens_per_s": window.tokens / seconds,
            "step_s": seconds / window.steps, "mem_gib": [round(m, 4) for m in self.memory],
            "mfu": self._mfu(window, seconds), "epoch": epoch,
        }  # fmt: skip
        scaler = self.pipe.loss_scaler
        if scaler is not None:
            fields.update(loss_scale=float(scaler.cur_scale), skipped=window.skipped)
        self._write("step", **fields)

    def _memory_per_stage(self) -> List[float]:
        device = "cuda" if self.pipe.cuda else "cpu"
        stages = torch.zeros(self.config.parallel.pipe, device=device)
        stages[self.pipe.pipe_rank] = peak_memory(self.pipe.cuda)
        dist.all_reduce(stages, op=dist.ReduceOp.MAX)
        return [float(gib) for gib in stages]

    def _mfu(self, window: Window, seconds: float) -> Optional[float]:
        """Model FLOPs per second over what the devices could do; None where that is not known."""
        peak = peak_flops(torch.cuda.get_device_name()) * self.config.world if self.pipe.cuda else 0.0
        return plan.step_flops(self.pipe.dims, window.tokens, window.pairs) / seconds / peak if peak else None

    def _show(self, number: int, loss: float, tokens: int, began: float, done: int) -> None:
        if self.report is not None:
            left = (time.perf_counter() - began) / (number - done) * (self.total - number)
            message = {"step": number, "total": self.total, "loss": loss, "tokens": tokens, "eta_s": left}
            self.report(message)

    def _save(self, number: int) -> None:
        started = time.perf_counter()
        path = checkpoint.save(self.pipe, self.out, number, self.facts)
        self._write("save", step=number, path=str(path.relative_to(self.out)), seconds=round(time.perf_counter() - started, 3))

    def _evaluate(self, number: int) -> None:
        """Mean loss over all learnt tokens of the evaluation data."""
        assert self.eval_feed is not None
        total, weight = 0.0, 0
        for step in range(self.eval_feed.steps_in_epoch(0)):
            rows = self.eval_feed.at(step)
            total += self.pipe.evaluate(self._mine(rows), rows.learnt_tokens) * rows.learnt_tokens
            weight += rows.learnt_tokens
        self._write("eval", step=number, loss=total / max(1, weight), tokens=weight)

    def _summary(self, seconds: float) -> Dict[str, Any]:
        return {
            "steps": self.total, "loss_first": self.losses[0], "loss_last": self.losses[-1], "seconds": round(seconds, 3),
            "tokens": self.tokens, "peak_gib": [round(m, 4) for m in self.memory],
            "checkpoint": str(checkpoint.folder(self.out, self.total)),
        }  # fmt: skip


def _some(places: List[str]) -> str:
    return ", ".join(places[:10]) + (", ... (%d more)" % (len(places) - 10) if len(places) > 10 else "")
