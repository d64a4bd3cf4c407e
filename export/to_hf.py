"""Pipeline weights -> a Hugging Face folder that ``from_pretrained`` just loads, streamed one tensor at a time."""

import contextlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional

import torch

from pipeline_train import manifest
from pipeline_train.errors import RunFailed, UserError
from pipeline_train.families import Dims, ModelFamily
from pipeline_train.weights import Source, open_source, same_bits
from pipeline_train.weights.files import NAMES, TORCH_DTYPES
from pipeline_train.weights.writing import Item

from . import aside, bins, card, placed, sidecars, targets
from .from_hf import SHORT, main_dtype, versions
from .measure import Meter, Progress
from .shards import SHARD_SIZE, Shard, parse_size, plan, write_index
from .targets import Target
from .threads import in_turn

DTYPES = {short: name for name, short in SHORT.items()}  # "bf16" -> "BF16"


def to_hf(
    input: str,
    output: str,
    target: str = "hf",
    dtype: Optional[str] = None,
    shard_size: str = SHARD_SIZE,
    overwrite: bool = False,
    progress: Optional[Progress] = None,
) -> Dict[str, Any]:
    """Export a run, a checkpoint, a from-hf folder or a plain HF folder (or hub name).

    ``dtype``: "fp32" | "bf16" | "fp16"; None: a run's own dtype, rounded from its fp32 master weights, else each tensor's own.
    ``target``: the server that it is for, see ``targets``.
    Returns {"output", "target", "family", "tied", "dtype", "step", "shards", "notes", bytes, seconds, gb_per_s, peak_gib}.
    Raises UserError for what the user asked, RunFailed when a checkpoint's tied copies differ, fp16 overflows or writing fails.
    """
    wanted = targets.find(target)
    if dtype is not None and dtype not in DTYPES:
        raise UserError("--dtype %s: not one of those there are: %s" % (dtype, ", ".join(DTYPES)))
    limit = parse_size(shard_size)
    source = open_source(input)
    source.check()
    targets.check(wanted, source.dims)
    if source.manifest is None:
        source.check_tied()
        check_head(source, wanted)
    items = export_items(source, dtype, wanted)
    shards = plan(items, limit)
    meter = Meter(sum(item.nbytes for item in items), progress)
    about = about_of(source, wanted, items)
    with aside.output_folder(output, meter.total, overwrite, [str(source.folder)]) as folder, _checked(source, wanted) as check:
        _write(folder, shards, source, meter, check)
        if targets.needs_bins(wanted, source.family):
            for name, shard in bins.plan(shards):
                bins.write(folder / name, shard, lambda item: _pieces(source, item))
        notes = finish(folder, source, wanted, shards, Path(output).name)
    return dict(about, output=str(output), shards=len(shards), notes=notes, **meter.figures())


def finish(folder: Path, source: Source, target: Target, shards: List[Shard], name: str) -> List[str]:
    """Everything beside the weights of ``shards``, which are there; -> what the user should know. ``name``: the model's, where the
    run has none. Raises UserError, OSError."""
    items = [item for _, shard in shards for item in shard]
    write_index(folder, shards)
    if targets.needs_bins(target, source.family):
        bins.write_index(folder, bins.plan(shards))
    notes = targets.notes(target, source.family, sidecars.copy(source.folder, folder, target.merges))
    dims = targets.exported_dims(target, source.family, source.dims)
    sidecars.finish(folder, sidecars.export_config(source.config, source.family, dims, main_dtype(items)[0]))
    page = dict(about_of(source, target, items), format="pipedock-export/1", source=source.kind, versions=versions())
    card.write(folder, source, page, name)
    aside.write_marker(folder, page)
    return notes


def about_of(source: Source, target: Target, items: List[Item]) -> Dict[str, Any]:
    """What an export says about itself."""
    dtype = SHORT[main_dtype(items)[0]]
    return {
        "target": target.name, "family": source.family.name, "tied": source.dims.tied, "dtype": dtype, "step": step_of(source),
    }  # fmt: skip


