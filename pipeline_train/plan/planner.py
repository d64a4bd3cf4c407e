"""``plan``: everything a run will need, as one JSON document."""

from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple, Union

from .. import families
from ..errors import UserError
from ..families import Dims
from . import cards, layouts
from .fitting import bounds_on, bounds_that_fit, fits_on, gib_of
from .memory import GIB, Setup, Sizes, stage_bytes
from .speed import speed
from .split import parts_of

Model = Union[Dims, Dict[str, Any], str]
KEYS = {
    "micro": "batch.micro", "data": "parallel.data", "dtype": "model.dtype", "recompute": "parallel.recompute",
    "offload": "parallel.offload", "compile": "run.compile", "fp8": "run.fp8",
}  # fmt: skip


class Wish(NamedTuple):
    """What the user fixed: a Setup without what follows from the card and the number of GPUs. ``dtype`` None: bf16 where the
    card has it. ``micro_batches`` None: max(8, stages). ``from_file``: run.yaml said it, so messages name its keys."""

    seq_len: int = 2048
    micro: int = 1
    micro_batches: Optional[int] = None
    data: int = 1
    dtype: Optional[str] = None
    optim: str = "adamw"
    recompute: str = "none"
    offload: bool = False
    compile: bool = False
    fp8: bool = False
    from_file: bool = False

    def named(self, option: str) -> str:
        """What the user would change for that field."""
        return KEYS[option] if self.from_file else "--" + option

    def setup(self, pipe: int, gpu: str) -> Setup:
        dtype = self.dtype or ("bf16" if cards.GPUS[gpu].bf16 else "fp16")
        return Setup(self.seq_len, self.micro, self.micro_batches or max(8, pipe), pipe, self.data, dtype, self.optim,
                     self.recompute, self.offload, cards.stack_of(gpu), self.compile, self.fp8)  # fmt: skip


def plan(
    model: Model,
    gpu: str = "h100-80g",
    gpus: Optional[int] = None,
    parts: Union[str, Sequence[int]] = "auto",
    link: Optional[str] = None,
    mfu: Optional[float] = None,
    **wish: Any,
) -> Dict[str, Any]:
    """Plan a training run.

    ``model``: Dims, a config.json as a dictionary, or the path of one (or of its folder). ``gpu``, ``link``: names of cards.py.
    ``gpus``: how many there are in all (stages x ``data``); None: as few as hold the model. ``parts``: layers per stage, or
    "auto". ``wish``: the fields of Wish. Raises UserError. -> {model, gpu, gpus, stack, dtype, min_gpus (None: no number
    does), fits, parts, bubble, tokens_per_s, step_s, limit_gib, stages: [{layers, params, flop_share, gib}], ...}
    """
    gpu = cards.gpu_named(gpu)
    wished, dims = Wish(**wish), _dims(model)
    _check(wished, gpu, gpus, dims, mfu)
    sizes = Sizes(dims)
    least = least_stages(sizes, wished, gpu)
    if gpus is None and isinstance(parts, str):
        if least is None:
            raise UserError(too_big(sizes, wished, gpu))
        pipe = least
    else:
        pipe = len(parts) if gpus is None else gpus // wished.data
        if not isinstance(parts, str) and len(parts) != pipe:
            raise UserError("--parts: %d stages, but --gpus and --data make %d" % (len(parts), pipe))
    setup = wished.setup(pipe, gpu)
    boundaries = bounds_on(sizes, setup, parts, gpu)
    document = _describe(sizes, setup, boundaries, gpu, link, mfu)
    document["min_gpus"] = None if least is None else least * wished.data
    other = layouts.best_other(sizes, setup, gpu, document["link"], document["mfu"])
    document["notes"] = _notes(document, sizes, wished, gpu)
    document["notes"] += layouts.notes(document, other, not isinstance(parts, str), wished.from_file)
    return document


def least_stages(sizes: Sizes, wished: Wish, gpu: str) -> Optional[int]:
    """The smallest number of stages that holds the model on this card, None when no number does."""
    layers = sizes.dims.layers
    for pipe in range(1, layers + 1):
        fits, end = fits_on(sizes, wished.setup(pipe, gpu), gpu), 0
        for stage in range(pipe):  # each takes as many layers as fit and as leave one for every later stage
            start = end
            while end < layers - (pipe - 1 - stage) and fits(stage, start, end + 1):
                end += 1
            if end == start:
                break
        if end == layers:
            return pipe
    return None


