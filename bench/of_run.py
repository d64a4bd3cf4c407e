"""A user's run.yaml as a measurement: its geometry, layout, batch and the lengths of its own data."""

import tempfile
from pathlib import Path
from typing import Callable, Tuple

from pipeline_train import config, weights
from pipeline_train.data.encode import TextCodec
from pipeline_train.data.store import default_seq_len, prepare, scratch
from pipeline_train.families import dims_of, read_config

from .rows import of_run
from .task import Case


def case_of(path: str, pairs: Tuple[str, ...], steps: int, say: Callable[[str], None]) -> Case:
    """Encodes the data as ``train`` does. Raises UserError."""
    run = config.load(path, pairs)
    folder = weights.resolve(run.model.path, weights=False)
    raw = read_config(str(folder))
    dims = dims_of(raw)
    seq = run.data.seq_len or default_seq_len(raw, dims)
    codec = TextCodec.load(str(folder), run.data.template)
    with tempfile.TemporaryDirectory(dir=scratch(run)) as scratch_folder:
        prepare(run, codec, "train", Path(scratch_folder), seq, say)
        documents = of_run(Path(scratch_folder))
    parallel, parts = run.parallel, run.parallel.parts
    return Case(
        "ours", raw, seq, run.batch.micro, run.micro_batches, parallel.pipe, parallel.data,
        parts=None if isinstance(parts, str) else list(parts),
        dtype=run.model.dtype, recompute=parallel.recompute,
        compile=run.run.compile, fp8=run.run.fp8, optim=run.optim.type, steps=steps, documents=documents,
    )  # fmt: skip
