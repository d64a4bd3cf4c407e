"""GPUs and what connects them: figures of data sheets, and how much of the peak training has been seen to reach. No torch."""

import difflib
import re
import shutil
import subprocess
from typing import Dict, List, NamedTuple, Optional, Tuple

from ..errors import UserError

CONTEXT_GIB = 1.2  # CUDA context, libraries' kernels, NCCL's buffers: on the card, not in torch's figures
RESERVE = 0.03  # of the card: the allocator's holes, blocks that do not fit into each other


class Gpu(NamedTuple):
    """``gib``: what CUDA can hand out (ECC and firmware taken off). ``tflops``: dense fp16 or bf16. ``gbs``: memory bandwidth,
    10^9 bytes a second. ``bf16``: computes in it. ``link``: how most boxes connect it. ``mfu``: the share of ``tflops`` that the
    blocks' arithmetic reaches, recomputation counted as work; ``source``: where that comes from. ``compiled``: the same with
    run.compile, ``fp8``: and with run.fp8, of the same peak; None where nobody has measured it."""

    gib: float
    tflops: float
    gbs: float
    bf16: bool
    link: str
    mfu: float
    source: str
    compiled: Optional[float] = None
    fp8: Optional[float] = None


COMPILED = "measured with run.compile on an H200, benchmarks/results"
MEASURED = "measured: one stage, plain blocks, benchmarks/results"
PUBLISHED = "from published rates of pipeline training on eight of them"
ASSUMED = "assumed, not measured"
GPUS = {
    "v100-16g": Gpu(15.77, 125, 900, False, "nvlink", 0.40, PUBLISHED),
    "v100-32g": Gpu(31.74, 125, 900, False, "nvlink", 0.40, PUBLISHED),
    "t4": Gpu(14.75, 65, 320, False, "pcie3", 0.30, ASSUMED),
    "a10-24g": Gpu(22.06, 125, 600, True, "pcie4", 0.40, ASSUMED),
    "l4": Gpu(21.96, 121, 300, True, "pcie4", 0.35, ASSUMED),
    "a6000-48g": Gpu(47.40, 155, 768, True, "pcie4", 0.40, ASSUMED),
    "a100-40g": Gpu(39.39, 312, 1555, True, "nvlink", 0.45, PUBLISHED),
    "a100-80g": Gpu(79.15, 312, 2039, True, "nvlink", 0.45, PUBLISHED),
    "l40s": Gpu(44.32, 362, 864, True, "pcie4", 0.35, ASSUMED),
    "3090": Gpu(23.69, 71, 936, True, "pcie4", 0.40, ASSUMED),
    "4090": Gpu(23.53, 165, 1008, True, "pcie4", 0.40, ASSUMED),
    "5090": Gpu(31.36, 210, 1792, True, "pcie5", 0.40, ASSUMED),
    "h100-80g": Gpu(79.10, 989, 3350, True, "nvlink", 0.355, MEASURED, 0.60, 0.75),
    "h200": Gpu(139.72, 989, 4800, True, "nvlink", 0.355, ASSUMED, 0.60, 0.75),
    "b200": Gpu(178.35, 2250, 8000, True, "nvlink", 0.30, ASSUMED),
}  # type: Dict[str, Gpu]
ALIASES = {"v100": "v100-32g", "a100": "a100-80g", "h100": "h100-80g", "a10": "a10-24g", "a6000": "a6000-48g"}
FP8 = ("l4", "l40s", "4090", "5090", "h100-80g", "h200", "b200")
PINNED = ("v100", "t4")  # cards that the pinned stack is for: the current one has no code for them

# What CUDA calls a card -> our name; the first part that occurs in it. Memory decides between two sizes.
CUDA_NAMES = (
    ("V100", ("v100-16g", "v100-32g")), ("Tesla T4", ("t4",)), ("A100", ("a100-40g", "a100-80g")), ("A10", ("a10-24g",)),
    ("L40S", ("l40s",)), ("NVIDIA L4", ("l4",)), ("RTX A6000", ("a6000-48g",)), ("RTX 3090", ("3090",)), ("RTX 4090", ("4090",)),
    ("RTX 5090", ("5090",)), ("H100", ("h100-80g",)), ("H200", ("h200",)), ("B200", ("b200",)),
)  # fmt: skip


