"""Every difference between the two tested stacks, nothing else: one row of a table, or one function, per difference.

current  DeepSpeed 0.19.8, torch 2.13, Python >= 3.10
pinned   DeepSpeed 0.9.2,  torch 1.13.1, Python 3.8
"""

import functools
import glob
import importlib.util
import inspect
import json
import os
import shutil
import subprocess
import sys
from importlib import metadata
from typing import Any, Dict, List, NamedTuple, Optional, Tuple

from . import native
from .errors import RunFailed, UserError

TESTED = ("0.9.2", "0.19.8")


class Refused(NamedTuple):
    """DeepSpeed releases ``first`` <= version <= ``last`` train wrongly; ``reason`` is the evidence, in a few words."""

    first: Tuple[int, ...]
    last: Tuple[int, ...]
    reason: str


# Remove a row when nobody can install that release any more. Test: tests/unit/test_train_compat.py.
REFUSED = (
    Refused((0, 16, 0), (0, 18, 2), "its pipeline sums gradients over micro-batches instead of averaging them (DeepSpeed #7773)"),
    Refused((0, 18, 3), (0, 19, 2), "its pipeline divides gradients again at every stage boundary, so early stages barely learn "
                                    "(DeepSpeed #8152, #8154), and 0.18.3 and 0.18.4 hang"),
)  # fmt: skip
PACKAGES = ("deepspeed", "torch", "transformers", "tokenizers", "safetensors", "numpy", "msgspec", "lion-pytorch")


def versions() -> Dict[str, Optional[str]]:
    """Installed version of every package the training depends on, read without importing any."""
    found = {"python": "%d.%d.%d" % sys.version_info[:3]}  # type: Dict[str, Optional[str]]
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def release(version: str) -> Tuple[int, ...]:
    """ "0.19.8+abc" -> (0, 19, 8)."""
    numbers = []
    for part in version.split("+")[0].split(".")[:3]:
        digits = "".join(c for c in part if c.isdigit())
        numbers.append(int(digits or 0))
    return tuple(numbers)


def stack(found: Dict[str, Optional[str]]) -> str:
    """Which stack the plan counts with (plan.cards.stack_of's names): torch before 2 keeps and copies more."""
    return "pinned" if release(found["torch"] or "") < (2,) else "current"


def check_deepspeed(version: Optional[str]) -> None:
    """Refuse a DeepSpeed release whose gradients are known to be wrong, whatever loss it reports. Raises UserError."""
    if version is None:
        raise UserError('deepspeed is not installed; install "pipedock[train]", which brings %s' % TESTED[-1])
    for row in REFUSED:
        if row.first <= release(version) <= row.last:
            raise UserError("deepspeed %s is refused: %s. Install %s." % (version, row.reason, " or ".join(reversed(TESTED))))


def has_bf16(version: Optional[str]) -> bool:
    """bf16 pipelines crash at the first gradient reduction in DeepSpeed before 0.9.3 (#3441)."""
    return version is None or release(version) >= (0, 9, 3)


def check_dtype(version: Optional[str], dtype: str) -> None:
    """Raises UserError for bf16 where DeepSpeed has none."""
    if dtype == "bf16" and not has_bf16(version):
        raise UserError("model.dtype: bf16 does not work in deepspeed %s (fixed in 0.9.3); use fp16, fp32 or deepspeed %s"
                        % (version, TESTED[-1]))  # fmt: skip


def has_cpu_accelerator(version: Optional[str]) -> bool:
    """DeepSpeed brings one since 0.9.3; before, it takes somebody's, under the one name that it looks for."""
    if version is None or release(version) >= (0, 9, 3):
        return True
    return importlib.util.find_spec("intel_extension_for_deepspeed") is not None


def check_cpu(version: Optional[str]) -> None:
    """Refuse to train without a GPU where DeepSpeed cannot. Raises UserError."""
    if not has_cpu_accelerator(version):
        raise UserError("deepspeed %s trains on GPUs only, and none is here; on CPUs use deepspeed %s (Python >= 3.10)"
                        % (version, TESTED[-1]))  # fmt: skip


def notes(found: Dict[str, Optional[str]]) -> List[str]:
    """What a user should know about an accepted stack."""
    if found["deepspeed"] not in TESTED:
        return ["deepspeed %s is not one of the tested releases (%s)" % (found["deepspeed"], ", ".join(TESTED))]
    return []


class Gpus(NamedTuple):
    """CUDA devices torch can use: how many, the first one's name, whether all of them compute in bf16, in fp8."""

    number: int
    name: str
    bf16: bool
    fp8: bool = False


