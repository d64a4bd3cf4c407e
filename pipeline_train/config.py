"""run.yaml -> RunConfig: read, override, check. Imports msgspec and PyYAML only: a configuration is refused without torch."""

import os
from pathlib import Path
from typing import Any, Dict, Optional, Tuple, Union

import msgspec
import yaml

from .config_reading import NotYaml, number_strings, plain, read_yaml, refuse_unknown
from .config_schema import OWNED, RunConfig
from .errors import UserError

MOST = 2**31 - 1  # larger whole numbers overflow somewhere below
MOST_PROCESSES = 4096
INFINITE = float("inf")


def load(path: Union[str, Path], sets: Tuple[str, ...] = ()) -> RunConfig:
    """Read a run.yaml, apply ``a.b=c`` overrides, check it. Raises UserError, one line."""
    path = Path(path)
    try:
        raw = read_yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError('%s: no such file. Write one (README, "run.yaml") or name it with --config.' % path) from None
    except UnicodeDecodeError as error:
        raise UserError("%s: not UTF-8 text (%s); save it as UTF-8" % (path, error.reason)) from None
    except OSError as error:
        raise UserError("%s: cannot be read: %s" % (path, error.strerror)) from None
    except NotYaml as error:
        raise UserError("%s: not valid YAML: %s" % (path, error)) from None
    if not isinstance(raw, dict):
        found = "nothing" if raw is None else "a %s" % type(raw).__name__
        raise UserError("%s: expected sections such as run:, model:, data: and parallel:, found %s" % (path, found))
    for item in sets:
        _apply_set(raw, item)
    return parse(raw, path.name)


def parse(raw: Dict[str, Any], where: str = "run.yaml") -> RunConfig:
    """A mapping -> a checked RunConfig; ``where`` names the file in messages."""
    refuse_unknown(raw, RunConfig, where, "")
    try:
        config = msgspec.convert(number_strings(raw, RunConfig), RunConfig)
    except msgspec.ValidationError as error:
        raise UserError("%s: %s" % (where, plain(str(error), RunConfig, raw))) from None
    _check(config, where)
    _expand(config)
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
        if value is not None and value > MOST:
            raise UserError("%s: %s: %d is more than any run has (at most %d)" % (where, key, value, MOST))
    if not 0 <= config.run.seed <= MOST:
        raise UserError("%s: run.seed: must be between 0 and %d, got %d" % (where, MOST, config.run.seed))
    if isinstance(config.run.wandb, str) and not config.run.wandb.strip():
        raise UserError("%s: run.wandb: is empty; give true or the name of a W&B project, or remove the key" % where)
    if config.world > MOST_PROCESSES:
        raise UserError(
            "%s: parallel: pipe %d x data %d is %d processes, at most %d"
            % (where, config.parallel.pipe, config.parallel.data, config.world, MOST_PROCESSES)
        )
    if config.run.hang_s < 10:
        raise UserError("%s: run.hang_s: must be 10 or more seconds, got %d" % (where, config.run.hang_s))
    if config.data.seq_len is not None and config.data.seq_len < 8:
        raise UserError("%s: data.seq_len: must be 8 or more, got %d" % (where, config.data.seq_len))
    _check_paths(config, where)
    if config.serve is not None and (config.serve.shards < 1 or not 1 <= config.serve.port <= 65535):
        raise UserError(
            "%s: serve: port must be in 1..65535 and shards 1 or more, got %d and %d"
            % (where, config.serve.port, config.serve.shards)
        )
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


def _expand(config: RunConfig) -> None:
    """A shell does not see the ~ in a file."""
    config.run.out, config.model.path = os.path.expanduser(config.run.out), os.path.expanduser(config.model.path)
    data, export = config.data, config.export
    data.train = os.path.expanduser(data.train)
    data.eval = None if data.eval is None else os.path.expanduser(data.eval)
    if isinstance(data.cache, str):
        data.cache = os.path.expanduser(data.cache)
    if export is not None:
        export.dir = os.path.expanduser(export.dir)


def _check_paths(config: RunConfig, where: str) -> None:
    """Names no file can have are refused here, where the key is known."""
    data = config.data
    paths = {"run.out": config.run.out, "model.path": config.model.path, "data.train": data.train, "data.eval": data.eval,
             "data.cache": str(data.cache), "export.dir": config.export.dir if config.export else None}  # fmt: skip
    for key, path in paths.items():
        if path is None:
            continue
        if not path.strip():
            raise UserError("%s: %s: is empty" % (where, key))
        if "\0" in path or any(len(part.encode("utf-8", "surrogatepass")) > 255 for part in path.split("/")):
            raise UserError("%s: %s: no file can have this name: %.60r" % (where, key, path))


def _check_parallel(config: RunConfig, where: str) -> None:
    parallel, batch = config.parallel, config.batch
    if parallel.parts != "auto":
        if len(parallel.parts) != parallel.pipe:
            raise UserError(
                "%s: parallel.parts: has %d stages, parallel.pipe is %d. Make them equal."
                % (where, len(parallel.parts), parallel.pipe)
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
    limits = (
        ("lr", 0 < optim.lr < INFINITE, "above 0"), ("eps", 0 < optim.eps < INFINITE, "above 0"),
        ("clip", 0 <= optim.clip < INFINITE, "0 (off) or more"), ("weight_decay", 0 <= optim.weight_decay < INFINITE, "0 or more"),
        ("warmup", optim.warmup >= 0, "0 or more steps"), ("floor", 0 <= optim.floor <= 1, "0 to 1"),
    )  # fmt: skip
    for key, fine, allowed in limits:
        if not fine:  # also false for nan
            raise UserError("%s: optim.%s: %s is out of range (%s)" % (where, key, getattr(optim, key), allowed))
    scale = optim.loss_scale
    scale_limits = (
        ("min", 0 < scale.min < INFINITE, "above 0"),
        ("initial", scale.min <= scale.initial <= 2**32, "optim.loss_scale.min, which is %g, to 2^32" % scale.min),
        ("window", scale.window >= 1, "1 or more"), ("hysteresis", scale.hysteresis >= 1, "1 or more"),
        ("max_overflows", scale.max_overflows >= 1, "1 or more"),
    )  # fmt: skip
    for key, fine, allowed in scale_limits:
        if not fine:
            raise UserError("%s: optim.loss_scale.%s: %s is out of range (%s)" % (where, key, getattr(scale, key), allowed))


def _apply_set(raw: Dict[str, Any], item: str) -> None:
    key, sign, text = item.partition("=")
    names = key.split(".")
    if not sign or not all(names):
        raise UserError("--set %s: expected section.key=value, such as --set optim.lr=2e-5" % item)
    try:
        value = read_yaml(text)
    except NotYaml as error:
        raise UserError("--set %s: the value is not valid YAML: %s" % (item, error)) from None
    node = raw
    for name in names[:-1]:
        child = node.setdefault(name, {})
        if not isinstance(child, dict):
            raise UserError("--set %s: %s is not a section" % (item, name))
        node = child
    node[names[-1]] = value
