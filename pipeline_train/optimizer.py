"""The optimizer and its schedule: AdamW or Lion, on the device or, offloaded, on the CPU."""

import logging
import math
from typing import Any, Callable, Dict, List, Optional

import torch

from . import compat, native
from .config_schema import Optim
from .plan.memory import LION_PIECE

log = logging.getLogger("pipedock")


def learning_rate(optim: Optim, step: int, total: int) -> float:
    """Learning rate of step ``step`` (from 0) of ``total``: linear warm-up, then cosine, linear or constant, down to
    floor x lr. A pure function, so that a resumed run needs no scheduler state."""
    if step < optim.warmup:
        return optim.lr * (step + 1) / optim.warmup
    if optim.schedule == "constant":
        return optim.lr
    done = min(1.0, (step - optim.warmup) / max(1, total - optim.warmup))
    left = 0.5 * (1.0 + math.cos(math.pi * done)) if optim.schedule == "cosine" else 1.0 - done
    return optim.lr * (optim.floor + (1.0 - optim.floor) * left)


def build(groups: List[Dict[str, Any]], optim: Optim, cuda: bool, offload: bool) -> torch.optim.Optimizer:
    """``groups``: stages.parameter_groups. DeepSpeed compiles nothing for it but, offloaded, its own optimizer where that
    builds; elsewhere torch's or lion-pytorch's does the step on the CPU."""
    keys: Dict[str, Any] = {"lr": optim.lr, "betas": tuple(optim.betas)}
    if optim.type == "adamw":
        keys["eps"] = optim.eps
    if offload:
        built = _deepspeed_cpu(groups, optim.type, keys)
        if built is not None:
            return built
    if optim.type == "lion":
        from lion_pytorch import Lion

        # One kernel for a step, where it can run; prepare has refused ``optim.use_triton: true`` where it cannot.
        triton = optim.use_triton is not False and native.without_triton(int(cuda and not offload)) is None
        lion = Lion(groups, use_triton=triton, **keys)
        lion.update_fn = in_pieces(lion.update_fn)
        return lion
    if compat.fused_adamw(cuda and not offload):
        keys["fused"] = True
    return torch.optim.AdamW(groups, **keys)


def in_pieces(update: Callable[..., None]) -> Callable[..., None]:
    """lion-pytorch's update of one tensor, by pieces of it: the same numbers. Torch's way makes two temporaries of the tensor's
    size, the Triton kernel copies weights and momentum when it tunes itself: 8 bytes a parameter, for a flat partition all at
    once, which is what Lion was to save."""

    def update_pieces(p: torch.Tensor, grad: torch.Tensor, exp_avg: torch.Tensor, *rest: Any) -> None:
        for piece in zip(p.split(LION_PIECE), grad.split(LION_PIECE), exp_avg.split(LION_PIECE)):
            update(*piece, *rest)

    return update_pieces


def _deepspeed_cpu(groups: List[Dict[str, Any]], kind: str, keys: Dict[str, Any]) -> Optional[torch.optim.Optimizer]:
    """DeepSpeedCPUAdam or DeepSpeedCPULion, None where it cannot be built."""
    reason = native.without_cpu_adam()
    if reason is None:
        try:
            if kind == "lion":
                from deepspeed.ops.lion import DeepSpeedCPULion  # since 0.11

                return DeepSpeedCPULion(groups, **keys)
            from deepspeed.ops.adam import DeepSpeedCPUAdam

            return DeepSpeedCPUAdam(groups, adamw_mode=True, **keys)
        except Exception as error:  # noqa: BLE001 - a compiler, its headers, nvcc, a lock: whatever is missing, torch can do it
            reason = " ".join(str(error.__cause__ or error).split())[:300] or type(error).__name__
    log.warning("parallel.offload: DeepSpeed's CPU %s cannot be built (%s); a slower one takes its place", kind, reason)
    return None


def set_step(optimizer: torch.optim.Optimizer, group: Dict[str, Any], state: Dict[str, Any], step: int) -> None:
    """Write the step counter into a partition's ``state``, as this optimizer keeps it. lion-pytorch has none."""
    if isinstance(optimizer, torch.optim.AdamW):
        on_device = group.get("fused") or group.get("capturable")
        device = group["params"][0].device if on_device else "cpu"
        state["step"] = torch.tensor(float(step), dtype=torch.float32, device=device)
    elif type(optimizer).__module__.startswith("deepspeed."):
        state["step"] = step