def gpus() -> Gpus:
    """Asks torch in a process of its own, so that the caller neither waits for the import nor opens a CUDA context.

    Raises RunFailed when torch cannot be imported."""
    if not (
        glob.glob("/dev/nvidia[0-9]*") or os.path.exists("/dev/kfd") or os.path.exists("/dev/dxg") or shutil.which("nvidia-smi")
    ):
        return Gpus(0, "", False)
    code = (
        "import json, torch; n = torch.cuda.device_count(); print(json.dumps([n, torch.cuda.get_device_name(0) if n else '',"
        " all(torch.cuda.get_device_capability(i) >= (8, 0) for i in range(n)),"
        " torch.version.hip is None and all(torch.cuda.get_device_capability(i) >= (8, 9) for i in range(n))]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if done.returncode:
        raise RunFailed("torch cannot be imported: %s" % (done.stderr.strip().splitlines() or ["no message"])[-1])
    return Gpus(*json.loads(done.stdout.strip().splitlines()[-1]))


def quiet_cpu_ops() -> None:
    """DeepSpeed 0.19 compiles a shared-memory all-reduce for CPU ranks on first use: the run dies without a compiler, and
    two-rank inference crashes with it. Plain gloo does the same work. Call before init_distributed; no effect on a GPU."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def clip_fp32(optimizer: Any, version: Optional[str]) -> None:
    """ZeRO-1 of 0.9.2 (and on, 0.12.6 no longer) measures and clips gradients in fp16 only: an fp32 run would neither clip nor
    know its norm. Do it between its look for overflows and its step, by its own means. No effect on fp16 and other releases.

    ``optimizer``: ZeRO's wrapper, engine.optimizer."""
    import torch

    if version is None or release(version) >= (0, 12, 6) or optimizer.dtype == torch.float16:
        return
    look = optimizer.check_overflow

    def look_and_clip(*args: Any, **kwargs: Any) -> None:
        look(*args, **kwargs)
        if not optimizer.overflow:
            norm = optimizer.scaled_global_norm()
            optimizer._global_grad_norm = norm / optimizer.loss_scale  # 1, unless a test plants another
            flat = optimizer.single_partition_of_fp32_groups
            grads = [p.grad for p in flat] if optimizer.cpu_offload else list(optimizer.averaged_gradients.values())
            optimizer.unscale_and_clip_grads(grads, norm)

    optimizer.check_overflow = look_and_clip


def stop_timing(engine: Any) -> None:
    """DeepSpeed's throughput timer waits for the GPU before every micro-batch, which then has nothing to do until the host has
    caught up; 0.9.2 cannot be told not to. Nobody reads it here."""
    engine.tput_timer.start = engine.tput_timer.stop = lambda *args, **kwargs: None


def has_sdpa() -> bool:
    """torch.nn.functional.scaled_dot_product_attention came with torch 2; before, attention is computed step by step."""
    from torch.nn import functional

    return hasattr(functional, "scaled_dot_product_attention")


def has_custom_ops() -> bool:
    """torch.library.custom_op, since torch 2.4: an operator of ours inside a compiled block."""
    import torch

    return release(torch.__version__) >= (2, 4)


def has_wide_products() -> bool:
    """addmm(out_dtype=), on CUDA: 16-bit factors, an fp32 sum. Since torch 2.8."""
    import torch

    return release(torch.__version__) >= (2, 8)


def fused_adamw(cuda: bool) -> bool:
    """torch.optim.AdamW(fused=True): on CUDA since torch 2.0, on CPU (about ten times faster there) since 2.4."""
    import torch

    if "fused" not in inspect.signature(torch.optim.AdamW).parameters:
        return False
    return cuda or release(torch.__version__) >= (2, 4, 0)


def has_grouped_queries(version: Optional[str]) -> bool:
    """transformers' llama reads num_key_value_heads since 4.31; before, it cannot be a reference for grouped queries."""
    return version is not None and release(version) >= (4, 31)


def constant(function: Any) -> Any:
    """Decorator: computed once for the same arguments, and a constant of a compiled graph instead of being computed there.
    torch before 2.1 compiles nothing."""
    import torch

    cached = functools.lru_cache(maxsize=None)(function)

    def kept(*args: Any) -> Any:  # the cache's own wrapper would be looked through, down to the function
        return cached(*args)

    mark = getattr(getattr(torch, "compiler", None), "assume_constant_result", None)
    marked: Any = kept if mark is None else mark(kept)
    marked.cache_clear = cached.cache_clear
    return marked


def check_compile(torch_version: Optional[str], gpus: int) -> None:
    """Raises UserError where torch.compile, or what it needs, is missing: run.compile."""
    if torch_version is None or release(torch_version) < (2, 6, 0):
        raise UserError("run.compile: torch %s cannot compile the blocks, 2.6 and later can; leave it out" % torch_version)
    missing = native.without_triton(gpus) if gpus else native.without_cpp()
    if missing:
        raise UserError("run.compile: %s; install it, or leave run.compile out" % missing)


def check_selective(torch_version: Optional[str]) -> None:
    """Raises UserError where torch cannot choose what to keep of a block (since 2.4): parallel.recompute: selective."""
    if torch_version is None or release(torch_version) < (2, 4):
        raise UserError("parallel.recompute: torch %s cannot do selective, 2.4 and later can; use blocks" % torch_version)
