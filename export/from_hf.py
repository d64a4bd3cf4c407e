"""Hugging Face weights -> one file per pipeline layer, bit-equal, with a manifest: the folder counts as a checkpoint."""

import shutil
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Dict, List, Optional

from pipeline_train import manifest
from pipeline_train.errors import UserError
from pipeline_train.weights import Source, open_source
from pipeline_train.weights.files import WIDTHS
from pipeline_train.weights.writing import Item, TensorFile

from . import sidecars
from .aside import output_folder
from .measure import Meter, Progress
from .threads import in_turn

SHORT = {"F32": "fp32", "BF16": "bf16", "F16": "fp16"}


def from_hf(input: str, output: str, progress: Optional[Progress] = None) -> Dict[str, Any]:
    """Convert an HF folder or hub name. Memory: one tensor.

    A tied head gets a copy of the embedding in its own layer file, as training checkpoints have it.
    Returns {"output", "family", "layers", "tied", "dtype", bytes, seconds, gb_per_s, peak_gib}. Raises UserError, RunFailed.
    """
    source = open_source(input)
    if source.kind != "hf":
        raise UserError("%s: holds layer files already (%s); use it as it is" % (input, source.kind))
    source.check()
    source.check_tied()
    layers = [layer_items(source, layer) for layer in range(source.dims.layers)]
    meter = Meter(sum(item.nbytes for items in layers for item in items), progress)
    dtype, mixed = main_dtype([item for items in layers for item in items])
    files: Dict[str, Any] = {}
    with output_folder(output, meter.total, apart_from=[str(source.folder)]) as folder:

        def one(layer: int) -> Dict[str, Any]:
            path = folder / manifest.layer_file(layer)
            with TensorFile(path, layers[layer], hashed=True) as writer:
                for item in layers[layer]:
                    writer.write(item.name, source.pieces(layer, item.name))
                    meter.add(item.nbytes)
            return {path.name: writer.entry}

        # The largest first: at the end no thread waits for one that began with a head late.
        sizes = [sum(item.nbytes for item in items) for items in layers]
        with ThreadPoolExecutor(source.threads) as pool:
            for entry in in_turn(pool, one, sorted(range(len(layers)), key=lambda layer: -sizes[layer])):
                files.update(entry)
        shutil.copyfile(str(source.folder / "config.json"), str(folder / "config.json"))
        for name in ["config.json"] + sidecars.copy(source.folder, folder):
            files[name] = manifest.file_entry(folder / name)
        document = {
            "format": manifest.FORMAT, "kind": "from-hf", "family": source.family.name, "run_dtype": SHORT[dtype],
            "layer_dtype": "mixed" if mixed else SHORT[dtype], "tied": source.dims.tied, "layers": source.dims.layers,
            "step": None, "run_name": None, "files": files, "versions": versions(),
        }  # fmt: skip
        manifest.write(folder, document)
    about = {"output": str(output), "family": source.family.name, "layers": source.dims.layers, "tied": source.dims.tied}
    return dict(about, dtype=document["layer_dtype"], **meter.figures())


def layer_items(source: Source, layer: int) -> List[Item]:
    """The tensors of one layer file: slot names, dtypes as they are; wide dtypes first (alignment), else slot order."""
    items = []
    for slot in source.family.layer_slots(source.dims, layer):
        items.append(Item(slot.name, source.entry(layer, slot.name).dtype, slot.size(source.dims)))
    return sorted(items, key=lambda item: -WIDTHS[item.dtype])


def main_dtype(items: List[Item]) -> Any:
    """(the dtype that holds most bytes, whether there are others)."""
    held: Counter = Counter()
    for item in items:
        held[item.dtype] += item.nbytes
    return held.most_common(1)[0][0], len(held) > 1


def versions() -> Dict[str, str]:
    """What wrote the folder."""
    import platform

    import torch

    return {"python": platform.python_version(), "torch": str(torch.__version__)}