def too_big(sizes: Sizes, wished: Wish, gpu: str) -> str:
    """Why no number of GPUs holds the model: the layer that does not fit alone, with what it needs."""
    dims, limit = sizes.dims, cards.usable(gpu)
    setup = wished.setup(dims.layers, gpu)
    rows = [
        ("embedding", stage_bytes(sizes, setup, 0, 0, 1)),
        ("first block", stage_bytes(sizes, setup, 1, 1, 2)),
        ("norm and head", stage_bytes(sizes, setup, dims.layers - 1, dims.layers - 1, dims.layers)),
    ]
    name, found = max(rows, key=lambda row: row[1].total)
    parts = ", ".join("%s %.1f" % (field, value / GIB) for field, value in zip(found._fields, found))
    text = "no number of these GPUs holds this model: even one layer per GPU, the %s alone needs %.1f GiB (%s), a %s has %.1f" % (
        name, found.total / GIB, parts, gpu, limit)  # fmt: skip
    helps = [option for option, other in _changes(wished) if least_stages(sizes, other, gpu) is not None]
    return text + (". With %s it fits" % " or ".join(helps) if helps else ". It takes a larger card")


def check_fp8_sizes(dims: Dims, where: str = "run.fp8") -> None:
    """Raises UserError for matrices that a card cannot multiply in fp8."""
    for name, size in (("hidden", dims.hidden), ("feed-forward", dims.ffn), ("query", dims.q_size), ("key", dims.kv_size)):
        if size % 16:
            text = "%s: sizes must be multiples of 16, and the model's %s size is %d; leave it out"
            raise UserError(text % (where, name, size))


def _changes(wished: Wish) -> List[Tuple[str, Wish]]:
    """What could be asked for instead, the cheapest first."""
    found: List[Tuple[str, Any]] = [("recompute", "blocks")] if wished.recompute != "blocks" else []
    found += [("micro", 1)] if wished.micro > 1 else []
    found += [("data", data) for data in (2, 4, 8) if data > wished.data]
    found += [("offload", True)] if not wished.offload and not wished.fp8 else []
    found += [("fp8", False)] if wished.fp8 else []
    return [(_words(wished, option, value), wished._replace(**{option: value})) for option, value in found]


def _words(wished: Wish, option: str, value: Any) -> str:
    if wished.from_file:
        return "%s: %s" % (wished.named(option), "true" if value is True else value)
    if value is False:
        return "without %s" % wished.named(option)
    return wished.named(option) if value is True else "%s %s" % (wished.named(option), value)


def _describe(
    sizes: Sizes, setup: Setup, boundaries: Sequence[int], gpu: str, link: Optional[str], mfu: Optional[float]
) -> Dict[str, Any]:
    dims, card = sizes.dims, cards.GPUS[gpu]
    name = link or card.link
    share, source = (mfu, "given") if mfu else cards.share_of_peak(gpu, setup.compiled, setup.fp8)
    fast = speed(dims, sizes, setup, boundaries, gpu, cards.link_named(name), share)
    memory, limit = gib_of(sizes, setup, boundaries), cards.usable(gpu)
    stages = []
    for stage, (start, end) in enumerate(zip(boundaries, boundaries[1:])):
        params = sizes.parameters(sizes.part(start, end))
        stages.append({"layers": [start, end - 1], "params": params, "flop_share": round(fast.shares[stage], 6),
                       "gib": memory[stage]})  # fmt: skip
    return {
        "family": dims.family, "params": sizes.parameters(sizes.part(0, dims.layers)), "layers": dims.layers, "gpu": gpu,
        "stack": setup.stack, "min_gpus": None, "gpus": setup.pipe * setup.data, "pipe": setup.pipe, "data": setup.data,
        "fits": all(row["total"] <= limit for row in memory), "limit_gib": round(limit, 2), "card_gib": card.gib,
        "context_gib": cards.CONTEXT_GIB, "reserve_gib": round(card.gib * cards.RESERVE, 2), "dtype": setup.dtype,
        "optim": setup.optim, "recompute": setup.recompute, "offload": setup.offload,
        "compile": setup.compiled, "fp8": setup.fp8,
        "seq_len": setup.seq_len, "micro": setup.micro, "micro_batches": setup.micro_batches,
        "parts": parts_of(boundaries), "bubble": fast.bubble, "tokens_per_s": round(fast.tokens_per_s, 1),
        "step_s": round(fast.step_s, 4), "mfu": share, "mfu_source": source, "link": name,
        "boundary_mib": round(fast.boundary_bytes / 2**20, 2), "boundary_s": round(fast.boundary_s, 6), "stages": stages,
    }  # fmt: skip


