"""Checkpoints keyed by layer and parameter name, so that a run resumes at any stage count and data-parallel size.

    <out>/checkpoints/step_000400/   layer_XXX.safetensors  fp32 master weights, keys = slot names
                                     optim_XXX.safetensors  "<slot>::exp_avg", "<slot>::exp_avg_sq" (Lion: exp_avg only)
                                     config.json, tokenizer ...   a copy of <out>/resolved/model
                                     manifest.json                written last
    <out>/checkpoints/latest         the name of the newest one

Written under .tmp-step_000400, fsynced, renamed: a folder named step_* is whole, whenever the power went. With ZeRO-1 each
replica holds a piece of every master weight; Pipeline.read_whole puts them together.
"""

import logging
import os
import shutil
from pathlib import Path
from typing import Any, Dict, Iterator, List, Tuple, Union

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from . import compat, manifest, run_folder
from .engine import Pipeline
from .errors import RunFailed, UserError
from .models import build_layer, init_layer
from .weights import open_source

log = logging.getLogger("pipedock")
SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")  # what the loss scaler remembers


def folder(out: Path, step: int) -> Path:
    return out / "checkpoints" / ("step_%06d" % step)


def named(pipe: Pipeline, layer: int) -> Dict[str, torch.nn.Parameter]:
    """Slot name -> parameter of a layer of this rank; a shared tied weight appears in both layers."""
    return dict(pipe.stage.layers[layer].named_parameters())


def start(pipe: Pipeline) -> None:
    """Fill this rank's layers from model.path, or from scratch when model.init is random. Only its own layers are read."""
    config = pipe.config
    source = open_source(config.model.path) if config.model.init == "pretrained" else None
    for layer in pipe.stage.layers:
        if source is not None:
            values = source.layer(layer)
        else:
            fresh = build_layer(pipe.dims, layer)
            init_layer(fresh, pipe.dims, layer, config.run.seed)
            values = fresh.state_dict()
        for name, parameter in named(pipe, layer).items():
            pipe.write_whole(parameter, values[name])
    pipe.set_steps(0)


def load(pipe: Pipeline, path: Path) -> int:
    """Fill weights, moments, step counters and loss scaler from a checkpoint; -> the number of steps it has done."""
    document = manifest.read(path)
    state = document["training"]
    pipe.set_steps(state["optimizer_steps"])
    for layer in pipe.stage.layers:
        parameters = named(pipe, layer)
        with safe_open(str(path / manifest.layer_file(layer)), framework="pt") as file:
            for name, parameter in parameters.items():
                pipe.write_whole(parameter, file.get_tensor(name))
        with safe_open(str(path / manifest.optim_file(layer)), framework="pt") as file:
            for name, parameter in parameters.items():
                for moment in pipe.moments:
                    pipe.write_whole(parameter, file.get_tensor("%s::%s" % (name, moment)), moment)
    if pipe.loss_scaler is not None:
        for key, value in state["loss_scaler"].items():
            setattr(pipe.loss_scaler, key, value)
    return int(document["step"])


def save(pipe: Pipeline, out: Path, step: int, feed: Dict[str, Any]) -> Path:
    """Write step_<step>, all ranks together; -> its folder. ``feed`` says what the data was (see prepare).

    Raises RunFailed, on every rank with the first one's reason, when a file cannot be written; the folder aside is removed."""
    final, rank = folder(out, step), dist.get_rank()
    aside = final.with_name(".tmp-" + final.name)
    if rank == 0:
        try:
            for left in final.parent.glob(".tmp-*"):
                shutil.rmtree(str(left))
            aside.mkdir(parents=True)
        except OSError as error:
            raise unwritable(aside, error) from None
    dist.barrier()
    settle_ties(pipe)
    files, problem = _write_layers(pipe, aside)
    everyone = [None] * dist.get_world_size()  # type: List[Any]
    dist.all_gather_object(everyone, (files, _optimizer_steps(pipe), problem))
    problems = [found for _, _, found in everyone if found]
    if problems:
        if rank == 0:
            shutil.rmtree(str(aside), ignore_errors=True)
        raise RunFailed(problems[0])
    if rank == 0:
        try:
            _complete(pipe, out, aside, final, _document(pipe, step, feed, everyone))
        except OSError as error:
            shutil.rmtree(str(aside), ignore_errors=True)
            raise unwritable(final, error) from None
        prune(final, pipe.config.train.keep)
    dist.barrier()
    return final


def _write_layers(pipe: Pipeline, aside: Path) -> Tuple[Dict[str, Any], str]:
    """-> (the manifest's entries of what this rank wrote, "" or why it could not go on). Reading needs all replicas, so a rank
    that cannot write still reads."""
    files, problem = {}, ""  # type: Dict[str, Any], str
    for layer in pipe.stage.layers:
        mine = layer % pipe.config.parallel.data == pipe.data_rank
        for name, tensors in _layer_tensors(pipe, layer):
            if mine and not problem:
                try:
                    files[name] = write(aside / name, tensors)
                except RunFailed as error:
                    problem = str(error)
    return files, problem


