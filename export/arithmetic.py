"""Two forward passes carried on side by side, layer after layer, each on its own hidden states:

    theirs   transformers' own code on the export's tensors
    ours     the pipeline's blocks on the checkpoint's tensors, rounded to the export's dtype

in fp32 (exact) and, on the first tokens of each prompt, in the export's dtype. Memory: one layer, whatever the model's size.
"""

from typing import Any, Dict, List, NamedTuple, Optional

import torch
from torch.nn import functional as F

from pipeline_train.weights import Source
from pipeline_train.weights.files import TORCH_DTYPES

from .distance import Logits, States
from .measure import Meter
from .ours import Ours
from .theirs import Everything, Theirs

NARROW_TOKENS = 64  # of each prompt in the export's dtype: a CPU multiplies fp16 slowly
KERNEL = 10.0  # the fused kernel's rounding grows to 1.7e-5 over the 30 blocks of a trained SmolLM2, whose states reach 2e4
ROUNDINGS = 3.0  # two honest passes in one narrow dtype are this many roundings apart at most

Row = Dict[str, Any]
PASSES = ("theirs", "ours", "as_trained", "theirs_narrow", "ours_narrow")


class Plan(NamedTuple):
    """``prompts``: token ids. ``narrow``: the export's dtype if it is not fp32 and this torch computes in it. ``whole``: what
    transformers' whole model gave, if it fitted."""

    prompts: List[List[int]]
    narrow: Optional[torch.dtype]
    whole: Optional[Everything]
    tied: bool


def narrow_dtype(name: str) -> Optional[torch.dtype]:
    """ "BF16" or "F16" -> torch's dtype; None for "F32", and where this torch cannot compute in it (fp16 before torch 2)."""
    dtype = TORCH_DTYPES[name]
    try:
        x = torch.ones(2, 2, dtype=dtype)
        F.silu(F.layer_norm(F.linear(x, x), (2,)))
    except RuntimeError:
        return None
    return None if dtype == torch.float32 else dtype


def compare(source: Source, target: Source, dtypes: Dict[Any, str], plan: Plan, meter: Meter) -> List[Row]:
    """One row per layer, "norm" and "logits" for the last: {"layer", "what", figures of ``States`` in fp32 and

        "as_trained"   the same through the attention kernel that training uses
        "narrow"       in the export's dtype, with "rounding": how far theirs is from theirs in fp32 on average
        "whole_model"  against the whole model}

    Logits have top1 and kl too (``Logits.figures``).
    """
    ours, theirs = Ours(source, dtypes), Theirs(target, plan.tied)
    hidden: Dict[str, List[Any]] = dict.fromkeys(PASSES, plan.prompts)
    hidden["theirs_narrow"] = hidden["ours_narrow"] = [ids[:NARROW_TOKENS] for ids in plan.prompts]
    rows = []
    for layer in range(source.dims.layers):
        after = _layer(ours, theirs, layer, hidden, plan)
        kind = source.dims.kind_of(layer)
        what = "norm" if kind == "head" else kind
        rows.append(_row(layer, what, after, plan))
        if kind == "head":
            rows.append(_logits(ours, theirs, layer, hidden, plan))
        hidden = after
        ours.drop()
        meter.add(sum(4 * _count(slot.size(source.dims)) for slot in source.family.layer_slots(source.dims, layer)))
    return rows


def total_bytes(source: Source) -> int:
    """What ``compare`` tells its meter in all: the model in fp32."""
    return sum(4 * _count(slot.size(source.dims)) for _, slot in source.slots())


def beyond(rows: List[Row], tolerance: float, narrow: str) -> List[str]:
    """What the first layer that is further away than allowed has to be told, or []. ``narrow``: the short name of the dtype."""
    for row in rows:
        if not row["relative"] <= tolerance:
            return [_first(row, row["relative"], "transformers", tolerance)]
        if not row.get("whole_model", row)["relative"] <= tolerance:
            return [_first(row, row["whole_model"]["relative"], "transformers' whole model", tolerance)]
        if not row["as_trained"]["relative"] <= KERNEL * tolerance:
            return [_first(row, row["as_trained"]["relative"], "transformers when it computes as in training", KERNEL * tolerance)]
        found = row.get("narrow")
        if found and not found["mean"] <= ROUNDINGS * found["rounding"] + tolerance * found["max"]:
            return ["layer %d (%s) is the first that differs from transformers in %s: by %.3g on average, rounding alone makes %.3g"
                    % (row["layer"], row["what"], narrow, found["mean"], found["rounding"])]  # fmt: skip
    return []


