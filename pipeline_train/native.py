"""What is compiled on this machine before its first use, and why it cannot be. Standard library only, so that prepare can ask."""

import ast
import importlib.util
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Optional, Sequence


def _compiler(variable: str, names: Sequence[str]) -> bool:
    """Whether $CXX (or $CC), or else one of ``names``, is a program."""
    chosen = os.environ.get(variable)
    return any(shutil.which(name.split()[0]) for name in ([chosen] if chosen and chosen.strip() else names))


def without_cpp() -> Optional[str]:
    """Why torch.compile cannot build for the CPU, or None."""
    return None if _compiler("CXX", ("c++", "g++", "clang++")) else "there is no C++ compiler"


def _prebuilt(name: str) -> bool:
    """Whether DeepSpeed was installed with this operator compiled (DS_BUILD_*), as in our images for GPUs."""
    for folder in sys.path:
        record = Path(folder, "deepspeed", "git_version_info_installed.py")
        if record.is_file():
            match = re.search(r"^installed_ops=(\{.*\})$", record.read_text(encoding="utf-8"), re.MULTILINE)
            return match is not None and bool(ast.literal_eval(match.group(1)).get(name))
    return False


def without_cpu_adam() -> Optional[str]:
    """Why DeepSpeed's optimizers for the CPU cannot be built (torch.utils.cpp_extension needs both), or None."""
    if _prebuilt("cpu_adam"):
        return None
    if without_cpp():
        return without_cpp()
    if not (shutil.which("ninja") or importlib.util.find_spec("ninja")):
        return "ninja is not installed"
    return None


def without_lion() -> Optional[str]:
    """Why there is no Lion, or None."""
    return None if importlib.util.find_spec("lion_pytorch") else "the package lion-pytorch is not installed"


def without_triton(gpus: int) -> Optional[str]:
    """Why a Triton kernel (Lion's, torch.compile's) cannot run (Triton compiles its launcher with a C compiler), or None."""
    if not gpus:
        return "there is no GPU"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if not _compiler("CC", ("gcc", "clang", "cc")):
        return "there is no C compiler"
    return None
