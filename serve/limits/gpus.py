"""Cards and drivers: what code an image holds, what driver its CUDA needs. Standard library only.

Sources: compute capabilities: developer.nvidia.com/cuda-gpus. Drivers: docs.nvidia.com/deploy/cuda-compatibility, "minor version
compatibility": every release of one CUDA major version runs on the driver of its first one.
"""

import re
from typing import List, NamedTuple, Optional, Tuple

from pipeline_train.errors import UserError
from pipeline_train.plan.cards import GPUS, gpu_named

from .engines import Engine

CPU = "cpu"  # a server that gets no GPU
CAPABILITY = {
    "v100-16g": (7, 0), "v100-32g": (7, 0), "t4": (7, 5), "a100-40g": (8, 0), "a100-80g": (8, 0), "a10-24g": (8, 6),
    "a6000-48g": (8, 6), "3090": (8, 6), "l4": (8, 9), "l40s": (8, 9), "4090": (8, 9), "h100-80g": (9, 0), "h200": (9, 0),
    "b200": (10, 0), "5090": (12, 0),
}  # fmt: skip
DRIVERS = {11: "450.80.02", 12: "525.60.13", 13: "580.65.06"}  # CUDA's major version -> the least driver
# The driver that came with the CUDA that an image advises, or is built with: with an older one the container toolkit may refuse.
ADVISED = {("tgi", "0.8"): ("11.8", "520.61.05"), ("tgi", "3.3"): ("12.2", "535.54.03"), ("vllm", "0.18"): ("12.9", "575.51.03")}


class Card(NamedTuple):
    """``name``: a key of GPUS, "cpu", or None where it is not known."""

    name: Optional[str]

    @property
    def known(self) -> bool:
        return self.name is not None

    @property
    def a(self) -> str:
        """ "a t4", "an a100-80g"."""
        return "%s %s" % ("an" if str(self.name)[0] in "ahl" else "a", self.name)

    @property
    def cpu(self) -> bool:
        return self.name == CPU

    @property
    def capability(self) -> Tuple[int, int]:
        """Of a GPU that is known."""
        return CAPABILITY[str(self.name)]

    @property
    def gib(self) -> float:
        return GPUS[str(self.name)].gib

    def flash(self, engine: Engine) -> bool:
        """Whether TGI's flash attention runs here: SM 7.5, 8.x and 9.0 in 0.8 (S/models/__init__.py:20-51@v0.8.2); 7.5 and all from
        8.0 on in 3.3 (S/layers/attention/cuda.py@v3.3.7). A card that is not known counts as one that can."""
        if not self.known:
            return True
        if self.cpu:
            return False
        major, minor = self.capability
        return self.capability == (7, 5) or (8 <= major <= 9 if engine.line == "0.8" else major >= 8)

    @property
    def bf16(self) -> bool:
        return not self.known or self.cpu or self.capability >= (8, 0)


def card_named(gpu: Optional[str]) -> Card:
    """Raises UserError listing the known names."""
    if gpu is None:
        return Card(None)
    return Card(CPU) if gpu.strip().lower() in (CPU, "none") else Card(gpu_named(gpu))


def has_code(engine: Engine, card: Card) -> List[str]:
    """Why an image's own libraries cannot run on a card; [] when they can."""
    if not card.known or card.cpu:
        return []
    if engine.line == "0.8" and card.capability >= (10, 0):
        return ["TGI %s holds no code for %s (its torch is 2.0 for CUDA 11.8, which ends at compute capability 9.0): use "
                "--version 3.3" % (engine.version, card.a)]  # fmt: skip
    return []


def driver_too_old(engine: Engine, driver: Optional[str]) -> List[str]:
    """Raises UserError for a driver version that is none."""
    if driver is None:
        return []
    major = int(engine.cuda.split(".")[0])
    if _numbers(driver) < _numbers(DRIVERS[major]):
        older = " or use --version 0.8 (%s or newer)" % DRIVERS[11] if engine.name == "tgi" and major > 11 else ""
        return ["driver %s is too old for CUDA %s in %s: install %s or newer%s" % (
            driver, engine.cuda, engine.image, DRIVERS[major], older)]  # fmt: skip
    return []


def driver_note(engine: Engine, driver: Optional[str]) -> List[str]:
    """What to know of a driver that is new enough, and older than the one that came with the image's CUDA."""
    cuda, advised = ADVISED[(engine.name, engine.line)]
    if driver is None or driver_too_old(engine, driver) or _numbers(driver) >= _numbers(advised):
        return []
    return ["driver %s runs CUDA %s by NVIDIA's minor-version compatibility; advised is one for CUDA %s (%s). If the container "
            "toolkit refuses it, set NVIDIA_DISABLE_REQUIRE=1" % (driver, engine.cuda, cuda, advised)]  # fmt: skip


def _numbers(driver: str) -> Tuple[int, ...]:
    if not re.fullmatch(r"\d+(\.\d+)*", driver.strip()):
        raise UserError("--driver %s: expected a version such as 515.65.01 (nvidia-smi prints it)" % driver)
    return tuple(int(part) for part in driver.strip().split("."))
