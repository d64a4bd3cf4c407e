"""Checkpoints keyed by layer and parameter name, so that a run resumes at any stage count and data-parallel size.

    <out>/checkpoints/step_000400/   layer_XXX.safetensors  fp32 master weights, keys = slot names
                                     optim_XXX.safetensors  "<slot>::exp_avg", "<slot>::exp_avg_sq" (Lion: exp_avg only)
                                     config.json, tokenizer ...   a copy of <out>/resolved/model
                                     manifest.json                written last
    <out>/checkpoints/latest         the name of the newest one

A folder named step_* is whole, whenever the power went (see checkpoint_folder). A layer's files are written by the replica
number layer % replicas (see masters).
"""

import functools
import logging
import os
import socket
import threading
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Dict, Iterable, List, Optional, Tuple

import torch
import torch.distributed as dist

from . import checkpoint_folder, compat, host, manifest, masters
from .checkpoint_folder import folder
from .errors import RunFailed
from .masters import load, named, settle_ties, start
from .weights.writing import write_file

if TYPE_CHECKING:
    from .engine import Pipeline

__all__ = ["Saver", "folder", "load", "named", "settle_ties", "start"]
log = logging.getLogger("pipedock")
WAIT_S = 0.2  # between two looks at a thread that training waits for
File = Tuple[str, Dict[str, torch.Tensor]]  # name, tensors


class Job:
    """``work`` in a thread of its own. Then ``result``, or ``problem``: why there is none."""

    def __init__(self, work: Callable[[], Any]) -> None:
        self.result, self.problem, self.ended = None, "", 0.0
        self.thread = threading.Thread(target=self._run, args=(work,), name="checkpoint", daemon=True)
        self.thread.start()

    def _run(self, work: Callable[[], Any]) -> None:
        try:
            self.result = work()
        except Exception as error:  # noqa: BLE001 - the thread's boundary: the main thread raises it, on every rank
            self.problem = str(error) or type(error).__name__
            if not isinstance(error, RunFailed):
                traceback.print_exc()
        self.ended = time.perf_counter()

    @property
    def done(self) -> bool:
        return not self.thread.is_alive()


class Save:
    """One save under way: ``writing`` on every rank, then ``completing`` on rank 0 (the others have nothing to do)."""

    def __init__(self, final: Path, document: Dict[str, Any], behind: bool) -> None:
        self.final, self.document, self.behind = final, document, behind
        self.began, self.stall = time.perf_counter(), 0.0
        self.writing: Optional[Job] = None
        self.completing: Optional[Job] = None


