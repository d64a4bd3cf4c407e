"""What this machine trains on, and whether it can train what run.yaml asks for."""

import math
import os
from typing import Callable, Dict, Optional, Tuple

from . import compat, deepspeed_keys, hostfile, native, sinks
from .config_schema import RunConfig
from .errors import UserError
from .plan import cards

Say = Callable[[str], None]  # takes a line for the user


def check_machine(
    run: RunConfig, where: str, say: Say, here: int, host: Optional[hostfile.Host]
) -> Tuple[Dict[str, Optional[str]], int]:  # fmt: skip
    """-> what is installed, and GPUs (0: train on the CPU). ``here``: ranks on this machine; ``host``: what a hostfile says of it.
    Raises UserError."""
    found = compat.versions()
    compat.check_deepspeed(found["deepspeed"])
    for note in compat.notes(found):
        say(note)
    sinks.check(run, where)
    gpus = resolve_device(run, found, where, say, here)
    if host is not None:
        hostfile.check(host, here, gpus)
    return found, gpus


def resolve_device(run: RunConfig, found: Dict[str, Optional[str]], where: str, say: Say, here: Optional[int] = None) -> int:
    """dtype by what the device can do; -> GPUs (0: train on the CPU). ``here``: ranks on this machine, None: all of them."""
    gpus = compat.Gpus(0, "", False) if os.environ.get("DS_ACCELERATOR") == "cpu" else compat.gpus()
    here = run.world if here is None else here
    if gpus.number and here > gpus.number:
        share = "" if here == run.world else "%d of them on this machine; " % here
        raise UserError(
            "%s: parallel: pipe %d x data %d needs %d GPUs, %sthis machine has %d. Lower them, or set DS_ACCELERATOR=cpu."
            % (where, run.parallel.pipe, run.parallel.data, run.world, share, gpus.number)
        )
    if not gpus.number:
        _say_unused(found.get("torch"), say)
        compat.check_cpu(found["deepspeed"])
    if run.model.dtype == "auto":
        run.model.dtype = "fp32" if not gpus.number else "bf16" if gpus.bf16 else "fp16"
        if run.model.dtype == "bf16" and not compat.has_bf16(found["deepspeed"]):
            run.model.dtype = "fp16"
    if not gpus.number and run.model.dtype == "fp16":
        raise UserError("%s: model.dtype: fp16 needs a GPU, and none is here; use fp32 or bf16" % where)
    if gpus.number and run.model.dtype == "bf16" and not gpus.bf16:
        raise UserError("%s: model.dtype: %s has no bf16; use fp16" % (where, gpus.name))
    compat.check_dtype(found["deepspeed"], run.model.dtype)
    scale = run.optim.loss_scale.initial
    if run.model.dtype == "fp16" and (scale < 1 or math.log2(scale) % 1):
        raise UserError("%s: optim.loss_scale.initial: must be a power of two, got %d" % (where, scale))
    deepspeed_keys.check(run.deepspeed, where, say)
    if run.parallel.recompute == "selective":
        compat.check_selective(found["torch"])
    if run.run.compile:
        compat.check_compile(found["torch"], gpus.number)
    if run.run.fp8:
        check_fp8(found["torch"], gpus, run.model.dtype, run.parallel.offload)
        if not run.run.compile:
            say("run.fp8: without run.compile the rounding takes longer than the products save")
    if run.optim.type == "lion" and native.without_lion():
        raise UserError("%s: optim.type: %s; install it, or use adamw" % (where, native.without_lion()))
    if run.optim.type == "lion" and run.optim.use_triton is True and native.without_triton(gpus.number):
        raise UserError("%s: optim.use_triton: %s; use false, or auto" % (where, native.without_triton(gpus.number)))
    if run.parallel.offload and gpus.number and native.without_cpu_adam():
        say("parallel.offload: %s, so DeepSpeed's CPU optimizer cannot be built; a slower one does the step"
            % native.without_cpu_adam())  # fmt: skip
    if run.parallel.offload and not gpus.number:
        say("parallel.offload: has no effect on the CPU")
        run.parallel.offload = False
    return gpus.number


def _say_unused(torch_version: Optional[str], say: Say) -> None:
    """A card that torch cannot use is not passed over in silence, unless the CPU was asked for."""
    unused = [] if os.environ.get("DS_ACCELERATOR") == "cpu" else cards.cards_here()
    if unused:
        say("WARNING: training on the CPU: nvidia-smi sees %d GPUs (driver %s), torch %s can use none. pip install a torch built "
            "for CUDA, not a +cpu one (pipedock preflight says more); DS_ACCELERATOR=cpu says that the CPU is meant"
            % (len(unused), unused[0].driver, torch_version))  # fmt: skip


def check_fp8(torch_version: Optional[str], gpus: compat.Gpus, dtype: str, offload: bool) -> None:
    """Raises UserError where a run cannot have run.fp8. On a CPU it can: the same numbers, slower than without."""
    if dtype != "bf16":
        raise UserError("run.fp8: is for bf16 runs, and this one is in %s; set model.dtype: bf16, or leave run.fp8 out" % dtype)
    if offload:
        raise UserError("run.fp8: does not go with parallel.offload; leave one of them out")
    if torch_version is None or compat.release(torch_version) < (2, 8):
        raise UserError("run.fp8: torch %s has not all that it needs, 2.8 and later have; leave it out" % torch_version)
    if gpus.number and not gpus.fp8:
        raise UserError("run.fp8: %s has no fp8, cards since Ada and Hopper have; leave it out" % gpus.name)
    if gpus.number and native.without_triton(gpus.number):  # torch.compile makes the weights' copies
        raise UserError("run.fp8: %s; install it, or leave run.fp8 out" % native.without_triton(gpus.number))