@contextlib.contextmanager
def _checked(source: Source, target: Target) -> Iterator[Callable[[], None]]:
    """Read a folder with a manifest in threads of their own, while it is written: hashes, tied copies. What is wrong is raised by
    the function that is yielded, at the latest at the end, when the output has no name yet. Hashing takes as long as writing."""
    if source.manifest is None:
        yield lambda: None
        return

    files = source.manifest["files"]
    layers = [name for name in files if name.endswith(".safetensors")]
    rest = {name: entry for name, entry in files.items() if name not in layers}
    manifest.check_hashes(source.folder, dict(source.manifest, files=rest))

    def hashed(name: str) -> None:
        manifest.check_hashes(source.folder, dict(source.manifest or {}, files={name: files[name]}), optimizer=False)

    def ties() -> None:
        source.check_tied()
        check_head(source, target)

    with ThreadPoolExecutor(source.threads) as pool:
        jobs = [pool.submit(ties)] + [pool.submit(hashed, name) for name in layers]

        def check() -> None:
            for job in jobs:
                if job.done():
                    job.result()

        try:
            yield check
            for job in jobs:
                job.result()
        finally:
            for job in jobs:
                job.cancel()


def check_head(source: Source, target: Target) -> None:
    """Refuse an untied head of other values where the server would compute with the embedding instead."""
    if source.dims.tied or not targets.head_must_equal(target, source.family):
        return
    embedding, head = ((layer, slot.name) for hf in source.family.tied for layer, slot in source.slots() if slot.hf == hf)
    if not all(same_bits(a, b) for a, b in zip(source.pieces(*embedding), source.pieces(*head))):
        raise UserError(
            "--target %s: this model's head is not its embedding, and this server takes the embedding for the head of every %s, "
            "so its answers would be wrong. Use --target hf (embedded server) or tgi-0.8" % (target.name, source.family.name)
        )


def export_items(source: Source, dtype: Optional[str], target: Target) -> List[Item]:
    """The tensors of the export in file order: HF name, dtype in the export, shape, (layer, slot name)."""
    if dtype is None and source.kind == "checkpoint":
        assert source.manifest is not None
        dtype = source.manifest["run_dtype"]
    if dtype is not None:
        return items_of(source.family, source.dims, dtype, target)
    return [
        Item(name, source.entry(layer, slot.name).dtype, slot.size(source.dims), (layer, slot.name))
        for name, layer, slot in targets.exported(target, source.family, source.dims)
    ]


def items_of(family: ModelFamily, dims: Dims, dtype: str, target: Target) -> List[Item]:
    """The same where all have one dtype: "fp32", "bf16" or "fp16"."""
    return [
        Item(name, DTYPES[dtype], slot.size(dims), (layer, slot.name))
        for name, layer, slot in targets.exported(target, family, dims)
    ]


def cast(tensor: torch.Tensor, dtype: str, name: str) -> torch.Tensor:
    """Round to ``dtype`` ("F32", "BF16", "F16"). Raises RunFailed when a finite weight does not fit into fp16."""
    if NAMES[tensor.dtype] == dtype:
        return tensor
    out = tensor.to(TORCH_DTYPES[dtype])
    if dtype == "F16" and not torch.equal(torch.isfinite(out), torch.isfinite(tensor)):
        raise RunFailed("%s: has values over 65504, which fp16 cannot hold; export with --dtype bf16 or fp32" % name)
    return out


def step_of(source: Source) -> Optional[int]:
    return source.manifest["step"] if source.manifest is not None else None


def _write(folder: Path, shards: List[Shard], source: Source, meter: Meter, check: Callable[[], None]) -> None:
    """All files of weights, several tensors at a time, each in pieces."""
    placed.make(folder, shards)
    with contextlib.ExitStack() as stack:
        files = {name: os.open(str(folder / name), os.O_WRONLY) for name, _ in shards}
        for number in files.values():
            stack.callback(os.close, number)

        def one(spot: placed.Spot) -> None:
            check()
            place = spot.start
            for piece in _pieces(source, spot.item):
                place = placed.put(files[spot.file], place, piece)
            meter.add(spot.item.nbytes)

        pool = stack.enter_context(ThreadPoolExecutor(source.threads))
        in_turn(pool, one, placed.spots(shards).values())
        in_turn(pool, os.fsync, files.values())


def _pieces(source: Source, item: Item) -> Iterator[torch.Tensor]:
    return (cast(piece, item.dtype, item.name) for piece in source.pieces(*item.source))
