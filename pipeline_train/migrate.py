"""gdGPT's training config (JSON or YAML) -> run.yaml, with an account of everything that could not come along.

gdGPT (the ancestor) keeps its own keys beside DeepSpeed's in one file: ``configs/ds_config_pp.yml`` of
github.com/CoinCheung/gdGPT names them all. Each key is taken exactly once; whatever is left over is reported.
"""

from typing import Any, Dict, List, Tuple

import yaml

from . import config as run_config
from .config_reading import NotYaml, read_yaml
from .errors import UserError
from .migrate_keys import MISSING, Old, deepspeed_section

# Keys whose effect pipedock always has, so that nothing is lost: (path, what stands in their place).
REPLACED = (
    ("zero_allow_untested_optimizer", "pipedock sets it where DeepSpeed needs it"),
    ("zero_force_ds_cpu_optimizer", "pipedock chooses the optimizer for offloading"),
    ("use_flash_attn", "the fastest exact attention of the GPU is chosen by itself"),
    ("dataloader_drop_last", "the last step of an epoch is filled with empty rows, so no sample is lost"),
    ("fp16.auto_cast", "the forward pass casts its own inputs"),
    ("fp16.fused_optimizer", "the optimizer is fused on GPUs by itself"),
)
NORM_KEYWORDS = {"bias", "[a-zA-Z]*norm"}
SCHEDULES = {"WarmupCosineLR": "cosine", "WarmupDecayLR": "linear", "WarmupLR": "constant"}


def migrate(text: str, where: str = "ds_config_pp.yml") -> Tuple[str, List[Dict[str, str]], List[str]]:
    """Returns (run.yaml text that loads, notes [{key, note}], keys that could not be carried over).

    Raises UserError when the file is not a gdGPT training config.
    """
    try:
        raw = read_yaml(text)  # JSON is YAML
    except NotYaml as error:
        raise UserError("%s: neither JSON nor YAML: %s" % (where, error)) from None
    if not isinstance(raw, dict) or "model_topo" not in raw:
        raise UserError("%s: no model_topo section; is this a gdGPT pipeline training config (configs/ds_config_pp.yml)?" % where)
    old = Old(raw, where)
    parallel = _parallel(old)
    new = {
        "run": {"out": str(old.take("save_path", "./checkpoints/"))},
        "model": _model(old),
        "data": {
            "train": old.need("data_path", str), "seq_len": old.need("max_seq_len", int),
            "template": "default", "pack": False,
        },
        "parallel": parallel,
        "batch": _batch(old, parallel["data"]),
        "optim": _optim(old),
        "train": {"epochs": _epochs(old), "log_every": int(old.number("steps_per_print", 10))},
    }  # type: Dict[str, Any]  # fmt: skip
    old.note("data.pack", "false keeps gdGPT's one padded sample per row; true is several times faster on short samples, "
             "and batch.global then counts full rows")  # fmt: skip
    for path, why in REPLACED:
        if old.take(path, MISSING) is not MISSING:
            old.note(path, why)
    passed = deepspeed_section(old, parallel)
    if passed:
        new["deepspeed"] = passed
    run_config.parse(new, where)  # what we write must load
    return yaml.safe_dump(new, sort_keys=False, allow_unicode=True), old.notes, old.left()


def _parallel(old: Old) -> Dict[str, Any]:
    axes, dims = old.need("model_topo.process_topology.axes", list), old.need("model_topo.process_topology.dims", list)
    sizes = dict(zip(axes, dims))
    wrong = len(axes) != len(dims) or not all(isinstance(d, int) and d > 0 for d in dims) or "pipe" not in sizes
    extra = [a for a in sizes if a not in ("pipe", "data") and sizes[a] != 1]
    if wrong or extra:
        raise UserError(
            "%s: model_topo.process_topology: axes %s with dims %s; pipedock has the axes pipe and data" % (old.where, axes, dims)
        )
    out = {"pipe": sizes["pipe"], "data": sizes.get("data", 1)}
    parts = old.take("model_topo.parts", "auto")
    if isinstance(parts, str) and parts != "auto":
        old.note("model_topo.parts", 'DeepSpeed\'s method "%s" became "auto", which balances the stages by their work' % parts)
        parts = "auto"
    out["parts"] = parts
    out["recompute"] = "blocks" if old.take("use_grad_ckpt", False) else "none"
    order = [a for a in axes if a in ("pipe", "data")]
    if order == ["data", "pipe"]:
        out["axes"] = order
    return out


def _epochs(old: Old) -> int:
    epochs = old.number("n_epoches", 1)
    if epochs != int(epochs):
        old.note("n_epoches", "%g became %d; train.max_steps ends a run within an epoch" % (epochs, int(epochs)))
    return int(epochs)


