"""Prints the tag of an image: our version and what is in it, ``0.1.0-cu116-torch1.13.1-ds0.9.2``.

    python images/tag.py cpu | serve | cuda | cu116

Read from pyproject.toml and the stack's lock; release.yml publishes under it.
"""

import re
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
PARTS = (("torch", "torch"), ("ds", "deepspeed"))


def pinned(lock: str, name: str) -> str:
    """The release in the lock or in its ``elsewhere`` line, "" where the stack has no such package."""
    match = re.search(r"^(?:# elsewhere: )?%s==([^\s+]+)" % name, lock, re.MULTILINE)
    return match.group(1) if match else ""


def tag(stack: str) -> str:
    lock = (HERE / stack / "lock.txt").read_text(encoding="utf-8")
    version = re.search(r'^version = "([^"]+)"', (HERE.parent / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    assert version is not None
    return "-".join([version.group(1), stack] + [short + pinned(lock, name) for short, name in PARTS if pinned(lock, name)])


if __name__ == "__main__":
    stacks = sorted(path.parent.name for path in HERE.glob("*/lock.txt"))
    if len(sys.argv) != 2 or sys.argv[1] not in stacks:
        sys.exit("usage: tag.py " + " | ".join(stacks))
    print(tag(sys.argv[1]))
