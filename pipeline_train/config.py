"""run.yaml -> RunConfig. Every default of the product is written here, once; unknown keys are refused with the nearest match.

Imports msgspec and PyYAML only: a configuration is read, and refused, without torch.
"""

import difflib
from pathlib import Path
from typing import Any, Dict, List, Literal, Optional, Tuple, Union

import msgspec
import yaml
from msgspec import field

from .errors import UserError


class Section(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """A section of run.yaml."""


class Run(Section):
    out: str
    name: str = ""
    seed: int = 42


class Model(Section):
    path: str
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    init: Literal["pretrained", "random"] = "pretrained"


class Data(Section):
    train: str
    eval: Optional[str] = None
    seq_len: Optional[int] = None
    template: str = "auto"
    pack: bool = True
    on_bad: Literal["fail", "skip"] = "fail"
    over_long: Literal["truncate", "drop", "fail"] = "truncate"


class Parallel(Section):
    pipe: int
    data: int = 1
    parts: Union[Literal["auto"], List[int]] = "auto"
    recompute: Literal["none", "blocks"] = "none"
    axes: List[str] = field(default_factory=lambda: ["pipe", "data"])
    offload: bool = False


class Batch(Section):
    micro: int = 1
    global_rows: Optional[int] = field(default=None, name="global")


class LossScale(Section):
    initial: int = 65536
    window: int = 1000
    hysteresis: int = 2
    min: float = 1.0


class Optim(Section):
    type: Literal["adamw", "lion"] = "adamw"
    lr: float = 1e-5
    betas: List[float] = field(default_factory=lambda: [0.9, 0.95])
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip: float = 1.0
    warmup: int = 0
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    floor: float = 0.1
    loss_scale: LossScale = field(default_factory=LossScale)


class Train(Section):
    epochs: int = 1
    max_steps: Optional[int] = None
    save_every: Optional[int] = None  # None: at the end only
    eval_every: Optional[int] = None  # None: at the end only
    keep: int = 3
    log_every: int = 1


class Export(Section):
    dir: str
    target: Literal["hf"] = "hf"


class Serve(Section):
    engine: Literal["embedded", "tgi", "vllm"] = "embedded"
    version: Optional[str] = None
    shards: int = 1
    port: int = 8082


class RunConfig(Section):
    run: Run
    model: Model
    data: Data
    parallel: Parallel
    batch: Batch = field(default_factory=Batch)
    optim: Optim = field(default_factory=Optim)
    train: Train = field(default_factory=Train)
    deepspeed: Dict[str, Any] = field(default_factory=dict)
    export: Optional[Export] = None
    serve: Optional[Serve] = None

    @property
    def world(self) -> int:
        """Processes (GPUs) of the run: pipe x data."""
        return self.parallel.pipe * self.parallel.data

    @property
    def rows_per_step(self) -> int:
        """Packed rows of one optimizer step over all data-parallel ranks."""
        if self.batch.global_rows is not None:
            return self.batch.global_rows
        return self.batch.micro * self.parallel.data * 8

    @property
    def micro_batches(self) -> int:
        """M, the micro-batches of one step on each data-parallel rank."""
        return self.rows_per_step // (self.batch.micro * self.parallel.data)


# DeepSpeed keys that are derived from ours: two places for one fact would let them disagree.
OWNED = {
    "train_batch_size": "batch.global",
    "train_micro_batch_size_per_gpu": "batch.micro",
    "gradient_accumulation_steps": "batch.global and batch.micro",
    "fp16": "model.dtype and optim.loss_scale",
    "bf16": "model.dtype",
    "bfloat16": "model.dtype",
    "gradient_clipping": "optim.clip",
    "optimizer": "optim",
    "scheduler": "optim.schedule",
    "steps_per_print": "train.log_every",
}


def load(path: Union[str, Path], sets: Tuple[str, ...] = ()) -> RunConfig:
    """Read a run.yaml, apply ``a.b=c`` overrides, check it. Raises UserError, one line."""
    path = Path(path)
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError("%s: no such file. Write one (README, \"run.yaml\") or name it with --config." % path) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError("%s: cannot be read: %s" % (path, error)) from None
    except yaml.YAMLError as error:
        raise UserError("%s: not valid YAML: %s" % (path, " ".join(str(error).split()))) from None
    if not isinstance(raw, dict):
        raise UserError("%s: expected sections such as run:, model:, data: and parallel:, found %s" % (path, type(raw).__name__))
    for item in sets:
        _apply_set(raw, item)
    return parse(raw, path.name)


def parse(raw: Dict[str, Any], where: str = "run.yaml") -> RunConfig:
    """A mapping -> a checked RunConfig; ``where`` names the file in messages."""
    _refuse_unknown(raw, RunConfig, where, "")
    try:
        config = msgspec.convert(_number_strings(raw, RunConfig), RunConfig)
    except msgspec.ValidationError as error:
        raise UserError("%s: %s" % (where, _plain(str(error)))) from None
    _check(config, where)
    return config


def resolved_yaml(config: RunConfig) -> str:
    """The configuration with every default filled in, as run.yaml text that loads to the same RunConfig."""
    return yaml.safe_dump(msgspec.to_builtins(config), sort_keys=False, allow_unicode=True)


def check_against_model(config: RunConfig, layers: int, max_positions: Optional[int], where: str = "run.yaml") -> None:
    """Cross-checks that need the model: ``layers`` counts embed, blocks and head."""
    parts = config.parallel.parts
    blocks = layers - 2
    if parts != "auto" and sum(parts) != layers:
        raise UserError(
            '%s: parallel.parts: sums to %d, the model has %d layers (embed + %d blocks + head). Use "auto" or fix the list.'
            % (where, sum(parts), layers, blocks)
        )
    if config.parallel.pipe > layers:
        raise UserError(
            "%s: parallel.pipe: %d stages, but the model has only %d layers (embed + %d blocks + head). Use at most %d."
            % (where, config.parallel.pipe, layers, blocks, layers)
        )
    if config.data.seq_len is not None and max_positions is not None and config.data.seq_len > max_positions:
        raise UserError(
            "%s: data.seq_len: %d is over the model's %d positions (config.json, max_position_embeddings). Use at most %d."
            % (where, config.data.seq_len, max_positions, max_positions)
        )


def _check(config: RunConfig, where: str) -> None:
    positive = {
        "parallel.pipe": config.parallel.pipe, "parallel.data": config.parallel.data, "batch.micro": config.batch.micro,
        "train.epochs": config.train.epochs, "train.keep": config.train.keep, "train.log_every": config.train.log_every,
        "batch.global": config.batch.global_rows, "data.seq_len": config.data.seq_len,
        "train.max_steps": config.train.max_steps, "train.save_every": config.train.save_every,
        "train.eval_every": config.train.eval_every,
    }  # fmt: skip
    for key, value in positive.items():
        if value is not None and value < 1:
            raise UserError("%s: %s: must be 1 or more, got %d" % (where, key, value))
    if config.data.seq_len is not None and config.data.seq_len < 8:
        raise UserError("%s: data.seq_len: must be 8 or more, got %d" % (where, config.data.seq_len))
    for key in ("run.out", "model.path", "data.train"):
        section, name = key.split(".")
        if not getattr(getattr(config, section), name).strip():
            raise UserError("%s: %s: is empty" % (where, key))
    _check_parallel(config, where)
    _check_optim(config, where)
    for key, ours in OWNED.items():
        if key in config.deepspeed:
            raise UserError("%s: deepspeed.%s: is set from %s; remove it here and use that key." % (where, key, ours))
    zero = config.deepspeed.get("zero_optimization", {})
    if not isinstance(zero, dict) or zero.get("stage", 1) not in (0, 1):
        raise UserError(
            "%s: deepspeed.zero_optimization: a pipeline needs the gradients whole on each stage, so stage 0 or 1 "
            "(the default); got %r" % (where, zero.get("stage") if isinstance(zero, dict) else zero)
        )


def _check_parallel(config: RunConfig, where: str) -> None:
    parallel, batch = config.parallel, config.batch
    if parallel.parts != "auto":
        if len(parallel.parts) != parallel.pipe:
            raise UserError(
                "%s: parallel.parts: has %d stages, parallel.pipe is %d. Make them equal." % (where, len(parallel.parts), parallel.pipe)
            )
        if min(parallel.parts) < 1:
            raise UserError("%s: parallel.parts: stage %d is empty; every stage needs at least one layer."
                            % (where, parallel.parts.index(min(parallel.parts))))  # fmt: skip
    if sorted(parallel.axes) != ["data", "pipe"]:
        raise UserError("%s: parallel.axes: expected [pipe, data] or [data, pipe], got %s" % (where, parallel.axes))
    unit = batch.micro * parallel.data
    if config.rows_per_step % unit:
        near = max(1, round(config.rows_per_step / unit)) * unit
        raise UserError(
            "%s: batch.global: %d rows cannot be split into micro-batches of %d on %d data-parallel ranks; "
            "use a multiple of %d, such as %d." % (where, config.rows_per_step, batch.micro, parallel.data, unit, near)
        )


def _check_optim(config: RunConfig, where: str) -> None:
    optim = config.optim
    if len(optim.betas) != 2 or not all(0 <= b < 1 for b in optim.betas):
        raise UserError("%s: optim.betas: expected two numbers in [0, 1), got %s" % (where, optim.betas))
    limits = (("lr", optim.lr > 0), ("eps", optim.eps > 0), ("weight_decay", optim.weight_decay >= 0), ("clip", optim.clip >= 0),
              ("warmup", optim.warmup >= 0), ("floor", 0 <= optim.floor <= 1))  # fmt: skip
    for key, fine in limits:
        if not fine:  # also false for nan
            raise UserError("%s: optim.%s: %s is out of range" % (where, key, getattr(optim, key)))


def _apply_set(raw: Dict[str, Any], item: str) -> None:
    key, sign, text = item.partition("=")
    names = key.split(".")
    if not sign or not all(names):
        raise UserError("--set %s: expected section.key=value, such as --set optim.lr=2e-5" % item)
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise UserError("--set %s: the value is not valid YAML" % item) from None
    node = raw
    for name in names[:-1]:
        child = node.setdefault(name, {})
        if not isinstance(child, dict):
            raise UserError("--set %s: %s is not a section" % (item, name))
        node = child
    node[names[-1]] = value


def _struct_of(annotation: Any) -> Any:
    """The Section behind an annotation such as Optional[Export], or None."""
    options = getattr(annotation, "__args__", None) or (annotation,)
    return next((o for o in options if isinstance(o, type) and issubclass(o, msgspec.Struct)), None)


def _fields(struct: Any) -> Dict[str, Any]:
    """Key in the file -> annotation."""
    hints = {}
    for base in reversed(struct.__mro__):
        hints.update(getattr(base, "__annotations__", {}))
    return {outer: hints[inner] for outer, inner in zip(struct.__struct_encode_fields__, struct.__struct_fields__)}


def _refuse_unknown(raw: Any, struct: Any, where: str, prefix: str) -> None:
    if not isinstance(raw, dict):
        return  # msgspec says what was expected
    known = _fields(struct)
    for key, value in raw.items():
        if key not in known:
            near = difflib.get_close_matches(str(key), list(known), 1)
            hint = 'Did you mean "%s"?' % near[0] if near else "Known here: %s." % ", ".join(known)
            raise UserError("%s: %s%s: unknown key. %s" % (where, prefix, key, hint))
        child = _struct_of(known[key])
        if child is not None:
            _refuse_unknown(value, child, where, "%s%s." % (prefix, key))


def _number_strings(raw: Any, struct: Any) -> Any:
    """YAML 1.1 reads 1e-5 as a string; where a float belongs, take it as the number that was meant."""
    if not isinstance(raw, dict):
        return raw
    known, out = _fields(struct), dict(raw)
    for key, value in raw.items():
        annotation = known.get(key)
        child = _struct_of(annotation)
        if child is not None:
            out[key] = _number_strings(value, child)
        elif annotation is float:
            out[key] = _as_number(value)
        elif annotation == List[float] and isinstance(value, list):
            out[key] = [_as_number(v) for v in value]
    return out


def _as_number(value: Any) -> Any:
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _plain(message: str) -> str:
    """msgspec's "Expected `int`, got `str` - at `$.a.b`" -> "a.b: expected int, got str"."""
    text, _, place = message.replace("`", "").partition(" - at $.")
    text = text[0].lower() + text[1:]
    if text.startswith("object missing required field "):
        name = text.rsplit(" ", 1)[1]
        return "%s: missing. It has no default." % (place + "." + name if place else name)
    return "%s: %s" % (place, text) if place else text
