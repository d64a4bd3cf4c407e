"""Installs the locked torch into the running interpreter's environment: the CPU build where it can be had.

The lock is ci/constraints-current.txt, or the file named as the argument.
PyTorch's own CPU wheel index when it answers within seconds, else whatever pip is configured for: PyPI's build for Linux also runs
on a CPU, it only brings several GB of CUDA libraries along.
"""

import re
import subprocess
import sys
from pathlib import Path
from typing import List

CPU_INDEX = "https://download.pytorch.org/whl/cpu"
CONSTRAINTS = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parent / "constraints-current.txt"
PROBE = "import sys, urllib.request; urllib.request.urlopen(sys.argv[1], timeout=5).read(1)"


def locked_version() -> str:
    match = re.search(r"^torch==(\S+)", CONSTRAINTS.read_text(encoding="utf-8"), re.MULTILINE)
    if match is None:
        sys.exit("%s: no torch pin" % CONSTRAINTS)
    return match.group(1)


def answers(url: str) -> bool:
    """In a process of its own, since looking up a name can hang for longer than any timeout of ours."""
    try:
        return subprocess.run([sys.executable, "-c", PROBE, url], stderr=subprocess.DEVNULL, timeout=8).returncode == 0
    except subprocess.TimeoutExpired:
        return False


def main() -> int:
    version = locked_version()
    options: List[str] = []
    if answers(CPU_INDEX + "/torch/"):
        options = ["--index-url", CPU_INDEX, "--no-deps"]  # its other packages are older than the lock's
    print("torch %s from %s" % (version, "PyTorch's CPU index" if options else "pip's configured index"), flush=True)
    pip = [sys.executable, "-m", "pip", "install", "--progress-bar", "off"]
    return subprocess.run(pip + options + ["-c", str(CONSTRAINTS), "torch==" + version]).returncode


if __name__ == "__main__":
    sys.exit(main())
