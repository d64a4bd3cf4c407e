"""Everything that can be wrong with a run is found here, before any process starts; what the ranks need is left in <out>.

<out>/resolved/run.yaml      the configuration with every default filled in: dtype, seq_len and parts too
<out>/resolved/original.yaml the bytes the user gave      versions.json, data.json, model/ (config.json, tokenizer, template)
<out>/data/                  the encoded samples
"""

import json
import math
import os
import shutil
from pathlib import Path
from typing import Any, Callable, Dict, NamedTuple, Optional

from . import compat, config, families, manifest, plan, weights
from .config_schema import RunConfig
from .data import feed
from .data.encode import TextCodec
from .data.store import default_seq_len
from .errors import UserError
from .families import Dims

Say = Callable[[str], None]  # takes a line for the user


class Prepared(NamedTuple):
    """``config`` is resolved. ``resume``: the checkpoint to go on from, which has done ``done`` of ``total`` steps."""

    config: RunConfig
    out: Path
    dims: Dims
    gpus: int
    total: int
    resume: Optional[Path]
    done: int


def prepare(run: RunConfig, source: Path, resume: Optional[str], say: Say) -> Prepared:
    """Check, resolve, encode. ``source``: the user's run.yaml. ``resume``: None, "newest" or "auto". Raises UserError."""
    found = compat.versions()
    compat.check_deepspeed(found["deepspeed"])
    for note in compat.notes(found):
        say(note)
    out = Path(run.run.out)
    checkpoint = find_resume(out, resume, say)
    gpus = _resolve_device(run, found, source.name, say)
    folder = (
        weights.find_folder(run.model.path) if run.model.init == "pretrained" else weights.resolve(run.model.path, weights=False)
    )
    run.model.path = str(folder)  # a hub name or a run means this folder from now on, on every rank
    dims = _resolve_model(run, folder, source.name)
    codec = TextCodec.load(str(folder), run.data.template)
    codec.check_vocab(dims.vocab)
    try:
        (out / "data").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError("%s: run.out: %s: cannot be made: %s" % (source.name, out, error.strerror)) from None
    facts = _encode(run, out, codec, say)
    total = _total_steps(run, out, codec.pad_id, say)
    done = 0
    if checkpoint is not None:
        document = manifest.read(checkpoint)
        done = int(document["step"])
        _same_run(run, dims, document, facts)
    _write_resolved(run, out, source, folder, codec, {"versions.json": found, "data.json": dict(facts, pad_id=codec.pad_id)})
    return Prepared(run, out, dims, gpus, total, checkpoint, done)


def find_resume(out: Path, resume: Optional[str], say: Say) -> Optional[Path]:
    """The checkpoint to resume from. Raises UserError for a used folder without --resume, or --resume without a checkpoint."""
    started = (out / "metrics.jsonl").exists() and (out / "metrics.jsonl").stat().st_size > 0
    saved = any((out / "checkpoints").glob("step_*"))
    if resume is None:
        if started or saved:
            raise UserError("%s: already holds a run. Continue it with --resume, or give run.out another folder." % out)
        return None
    if not saved:
        if resume == "auto":
            return None
        raise UserError("%s: --resume: no checkpoint to continue from. Start it without --resume, or use --resume auto." % out)
    passed_over = []  # type: list
    found = manifest.find_checkpoint(out, passed_over)
    for line in passed_over:
        say("passed over: %s" % line)
    return found


def _resolve_device(run: RunConfig, found: Dict[str, Optional[str]], where: str, say: Say) -> int:
    """dtype by what the device can do; -> GPUs (0: train on the CPU)."""
    gpus = compat.Gpus(0, "", False) if os.environ.get("DS_ACCELERATOR") == "cpu" else compat.gpus()
    if gpus.number and run.world > gpus.number:
        raise UserError(
            "%s: parallel: pipe %d x data %d needs %d GPUs, this machine has %d. Lower them, or set DS_ACCELERATOR=cpu."
            % (where, run.parallel.pipe, run.parallel.data, run.world, gpus.number)
        )
    if run.model.dtype == "auto":
        run.model.dtype = "fp32" if not gpus.number else "bf16" if gpus.bf16 else "fp16"
        if run.model.dtype == "bf16" and compat.release(found["deepspeed"] or "") < (0, 9, 3):
            run.model.dtype = "fp16"
    if not gpus.number and run.model.dtype == "fp16":
        raise UserError("%s: model.dtype: fp16 needs a GPU, and none is here; use fp32 or bf16" % where)
    if gpus.number and run.model.dtype == "bf16" and not gpus.bf16:
        raise UserError("%s: model.dtype: %s has no bf16; use fp16" % (where, gpus.name))
    compat.check_dtype(found["deepspeed"], run.model.dtype)
    scale = run.optim.loss_scale.initial
    if run.model.dtype == "fp16" and (scale < 1 or math.log2(scale) % 1):
        raise UserError("%s: optim.loss_scale.initial: must be a power of two, got %d" % (where, scale))
    if run.deepspeed.get("zero_optimization", {}).get("stage", 1) != 1:
        raise UserError(
            "%s: deepspeed.zero_optimization.stage: 0 clips every pipeline stage by its own gradient norm; use 1" % where
        )
    if run.parallel.offload and not gpus.number:
        say("parallel.offload: has no effect on the CPU")
        run.parallel.offload = False
    return gpus.number