def _model(old: Old) -> Dict[str, Any]:
    scratch = bool(old.take("from_scratch", False))
    fp16, bf16 = old.take("fp16.enabled", False), old.take("bf16.enabled", False)
    dtype = "fp16" if fp16 else "bf16" if bf16 else "fp32"
    if fp16 and bf16:
        old.note("bf16.enabled", "fp16.enabled is true as well, and became model.dtype: fp16; write bf16 if you meant that")
    path = old.need("model_path", str)
    old.note("model_path", "gdGPT's converted pipeline weights are not read: point model.path at the Hugging Face "
                           "folder or hub name they came from")  # fmt: skip
    return {"path": path, "dtype": dtype, "init": "random" if scratch else "pretrained"}


def _batch(old: Old, data: int) -> Dict[str, int]:
    micro, total = old.take("train_micro_batch_size_per_gpu"), old.take("train_batch_size")
    steps = old.take("gradient_accumulation_steps")
    given = {"train_micro_batch_size_per_gpu": micro, "train_batch_size": total, "gradient_accumulation_steps": steps}
    for key, value in given.items():
        if value is not None and (not isinstance(value, int) or value < 1):
            raise UserError("%s: %s: expected a positive integer, got %r" % (old.where, key, value))
    micro = micro or (total // (steps * data) if total and steps else 1)
    if total and steps and total != micro * data * steps:
        old.note("gradient_accumulation_steps", "%d contradicts %d rows a step of micro-batches of %d on %d replicas: left out, "
                 "train_batch_size holds" % (steps, total, micro, data))  # fmt: skip
    return {"micro": micro, "global": total or micro * data * (steps or 1)}


def _optim(old: Old) -> Dict[str, Any]:
    kind = str(old.take("optimizer.type", "AdamW"))
    if kind.lower() not in ("adam", "adamw", "lion"):
        raise UserError("%s: optimizer.type: %s is not implemented (AdamW, Adam and Lion are)" % (old.where, kind))
    if kind.lower() == "adam":
        old.note("optimizer.type", "Adam became AdamW, as DeepSpeed itself does (adam_w_mode defaults to true)")
    lion = kind.lower() == "lion"
    lr = old.number("optimizer.params.lr", 1e-4 if lion else 1e-3)
    betas = old.take("optimizer.params.betas", [0.9, 0.99] if lion else [0.9, 0.999])
    out = {"type": "lion" if lion else "adamw", "lr": lr, "betas": betas,
           "weight_decay": old.number("optimizer.params.weight_decay", 0.0)}  # type: Dict[str, Any]  # fmt: skip
    if not lion:
        out["eps"] = old.number("optimizer.params.eps", 1e-8)
    # DeepSpeed 0.9.2 clips only when told to.
    out["clip"] = old.number("gradient_clipping", 0.0)
    keywords = old.take("optimizer.no_wd_kws", [])
    if set(keywords) != NORM_KEYWORDS:
        old.note(
            "optimizer.no_wd_kws", "%s: pipedock leaves biases and norm weights undecayed, nothing else" % (keywords or "absent")
        )
    out.update(_schedule(old, lr))
    if old.take("fp16.enabled", False):
        out["loss_scale"] = {
            "initial": 2 ** int(old.number("fp16.initial_scale_power", 16)),
            "window": int(old.number("fp16.loss_scale_window", 1000)),
            "hysteresis": int(old.number("fp16.hysteresis", 2)),
            "min": old.number("fp16.min_loss_scale", 1.0),
        }
        if old.number("fp16.loss_scale", 0):
            old.note("fp16.loss_scale", "a fixed scale became the dynamic one")
    else:
        old.taken.update(
            "fp16." + k for k in ("initial_scale_power", "loss_scale_window", "hysteresis", "min_loss_scale", "loss_scale")
        )
    return out


def _schedule(old: Old, lr: float) -> Dict[str, Any]:
    kind = old.take("scheduler.type")
    if kind is None:
        return {"schedule": "constant", "warmup": 0}
    if kind not in SCHEDULES:
        raise UserError("%s: scheduler.type: %s has no counterpart (known: %s)" % (old.where, kind, ", ".join(SCHEDULES)))
    out = {"schedule": SCHEDULES[kind], "warmup": int(old.number("scheduler.params.warmup_num_steps", 1000))}  # type: Dict[str, Any]
    if kind == "WarmupCosineLR":
        out["floor"] = old.number("scheduler.params.cos_min_ratio", 0.0001)
    elif kind == "WarmupDecayLR":
        out["floor"] = 0.0
    for key in ("warmup_min_ratio", "warmup_min_lr"):
        if old.number("scheduler.params." + key, 0.0):
            old.note("scheduler.params." + key, "pipedock's warmup starts from lr / warmup steps")
    if kind != "WarmupCosineLR" and old.number("scheduler.params.warmup_max_lr", lr) != lr:
        old.note("scheduler.params.warmup_max_lr", "optimizer.params.lr is the rate after warmup")
    old.taken.add("scheduler.params.total_num_steps")  # computed from epochs, there as here
    return out