def _notes(document: Dict[str, Any], sizes: Sizes, wished: Wish, gpu: str) -> List[str]:
    notes = []
    if not document["fits"]:
        worst = max(range(len(document["stages"])), key=lambda s: document["stages"][s]["gib"]["total"])
        notes.append("does not fit: stage %d needs %.1f GiB, a %s has %.1f beside context and reserve" % (
            worst, document["stages"][worst]["gib"]["total"], gpu, document["limit_gib"]))  # fmt: skip
        if document["min_gpus"] is None:
            notes.append(too_big(sizes, wished, gpu))
        else:
            cut = bounds_that_fit(sizes, wished.setup(document["pipe"], gpu), "auto", gpu)
            notes += ["parts %s would fit" % parts_of(cut)] if cut else _with_less(document, sizes, wished, gpu)
    if document["bubble"] > 0.2:
        pipe = document["pipe"]
        notes.append("the stages wait %.0f %% of the time: with %d micro-batches a step it would be %.0f %%" % (
            100 * document["bubble"], 8 * pipe, 100 * (pipe - 1) / (9 * pipe - 1)))  # fmt: skip
    if document["fp8"] and not document["compile"]:
        notes.append("without %s fp8 is slower than bf16, not as fast as said here" % wished.named("compile"))
    if document["optim"] == "lion" and document["stack"] == "pinned":
        notes.append("Lion keeps one moment instead of two: 4 bytes a parameter less than AdamW")
    return notes


def _with_less(document: Dict[str, Any], sizes: Sizes, wished: Wish, gpu: str) -> List[str]:
    """What would make as many GPUs hold it, one thing if that is enough, else two."""
    one = [(option, other) for option, other in _changes(wished) if other.data == wished.data]
    two = [
        ("%s and %s" % (option, more), other)
        for option, first in one
        for more, other in _changes(first)
        if other.data == wished.data
    ]
    for option, other in one + two:
        if bounds_that_fit(sizes, other.setup(document["pipe"], gpu), "auto", gpu):
            return ["with %s it would fit" % option]
    return []


def _dims(model: Model) -> Dims:
    if isinstance(model, Dims):
        return model
    return families.dims_of(families.read_config(model) if isinstance(model, str) else model)


def _check(wished: Wish, gpu: str, gpus: Optional[int], dims: Dims, mfu: Optional[float]) -> None:
    """Raises UserError for wishes that no run could have."""
    numbers = {"--seq-len": wished.seq_len, "--micro": wished.micro, "--data": wished.data, "--micro-batches": wished.micro_batches,
               "--gpus": gpus}  # fmt: skip
    for option, number in numbers.items():
        if number is not None and number < 1:
            raise UserError("%s: must be 1 or more, got %d" % (option, number))
    if mfu is not None and not 0 < mfu <= 1:
        raise UserError("--mfu: must be above 0 and at most 1, got %s" % mfu)
    if gpus is not None and gpus % wished.data:
        raise UserError("--gpus: %d is not a multiple of %d replicas (--data)" % (gpus, wished.data))
    if gpus is not None and gpus // wished.data > dims.layers:
        text = (
            "--gpus: %d stages, but the model has only %d layers (embed + %d blocks + head). Use at most %d, or replicas (--data)."
        )
        raise UserError(text % (gpus // wished.data, dims.layers, dims.blocks, dims.layers * wished.data))
    if wished.recompute == "selective" and cards.stack_of(gpu) == "pinned":
        raise UserError("%s: selective needs torch 2.4, and %s runs with the pinned stack's 1.13; use blocks" % (
            wished.named("recompute"), gpu))  # fmt: skip
    if wished.compile and cards.stack_of(gpu) == "pinned":
        raise UserError(
            "%s: needs torch 2.6, and %s runs with the pinned stack's 1.13; leave it out" % (wished.named("compile"), gpu)
        )
    if wished.fp8 and gpu not in cards.FP8:
        raise UserError("%s: %s has no fp8 (known with it: %s); leave it out" % (wished.named("fp8"), gpu, ", ".join(cards.FP8)))
    if wished.fp8:
        check_fp8_sizes(dims, wished.named("fp8"))
    if wished.fp8 and (wished.dtype not in (None, "bf16") or wished.offload):
        other = wished.named("offload") if wished.offload else "%s %s" % (wished.named("dtype"), wished.dtype)
        raise UserError("%s: is for bf16 without offload, not with %s; leave one of them out" % (wished.named("fp8"), other))
    if wished.dtype == "bf16" and not cards.GPUS[gpu].bf16:
        raise UserError("%s: %s has no bf16; use fp16" % (wished.named("dtype"), gpu))
    if dims.max_positions is not None and wished.seq_len > dims.max_positions:
        raise UserError("--seq-len: %d is over the model's %d positions (config.json, max_position_embeddings). Use at most %d."
                        % (wished.seq_len, dims.max_positions, dims.max_positions))  # fmt: skip