class Link(NamedTuple):
    """One direction between neighbours: ``gbs`` 10^9 bytes a second as seen by NCCL, ``us`` microseconds for the first byte."""

    gbs: float
    us: float


LINKS = {
    "nvlink": Link(120.0, 10), "pcie3": Link(10.0, 15), "pcie4": Link(20.0, 15), "pcie5": Link(40.0, 15),
    "eth10": Link(1.1, 50), "eth25": Link(2.7, 50), "eth100": Link(10.0, 40), "eth400": Link(40.0, 40),
    "ib100": Link(11.0, 15), "ib400": Link(45.0, 15),
}  # type: Dict[str, Link]  # fmt: skip


def _known(name: str, table: Dict[str, object], what: str) -> None:
    if name not in table:
        near = difflib.get_close_matches(name, list(table), 1)
        raise UserError("%s: %r is not known%s (known: %s)" % (
            what, name, "; did you mean %s?" % near[0] if near else "", ", ".join(table)))  # fmt: skip


def gpu_named(name: str) -> str:
    """``name`` as the user wrote it -> a key of GPUS. Raises UserError listing the known ones."""
    plain = re.sub(r"^(nvidia|geforce|rtx|[ _-])+", "", name.strip().lower())
    plain = ALIASES.get(plain, plain)
    _known(plain, dict(GPUS), "--gpu")
    return plain


def link_named(name: str) -> Link:
    """Raises UserError listing the known ones."""
    _known(name, dict(LINKS), "--link")
    return LINKS[name]


def from_cuda(device: str, gib: float) -> Optional[str]:
    """A card as CUDA names it, with ``gib`` of memory -> a key of GPUS, None when it is not in the table."""
    for part, names in CUDA_NAMES:
        if part in device:
            near = min(names, key=lambda name: abs(GPUS[name].gib - gib))
            return near if abs(GPUS[near].gib - gib) < 0.15 * gib else None
    return None


class Here(NamedTuple):
    """A GPU of this machine as nvidia-smi tells of it; ``card``: a key of GPUS, None when it is not in the table."""

    number: str  # as CUDA_VISIBLE_DEVICES counts
    uuid: str
    card: Optional[str]
    driver: str


def cards_here() -> List[Here]:
    """All of them, in nvidia-smi's order; [] when there is none, or the driver does not answer."""
    if shutil.which("nvidia-smi") is None:
        return []
    command = ["nvidia-smi", "--query-gpu=index,uuid,name,memory.total,driver_version", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return []
    rows = [[cell.strip() for cell in line.split(",")] for line in done.stdout.splitlines()] if done.returncode == 0 else []
    return [
        Here(number, uuid, from_cuda(name, float(mib) / 1024) if mib.isdigit() else None, driver)
        for number, uuid, name, mib, driver in (row for row in rows if len(row) == 5)
    ]


def card_here() -> Optional[str]:
    """The first GPU of this machine as a key of GPUS; None when there is none, or none that is in the table."""
    return next((here.card for here in cards_here()), None)


def peak_flops(device: str) -> float:
    """Dense half-precision FLOP/s of a card as CUDA names it; 0.0 where it is not in the table."""
    if "H100 PCIe" in device:  # slower than the others of that name
        return 756e12
    names = next((names for part, names in CUDA_NAMES if part in device), None)
    return GPUS[names[0]].tflops * 1e12 if names else 0.0


def share_of_peak(name: str, compiled: bool, fp8: bool = False) -> Tuple[float, str]:
    """What a card's arithmetic reaches of its peak, and where that number comes from."""
    card = GPUS[name]
    if compiled and fp8 and card.fp8 is not None:
        return card.fp8, COMPILED.replace("run.compile", "run.compile and run.fp8")
    return (card.compiled, COMPILED) if compiled and card.compiled is not None else (card.mfu, card.source)


def usable(name: str) -> float:
    """GiB of a card that torch may have: all but the context and the reserve."""
    gib = GPUS[name].gib
    return gib * (1 - RESERVE) - CONTEXT_GIB


def stack_of(name: str) -> str:
    """The software that trains on this card: "pinned" (torch 1.13) on V100 and T4, "current" on the others."""
    return "pinned" if name.startswith(PINNED) else "current"