def settle_ties(pipe: Pipeline) -> None:
    """Give the head's copy the embedding's values where they differ.

    They do not differ with one or two replicas. With more, an all-reduce may add the replicas up in another order on the
    last stage than on the first, and a gradient then differs in its last bit."""
    stage = pipe.stage
    if stage.tied_weight is None:
        return
    mine = [pipe.read_whole(stage.tied_weight, moment) for moment in (None,) + pipe.moments]
    first = pipe.stage.topology().get_rank(pipe=0, data=pipe.data_rank)
    for moment, value in zip((None,) + pipe.moments, mine):
        theirs = value.clone().to(stage.tied_weight.device)
        dist.broadcast(theirs, src=first, group=stage.tied_group)
        off = int((theirs.cpu() != value).sum())
        if off:
            log.warning("tied copies: %d elements of %s differed and were made equal", off, moment or "the weight")
            pipe.write_whole(stage.tied_weight, theirs.cpu(), moment)


def _layer_tensors(pipe: Pipeline, layer: int) -> Iterator[Tuple[str, Dict[str, torch.Tensor]]]:
    parameters = named(pipe, layer)
    yield manifest.layer_file(layer), {name: pipe.read_whole(p) for name, p in parameters.items()}
    yield (
        manifest.optim_file(layer),
        {"%s::%s" % (name, moment): pipe.read_whole(p, moment) for name, p in parameters.items() for moment in pipe.moments},
    )


def write(path: Path, tensors: Dict[str, torch.Tensor]) -> Dict[str, Any]:
    """-> its entry in the manifest. Raises RunFailed."""
    try:
        save_file(tensors, str(path), metadata={"format": "pt"})
        _sync(path)
        return manifest.file_entry(path)
    except (OSError, SafetensorError) as error:  # a full disk is the latter
        raise unwritable(path, error) from None


def unwritable(path: Path, error: Union[OSError, SafetensorError]) -> RunFailed:
    reason = getattr(error, "strerror", None) or " ".join(str(error).split())
    return RunFailed("%s: cannot be written: %s. The last checkpoint is whole." % (path, reason))


def _optimizer_steps(pipe: Pipeline) -> int:
    state = pipe.base_optimizer.state[pipe.groups[0]["params"][0]]
    return int(state.get("step", 0))


def _document(pipe: Pipeline, step: int, feed: Dict[str, Any], everyone: List[Any]) -> Dict[str, Any]:
    config, scaler = pipe.config, pipe.loss_scaler
    files = {}  # type: Dict[str, Any]
    for part, _, _ in everyone:
        files.update(part)
    return {
        "format": manifest.FORMAT, "kind": "checkpoint", "family": pipe.dims.family, "tied": pipe.dims.tied,
        "layers": pipe.dims.layers, "step": step, "run_name": config.run.name, "run_dtype": config.model.dtype,
        "layer_dtype": "fp32", "files": files, "versions": compat.versions(),
        "training": {
            "optimizer": config.optim.type, "optimizer_steps": max(steps for _, steps, _ in everyone), "feed": feed,
            "loss_scaler": {key: getattr(scaler, key) for key in SCALER if hasattr(scaler, key)},
        },
    }  # fmt: skip


def _complete(pipe: Pipeline, out: Path, aside: Path, final: Path, document: Dict[str, Any]) -> None:
    for file in sorted((out / "resolved" / "model").iterdir()):
        if file.is_file():
            shutil.copyfile(str(file), str(aside / file.name))
            _sync(aside / file.name)
            document["files"][file.name] = manifest.file_entry(aside / file.name)
    manifest.write(aside, document)
    _sync(aside)
    if final.exists():
        shutil.rmtree(str(final))
    os.replace(str(aside), str(final))
    latest = final.parent / "latest"
    latest.with_name(".latest").write_text(final.name + "\n", encoding="utf-8")
    _sync(latest.with_name(".latest"))
    os.replace(str(latest.with_name(".latest")), str(latest))
    _sync(final.parent)


def prune(written: Path, keep: int) -> None:
    """Delete what the run will not go back to: checkpoints newer than the one just ``written`` (a resume passed them over, they
    are broken), older ones that are not whole, and all but the ``keep`` newest whole ones. Other names are not touched."""
    step, kept = run_folder.step_of(written), 1
    for found in run_folder.checkpoints(written.parent):
        if found == written:
            continue
        if run_folder.step_of(found) < step and kept < keep and _whole(found):
            kept += 1
            continue
        try:
            shutil.rmtree(str(found))
        except OSError as error:
            log.warning("%s: cannot be deleted: %s", found, error.strerror)


def _whole(found: Path) -> bool:
    try:
        manifest.read(found)
    except UserError:
        return False
    return True


def _sync(path: Path) -> None:
    """Data or directory entries on disk before anything that refers to them."""
    handle = os.open(str(path), os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