def _resolve_model(run: RunConfig, folder: Path, where: str) -> Dims:
    """seq_len and parts by the model; checks every name and shape in the weight files, reading none."""
    raw = families.read_config(str(folder))
    dims = families.dims_of(raw)
    config.check_against_model(run, dims.layers, dims.max_positions, where)
    if run.data.seq_len is None:
        run.data.seq_len = default_seq_len(raw, dims)
    if run.model.init == "pretrained":
        weights.open_source(str(folder)).check()
    parallel = run.parallel
    recompute = parallel.recompute == "blocks"
    parallel.parts = plan.parts_of(plan.bounds(dims, parallel.pipe, parallel.parts, run.data.seq_len, recompute))
    return dims


def _write_resolved(run: RunConfig, out: Path, source: Path, folder: Path, codec: TextCodec, documents: Dict[str, Any]) -> None:
    resolved = out / "resolved"
    try:
        (resolved / "model").mkdir(parents=True, exist_ok=True)
        (out / "logs").mkdir(exist_ok=True)
        shutil.copyfile(str(source), str(resolved / "original.yaml"))
        (resolved / "run.yaml").write_text(config.resolved_yaml(run), encoding="utf-8")
        for name, document in documents.items():
            (resolved / name).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        shutil.copyfile(str(folder / "config.json"), str(resolved / "model" / "config.json"))
        codec.save(str(resolved / "model"))
    except OSError as error:
        raise UserError("run.out: %s: cannot be written: %s" % (error.filename or out, error.strerror)) from None


def _encode(run: RunConfig, out: Path, codec: TextCodec, say: Say) -> Dict[str, Any]:
    """Encode train and eval data; -> what must be the same when the run is resumed."""
    seq_len = run.data.seq_len
    assert seq_len is not None
    statistics = {}
    for which in ("eval", "train") if run.data.eval is not None else ("train",):
        statistics = feed.prepare(run, codec, which, out / "data", seq_len)
        for line in statistics["warnings"]:
            say(line)
    say("%(file)s: %(records)d records, %(bad)d bad, %(tokens)d tokens, %(learnt_tokens)d of them learnt, %(truncated)d truncated, "
        "%(dropped)d dropped, %(nothing_to_learn)d with nothing to learn" % statistics)  # fmt: skip
    return {
        "data": statistics["hash"][:16], "seq_len": seq_len, "rows_per_step": run.rows_per_step, "pack": run.data.pack,
        "seed": run.run.seed,
    }  # fmt: skip


def _total_steps(run: RunConfig, out: Path, pad_id: int, say: Say) -> int:
    seq_len = run.data.seq_len
    assert seq_len is not None
    opened = feed.Feed.open(
        out / "data",
        "train",
        seq_len=seq_len,
        rows_per_step=run.rows_per_step,
        seed=run.run.seed,
        pack=run.data.pack,
        pad_id=pad_id,
    )
    say("rows of %d tokens, %.1f %% filled" % (seq_len, 100 * opened.efficiency()))
    total = 0
    for epoch in range(run.train.epochs):
        total += opened.steps_in_epoch(epoch)
        if run.train.max_steps is not None and total >= run.train.max_steps:
            return run.train.max_steps
    return total


def _same_run(run: RunConfig, dims: Dims, document: Dict[str, Any], facts: Dict[str, Any]) -> None:
    """A resumed run counts steps through the same data with the same optimizer. Raises UserError naming what changed."""
    before = dict(document["training"]["feed"], optimizer=document["training"]["optimizer"], layers=document["layers"])
    now = dict(facts, optimizer=run.optim.type, layers=dims.layers)
    keys = {
        "data": "data.train or the tokenizer", "seq_len": "data.seq_len", "rows_per_step": "batch.global", "pack": "data.pack",
        "seed": "run.seed", "optimizer": "optim.type", "layers": "model.path",
    }  # fmt: skip
    for key, name in keys.items():
        if before.get(key) != now[key]:
            raise UserError(
                "--resume: %s changed since the checkpoint at step %d (%s, now %s). Change it back, or start a new run.out."
                % (name, document["step"], before.get(key), now[key])
            )
