"""Pipeline weights -> a Hugging Face folder that ``from_pretrained`` just loads, streamed one tensor at a time."""

from pathlib import Path
from typing import Any, Dict, List, Optional

import torch

from pipeline_train import manifest
from pipeline_train.errors import RunFailed, UserError
from pipeline_train.proof import MARK
from pipeline_train.weights import Source, open_source
from pipeline_train.weights.files import NAMES, TORCH_DTYPES
from pipeline_train.weights.writing import Item, TensorFile

from . import aside, naming, sidecars
from .from_hf import SHORT, main_dtype, versions
from .measure import Meter, Progress
from .shards import parse_size, plan, write_index

TARGETS = ("hf",)
DTYPES = {short: name for name, short in SHORT.items()}  # "bf16" -> "BF16"


def to_hf(
    input: str,
    output: str,
    target: str = "hf",
    dtype: Optional[str] = None,
    shard_size: str = "5GB",
    overwrite: bool = False,
    progress: Optional[Progress] = None,
) -> Dict[str, Any]:
    """Export a run, a checkpoint, a from-hf folder or a plain HF folder (or hub name).

    ``dtype``: "fp32" | "bf16" | "fp16"; None: a run's own dtype, rounded from its fp32 master weights, else each tensor's own.
    Returns {"output", "target", "family", "tied", "dtype", "step", "shards", bytes, seconds, gb_per_s, peak_gib}.
    Raises UserError for what the user asked, RunFailed when a checkpoint's tied copies differ, fp16 overflows or writing fails.
    """
    if target not in TARGETS:
        raise UserError("--target %s: not one of those there are: %s" % (target, ", ".join(TARGETS)))
    if dtype is not None and dtype not in DTYPES:
        raise UserError("--dtype %s: not one of those there are: %s" % (dtype, ", ".join(DTYPES)))
    limit = parse_size(shard_size)
    source = open_source(input)
    source.check()
    if source.manifest is not None:
        manifest.check_hashes(source.folder, source.manifest, optimizer=False)
    source.check_tied()
    items = export_items(source, dtype)
    main, _ = main_dtype(items)
    shards = plan(items, limit)
    meter = Meter(sum(item.nbytes for item in items), progress)
    about = {
        "target": target,
        "family": source.family.name,
        "tied": source.dims.tied,
        "dtype": SHORT[main],
        "step": step_of(source),
    }
    with aside.output_folder(output, meter.total, overwrite) as folder:
        for name, shard in shards:
            _write_shard(folder / name, shard, source, meter)
        write_index(folder, shards)
        sidecars.copy(source.folder, folder)
        sidecars.finish(folder, sidecars.export_config(source.config, source.family, source.dims, main))
        aside.write_marker(folder, dict(about, format="pipedock-export/1", source=source.kind, versions=versions()))
    return dict(about, output=str(output), shards=len(shards), **meter.figures())


def export_items(source: Source, dtype: Optional[str]) -> List[Item]:
    """The tensors of the export in file order: HF name, dtype in the export, shape, (layer, slot name)."""
    if dtype is None and source.kind == "checkpoint":
        assert source.manifest is not None
        dtype = source.manifest["run_dtype"]
    items = []
    for name, layer, slot in naming.exported(source.family, source.dims):
        kept = DTYPES[dtype] if dtype is not None else source.entry(layer, slot.name).dtype
        items.append(Item(name, kept, slot.size(source.dims), (layer, slot.name)))
    return items


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


def _write_shard(path: Path, shard: List[Item], source: Source, meter: Meter) -> None:
    with TensorFile(path, shard, more=MARK) as writer:
        for item in shard:
            layer, slot_name = item.source
            writer.write(item.name, (cast(piece, item.dtype, item.name) for piece in source.pieces(layer, slot_name)))
            meter.add(item.nbytes)
