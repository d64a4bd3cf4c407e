"""Checkpoints keyed by layer and parameter name, so that a run resumes at any stage count and data-parallel size.

    <out>/checkpoints/step_000400/   layer_XXX.safetensors  fp32 master weights, keys = slot names
                                     optim_XXX.safetensors  "<slot>::exp_avg", "<slot>::exp_avg_sq" (Lion: exp_avg only)
                                     config.json, tokenizer ...   a copy of <out>/resolved/model
                                     manifest.json                written last
    <out>/checkpoints/latest         the name of the newest one

A folder named step_* is whole, whenever the power went (see checkpoint_folder). A layer's files are written by the replica
number layer % replicas (see masters). Where nodes share no disk, every node has such folders, with the files that its own ranks
wrote; a stage's files are then on every node that has a replica of it, so that a resume at the same layout finds all it needs.
"""

import functools
import logging
import os
import socket
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Dict, List, Optional, Tuple

import torch
import torch.distributed as dist

from . import checkpoint_folder, compat, host, manifest, masters
from .checkpoint_folder import folder
from .checkpoint_job import Finish, Job, Parts, Save
from .errors import RunFailed
from .masters import load, named, settle_ties, start
from .place import Place
from .weights.writing import write_file

if TYPE_CHECKING:
    from .engine import Pipeline

__all__ = ["Saver", "folder", "load", "named", "settle_ties", "start"]
log = logging.getLogger("pipedock")
WAIT_S = 0.2  # between two looks at a thread that training waits for
File = Tuple[str, Dict[str, torch.Tensor]]  # name, tensors


class Saver:
    """Writes the checkpoints of a run. All ranks call every method together, from their main thread.

    ``facts`` says what the data was (see prepare). With train.async_save the weights are copied to the host's memory and
    written by a thread behind the next steps, if twice that much memory is free on every machine; else training waits.
    Raises RunFailed, on every rank with the first one's reason, when a file cannot be written; the folders aside are removed.
    """

    def __init__(self, pipe: "Pipeline", out: Path, facts: Dict[str, Any]) -> None:
        self.pipe, self.out, self.facts, self.rank = pipe, out, facts, dist.get_rank()
        self.pulse = pipe.watched.pulse  # signs of life for the launcher
        self.parts = Parts(Place.inherited(), self.rank)
        self.among = masters.writers(pipe, self.parts.ranks)
        here, mine = socket.gethostname(), list(pipe.stage.layers)
        values = sum(p.numel() for layer in mine if masters.writes(pipe, layer, self.among) for p in named(pipe, layer).values())
        copied = 4 * values * (1 + len(pipe.moments))  # bytes of this rank's files
        everyone = _gather((here, copied, mine, len(self.among)))
        self.copied_here = sum(copied for name, copied, _, _ in everyone if name == here)
        self.most_layers = max(len(layers) for _, _, layers, _ in everyone)
        self.at_once = min(writers for _, _, _, writers in everyone)
        kept = None if self.parts.ranks is None else {layer for rank in self.parts.ranks for layer in everyone[rank][2]}
        self.needed = checkpoint_folder.nbytes(pipe.dims, pipe.config.optim.type, kept)
        self.beside = out / "resolved" / "model"  # copied into every checkpoint
        self.under_way: Optional[Save] = None
        self.finished: List[Dict[str, Any]] = []
        self.last: Optional[int] = None
        if self.parts.scattered:
            self._compare_beside()

    def save(self, step: int) -> None:
        """Save the state after ``step`` steps; nothing when that was the last save's step too. Waits for a save under way."""
        if step == self.last:
            return
        self._go_on(wait=True)
        began, final = time.perf_counter(), folder(self.out, step)
        behind = self._prepare(final)
        settle_ties(self.pipe)
        finish = Finish(self.parts, self.beside, self.pipe.config.train.keep)
        save = self.under_way = Save(final, self._document(step), behind, finish.steps())
        for layers in self._rounds(behind):
            files = list(masters.files(self.pipe, layers, self.among))
            if save.job is not None:  # the round before, while this one's were read
                self._all_done(save.job, wait=True)
                self._collect(save)
            save.job = Job(functools.partial(_write, checkpoint_folder.aside_of(final), files, self.pulse.still))
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
        if self.parts.leads:
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
        problems = [problem for problem, _ in everyone]
        if any(problems) and self.parts.leads:
            checkpoint_folder.abandon(final)
        self.parts.check(problems)
        return bool(self.pipe.config.train.async_save and all(fits for _, fits in everyone))

    def _rounds(self, behind: bool) -> List[List[int]]:
        """The layers to read, then write. Behind the next steps: all at once. Else as many as there are replicas (of those that
        write into one folder, the fewest), so that each of them writes one; every rank makes the same number of rounds."""
        mine, step = list(self.pipe.stage.layers), self.at_once
        return [mine] if behind else [mine[n : n + step] for n in range(0, self.most_layers, step)]

    def _go_on(self, wait: bool) -> None:
        """Take the save under way as far as it has come; with ``wait`` to its end."""
        save = self.under_way
        if save is None:
            return
        began = time.perf_counter()
        while self._all_done(save.job, wait):
            self._collect(save)
            if save.left:
                work = save.left.pop(0)
                save.job = Job(functools.partial(work, save) if self.parts.leads else _nothing)
                continue
            assert save.job is not None
            self.under_way = None
            self.finished.append({
                "step": save.document["step"], "path": os.path.relpath(str(save.final), str(self.out)),
                "seconds": round(save.job.ended - save.began, 3),
                "stall_s": round(save.stall + time.perf_counter() - began, 3), "asynchronous": save.behind,
            })  # fmt: skip
            break
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
        """What the ranks have written goes into the manifest. Raises RunFailed on every rank if one has a problem; nothing that
        looks whole is left then."""
        assert save.job is not None
        everyone = _gather((save.job.problem, save.job.result or {}))
        try:
            self.parts.check([problem for problem, _ in everyone])
            self.parts.add(save.document["files"], save.where, [entries for _, entries in everyone], save.final)
        except RunFailed:
            if self.parts.leads:
                save.undo(save.final)
            raise

    def _document(self, step: int) -> Dict[str, Any]:
        """The manifest but for its files, rank 0's on every rank. As it is now: the next steps count on."""
        config, dims = self.pipe.config, self.pipe.dims
        document = {
            "format": manifest.FORMAT, "kind": "checkpoint", "family": dims.family, "tied": dims.tied, "layers": dims.layers,
            "step": step, "run_name": config.run.name, "run_dtype": config.model.dtype, "layer_dtype": "fp32", "files": {},
            "versions": compat.versions(),
            "training": {
                "optimizer": config.optim.type, "feed": self.facts, "loss_scaler": masters.scaler_state(self.pipe),
            },
        }  # type: Dict[str, Any]  # fmt: skip
        everyone = _gather((masters.optimizer_steps(self.pipe), document))
        document = everyone[0][1]
        document["training"]["optimizer_steps"] = max(steps for steps, _ in everyone)
        return document

    def _compare_beside(self) -> None:
        """What every checkpoint has a copy of must be the same on every node. Raises RunFailed, before the work."""
        entries = None
        if self.parts.leads:
            entries = {path.name: manifest.file_entry(path) for path in sorted(self.beside.iterdir()) if path.is_file()}
        self.parts.compare(_gather(entries), self.beside)


def _gather(value: Any) -> List[Any]:
    """Every rank's value, by rank."""
    everyone = [None] * dist.get_world_size()  # type: List[Any]
    dist.all_gather_object(everyone, value)
    return everyone


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