def _first(row: Row, relative: float, whom: str, tolerance: float) -> str:
    if relative != relative:
        return "layer %d (%s) is the first whose values are not numbers: the weights hold NaN or infinity, or lead there" % (
            row["layer"], row["what"])  # fmt: skip
    return "layer %d (%s) is the first that differs from %s: %.3g of its largest value, over the tolerance of %g" % (
        row["layer"], row["what"], whom, relative, tolerance,
    )  # fmt: skip


def _layer(ours: Ours, theirs: Theirs, layer: int, hidden: Dict[str, List[Any]], plan: Plan) -> Dict[str, List[Any]]:
    """The hidden states behind a layer, which stays loaded; theirs is gone before ours comes, but for the head."""
    after: Dict[str, List[Any]] = {}
    theirs.load(layer, plan.prompts)
    after["theirs"] = theirs.run(layer, hidden["theirs"], torch.float32)
    if plan.narrow is not None:
        after["theirs_narrow"] = theirs.run(layer, hidden["theirs_narrow"], plan.narrow)
    theirs.drop()
    ours.load(layer, plan.prompts)
    for name, spelled in (("ours", True), ("as_trained", False)):
        after[name] = ours.run(layer, hidden[name], torch.float32, not spelled)
    if plan.narrow is not None:
        after["ours_narrow"] = ours.run(layer, hidden["ours_narrow"], plan.narrow, True)
    return after


def _row(layer: int, what: str, after: Dict[str, List[Any]], plan: Plan) -> Row:
    def apart(a: List[torch.Tensor], b: List[torch.Tensor]) -> Dict[str, float]:
        states = States()
        for one, other in zip(a, b):
            states.add(one, other)
        return states.figures()

    row: Row = dict({"layer": layer, "what": what}, **apart(after["ours"], after["theirs"]))
    row["as_trained"] = apart(after["as_trained"], after["theirs"])
    if plan.narrow is not None:
        wide = [h[:, :NARROW_TOKENS] for h in after["theirs"]]
        rounding = apart(after["theirs_narrow"], wide)["mean"]
        row["narrow"] = dict(apart(after["ours_narrow"], after["theirs_narrow"]), rounding=rounding)
    if plan.whole is not None:
        row["whole_model"] = apart(after["ours"], plan.whole.pop((layer, what)))
    return row


def _logits(ours: Ours, theirs: Theirs, layer: int, hidden: Dict[str, List[Any]], plan: Plan) -> Row:
    """The last row. A slice of the vocabulary at a time."""
    found: Dict[str, List[Logits]] = {
        key: [Logits() for _ in plan.prompts] for key in ("", "as_trained", "narrow", "rounding", "whole")
    }
    whole = plan.whole.pop((layer, "logits")) if plan.whole is not None else None
    for (first, rows), (_, their_rows) in zip(ours.head_rows(), theirs.head_rows()):
        for side, table in ((ours, rows), (theirs, their_rows)):
            side.load(layer, plan.prompts)  # the norm, as wide as it was before the last slice narrowed it
            side.use_head_rows(table)
        wide = []
        for i, h in enumerate(hidden["theirs"]):
            wide.append(theirs.logits(h))
            mine = ours.logits(hidden["ours"][i])
            found[""][i].add(mine, wide[i])
            found["as_trained"][i].add(ours.logits(hidden["as_trained"][i]), wide[i])
            if whole is not None:
                found["whole"][i].add(mine, whole[i][:, first : first + len(rows)])
        if plan.narrow is None:
            continue
        for side in (ours, theirs):
            side.to(plan.narrow)
        for i, h in enumerate(hidden["theirs_narrow"]):
            reference = theirs.logits(h)
            found["narrow"][i].add(ours.logits(hidden["ours_narrow"][i]), reference)
            found["rounding"][i].add(reference, wide[i][:NARROW_TOKENS])
    row: Row = dict({"layer": layer, "what": "logits"}, **Logits.figures(found[""]))
    row["as_trained"] = Logits.figures(found["as_trained"])
    if plan.narrow is not None:
        row["narrow"] = dict(Logits.figures(found["narrow"]), rounding=Logits.figures(found["rounding"])["mean"])
    if whole is not None:
        row["whole_model"] = Logits.figures(found["whole"])
    return row


def _count(size: Any) -> int:
    count = 1
    for n in size:
        count *= n
    return count