class Saver:
    """Writes the checkpoints of a run. All ranks call every method together, from their main thread.

    ``facts`` says what the data was (see prepare). With train.async_save the weights are copied to the host's memory and
    written by a thread behind the next steps, if twice that much memory is free on every machine; else training waits.
    Raises RunFailed, on every rank with the first one's reason, when a file cannot be written; the folder aside is removed.
    """

    def __init__(self, pipe: "Pipeline", out: Path, facts: Dict[str, Any]) -> None:
        self.pipe, self.out, self.facts, self.rank = pipe, out, facts, dist.get_rank()
        self.pulse = pipe.watched.pulse  # signs of life for the launcher
        here = socket.gethostname()
        values = sum(p.numel() for layer in pipe.stage.layers if masters.writes(pipe, layer) for p in named(pipe, layer).values())
        copied = 4 * values * (1 + len(pipe.moments))  # bytes of this rank's files
        everyone = _gather((here, copied, len(pipe.stage.layers)))
        self.copied_here = sum(copied for name, copied, _ in everyone if name == here)
        self.most_layers = max(layers for _, _, layers in everyone)
        self.needed = checkpoint_folder.nbytes(pipe.dims, pipe.config.optim.type)
        self.under_way: Optional[Save] = None
        self.finished: List[Dict[str, Any]] = []
        self.last: Optional[int] = None

    def save(self, step: int) -> None:
        """Save the state after ``step`` steps; nothing when that was the last save's step too. Waits for a save under way."""
        if step == self.last:
            return
        self._go_on(wait=True)
        began, final = time.perf_counter(), folder(self.out, step)
        behind = self._prepare(final)
        settle_ties(self.pipe)
        save = self.under_way = Save(final, self._document(step), behind)
        for layers in self._rounds(behind):
            files = list(masters.files(self.pipe, layers))
            if save.writing is not None:  # the round before, while this one's were read
                self._all_done(save.writing, wait=True)
                self._collect(save)
            save.writing = Job(functools.partial(_write, checkpoint_folder.aside_of(final), files, self.pulse.still))
            del files  # the thread lets go of each one when it is written
        self.last, save.began, save.stall = step, began, time.perf_counter() - began
        self._go_on(wait=not behind)

    def poll(self) -> List[Dict[str, Any]]:
        """The saves completed since the last call: step, path (in the run's folder), seconds until it was on disk, stall_s that
        training waited for it, asynchronous. Call it once per step: here a save under way goes on."""
        self._go_on(wait=False)
        finished, self.finished = self.finished, []
        return finished

    def finish(self) -> List[Dict[str, Any]]:
        """``poll`` that waits for the save under way. Before the run ends."""
        self._go_on(wait=True)
        return self.poll()

    def _prepare(self, final: Path) -> bool:
        """Make the folder aside; -> whether to write behind the next steps."""
        problem = ""
        if self.rank == 0:
            try:
                checkpoint_folder.begin(final, self.needed)
            except RunFailed as error:
                problem = str(error)
        free = host.available_memory()
        fits = free is not None and free >= 2 * self.copied_here
        if self.pipe.config.train.async_save and not fits:
            log.warning("train.async_save: %s of host memory are not free twice: training waits for this save",
                        host.size(self.copied_here))  # fmt: skip
        everyone = _gather((problem, fits))
        _raise_first(problem for problem, _ in everyone)
        return bool(self.pipe.config.train.async_save and all(fits for _, fits in everyone))

    def _rounds(self, behind: bool) -> List[List[int]]:
        """The layers to read, then write. Behind the next steps: all at once. Else as many as there are replicas, so that each
        of them writes one; every rank makes the same number of rounds."""
        mine, step = list(self.pipe.stage.layers), self.pipe.config.parallel.data
        return [mine] if behind else [mine[n : n + step] for n in range(0, self.most_layers, step)]

    def _go_on(self, wait: bool) -> None:
        """Take the save under way as far as it has come; with ``wait`` to its end."""
        save = self.under_way
        if save is None:
            return
        began = time.perf_counter()
        if save.completing is None and self._all_done(save.writing, wait):
            self._collect(save)
            save.completing = Job(functools.partial(self._complete, save) if self.rank == 0 else _nothing)
        if save.completing is not None and self._all_done(save.completing, wait):
            self._results(save, save.completing)
            self.under_way = None
            self.finished.append({
                "step": save.document["step"], "path": os.path.relpath(str(save.final), str(self.out)),
                "seconds": round(save.completing.ended - save.began, 3),
                "stall_s": round(save.stall + time.perf_counter() - began, 3), "asynchronous": save.behind,
            })  # fmt: skip
        save.stall += time.perf_counter() - began

    def _all_done(self, job: Optional[Job], wait: bool) -> bool:
        """Whether the job is done on every rank; with ``wait`` it is."""
        assert job is not None
        if wait:
            self.pulse.tick("saving")  # from here on only the writers' own signs count: a disk that hangs must be found
        while True:
            done = torch.tensor([int(job.done)], device="cuda" if self.pipe.cuda else "cpu")
            dist.all_reduce(done, op=dist.ReduceOp.MIN)
            if done.item() or not wait:
                return bool(done.item())
            job.thread.join(WAIT_S)

    def _collect(self, save: Save) -> None:
        """What all ranks have written goes into the manifest."""
        assert save.writing is not None
        for entries in self._results(save, save.writing):
            save.document["files"].update(entries)

    def _results(self, save: Save, job: Job) -> List[Any]:
        """Every rank's result. Raises RunFailed on every rank if one has a problem."""
        everyone = _gather((job.problem, job.result))
        if self.rank == 0 and any(problem for problem, _ in everyone):
            checkpoint_folder.abandon(save.final)
        _raise_first(problem for problem, _ in everyone)
        return [result for _, result in everyone]

    def _document(self, step: int) -> Dict[str, Any]:
        """The manifest but for its files. As it is now: the next steps count on."""
        config, dims = self.pipe.config, self.pipe.dims
        steps = max(_gather(masters.optimizer_steps(self.pipe)))
        return {
            "format": manifest.FORMAT, "kind": "checkpoint", "family": dims.family, "tied": dims.tied, "layers": dims.layers,
            "step": step, "run_name": config.run.name, "run_dtype": config.model.dtype, "layer_dtype": "fp32", "files": {},
            "versions": compat.versions(),
            "training": {
                "optimizer": config.optim.type, "optimizer_steps": steps, "feed": self.facts,
                "loss_scaler": masters.scaler_state(self.pipe),
            },
        }  # fmt: skip

    def _complete(self, save: Save) -> None:
        try:
            checkpoint_folder.complete(save.final, save.document, self.out / "resolved" / "model")
        except OSError as error:
            raise checkpoint_folder.unwritable(save.final, save.final.parent, error) from None
        checkpoint_folder.prune(save.final, self.pipe.config.train.keep)


def _gather(value: Any) -> List[Any]:
    """Every rank's value, by rank."""
    everyone = [None] * dist.get_world_size()  # type: List[Any]
    dist.all_gather_object(everyone, value)
    return everyone


def _raise_first(problems: Iterable[str]) -> None:
    for problem in problems:
        if problem:
            raise RunFailed(problem)


def _nothing() -> None:
    pass


def _write(aside: Path, files: List[File], written: Callable[[], None]) -> Dict[str, Any]:
    """-> their entries in the manifest; ``files`` is empty then. ``written`` is called after each. Raises RunFailed."""
    entries = {}
    files.reverse()
    while files:
        name, tensors = files.pop()
        try:
            entries[name] = write_file(aside / name, tensors)
            written()
        except OSError as error:
            raise checkpoint_folder.unwritable(aside / name, aside.parent, error) from None
    return entries
