"""Installs a lock file into the running interpreter's environment; every file of the package registry is checked against its hash.

    python images/install_lock.py images/cpu/lock.txt [wheels | sources]

``wheels``: everything but what comes as source; a layer of its own. ``sources``: that rest (DeepSpeed), built here with the
environment's own setuptools and with what stands in DS_BUILD_*. Without either: both. Nothing outside the lock is installed
(``--no-deps``); `pip check` afterwards says whether it was complete. The wheel that the lock's ``elsewhere`` line names has to be
there before.
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Dict, List

SOURCES = ("deepspeed",)
INSTALLER = "pip"  # first, alone: the one that a system brings may not know today's wheels


def blocks(lock: str) -> Dict[str, str]:
    """Package name -> its lines in the lock."""
    found: Dict[str, str] = {}
    for block in re.split(r"^(?=[a-z0-9])", Path(lock).read_text(encoding="utf-8"), flags=re.MULTILINE):
        name, pin, _ = block.partition("==")
        if pin and not block.startswith("#"):
            found[name] = block
    return found


def install(chosen: List[str], *options: str) -> None:
    if not chosen:
        return
    with tempfile.NamedTemporaryFile("w", suffix=".txt", encoding="utf-8") as part:
        part.write("".join(chosen))
        part.flush()
        command = [sys.executable, "-m", "pip", "install", "--no-deps", "--require-hashes", "--progress-bar", "off", "--quiet"]
        code = subprocess.run([*command, *options, "-r", part.name]).returncode
    if code:
        sys.exit(code)


def main(lock: str, what: str = "wheels and sources") -> int:
    pins = blocks(lock)
    if "wheels" in what:
        install([pins.pop(INSTALLER, "")])
        install([text for name, text in pins.items() if name not in SOURCES], "--only-binary", ":all:")
    if "sources" in what:
        install([text for name, text in pins.items() if name in SOURCES], "--no-build-isolation", "--no-binary", ":all:")
        return subprocess.run([sys.executable, "-m", "pip", "check"]).returncode
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
