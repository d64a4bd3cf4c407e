"""The computed part of the proof: which prompts, which dtypes, and whether transformers' whole model is run as well."""

import math
from typing import Any, Dict, List, NamedTuple, Optional

from pipeline_train import host
from pipeline_train.errors import RunFailed, UserError
from pipeline_train.families import Dims
from pipeline_train.weights import Source

from . import arithmetic, prompts, sidecars, theirs
from .measure import Meter, Progress
from .to_hf import DTYPES


class Ask(NamedTuple):
    """``texts``: to compare on, None: fixed ones. ``tolerance``: relative to the largest value. ``whole``: whether transformers'
    whole model is run, None: if it fits in memory."""

    texts: Optional[List[str]] = None
    tolerance: float = 1e-5
    progress: Optional[Progress] = None
    whole: Optional[bool] = None


def prove(source: Source, target: Source, dims: Dims, ask: Ask, proof: Dict[str, Any]) -> List[str]:
    """Hidden states of every layer and logits: our blocks on the checkpoint against transformers on the export, whose
    config.json must say ``dims``. -> failures; fills
    "prompts", "whole_model", "export_dtype", "layers" and "logits" of the proof. Raises RunFailed, UserError."""
    chosen = _prompts(source, target, ask.texts)
    tokens = sum(map(len, chosen.rows))
    proof["prompts"] = {"texts": chosen.texts, "rows": len(chosen.rows), "tokens": tokens, "of_the_run": chosen.samples}
    proof["whole_model"] = _fits(source, ask.whole)
    failures, whole = [], None
    if proof["whole_model"]["compared"]:
        try:
            whole = theirs.whole_model(target.folder, chosen.rows, source.family, dims)
        except RunFailed as error:  # layer by layer there is still something to tell
            failures.append(str(error))
    dtypes = {(layer, slot.name): target.entry(layer, slot.name).dtype for layer, slot in target.slots()}
    main = DTYPES[proof["dtype"]]
    narrow = arithmetic.narrow_dtype(main)
    meter = Meter(arithmetic.total_bytes(source), ask.progress)
    found = arithmetic.compare(source, target, dtypes, arithmetic.Plan(chosen.rows, narrow, whole, dims.tied), meter)
    proof["export_dtype"] = {"dtype": proof["dtype"], "compared": narrow is not None or main == "F32"}
    shown = [_finite(row) for row in found]
    proof["layers"], proof["logits"] = shown[:-1], shown[-1]
    return failures + arithmetic.beyond(found, ask.tolerance, proof["dtype"])


def _prompts(source: Source, target: Source, texts: Optional[List[str]]) -> prompts.Prompts:
    rows = [prompts.random_ids(source.dims)]
    samples = prompts.run_samples(source.folder, source.dims) if source.kind == "checkpoint" else []
    used: List[str] = []
    if any(name.startswith("tokenizer") for name in sidecars.names(target.folder)):
        used = list(prompts.TEXTS if texts is None else texts)
        rows += prompts.text_ids(target.folder, used, source.dims)
    elif texts:
        raise UserError("%s: has no tokenizer, so texts cannot be compared" % target.folder)
    return prompts.Prompts(rows + samples, used, len(samples))


def _fits(source: Source, whole: Optional[bool]) -> Dict[str, Any]:
    """Whether transformers' whole model is compared too: it is where it fits in fp32 beside what this process has, or as asked."""
    needed, free = arithmetic.total_bytes(source) * 5 // 4 + 2**30, host.available_memory()
    fits = free is None or needed <= free
    about = {"needs_gib": round(needed / 2**30, 2), "free_gib": None if free is None else round(free / 2**30, 2)}
    return dict(about, compared=fits if whole is None else whole)


def _finite(value: Any) -> Any:
    """JSON has neither NaN nor infinity."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
