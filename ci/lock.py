"""Writes ``images/<stack>/lock.txt``, or checks that the committed ones are what it would write. Run by ci/locks.sh.

    python ci/lock.py UV write | check

Versions come from ci/constraints-*.txt (but for the few tools in ``BUILD``); a lock adds which of them a stack installs, and the
hash of every file that the package registry has of them. uv asks the registry itself and does not read pip's settings: no hash of a
wheel that happens to lie on this machine's disk gets in.
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Dict, List, NamedTuple, Tuple

ROOT = Path(__file__).resolve().parent.parent
TORCH_INDEX = "https://download.pytorch.org/whl/"
TORCH_PARTS = re.compile(r"(torch|triton|cuda-[a-z]+|nvidia-[a-z0-9-]+)==")  # the registry's build and what it brings along
PIN = re.compile(r"^([a-z0-9._-]+==\S+)", re.MULTILINE)
HASH = re.compile(r"--hash=(sha256:[0-9a-f]{64})\b")


class Stack(NamedTuple):
    python: str
    constraints: str
    extras: Tuple[str, ...]
    also: Tuple[str, ...]
    elsewhere: str  # torch's build on PyTorch's own index; "" where the registry's is the one installed


# pip 25.0.1 is the newest for Python 3.8; setuptools and wheel build DeepSpeed, which comes as source.
BUILD = ("pip==25.0.1", "setuptools", "wheel==0.45.1")
TRAIN = ("train", "parquet", "json5")
STACKS: Dict[str, Stack] = {
    "cpu": Stack("3.11", "current", (*TRAIN, "serve"), (*BUILD, "chatterbot-corpus"), "cpu"),
    "serve": Stack("3.11", "current", ("serve",), BUILD, "cpu"),
    "cuda": Stack("3.12", "current", TRAIN, (*BUILD, "chatterbot-corpus"), ""),
    "cu116": Stack("3.8", "pinned", TRAIN, (*BUILD, "chatterbot-corpus==1.2.2"), "cu116"),
}


def lock_of(name: str) -> Path:
    return ROOT / "images" / name / "lock.txt"


def constraints_of(stack: Stack) -> Path:
    return ROOT / "ci" / ("constraints-%s.txt" % stack.constraints)


def torch_pin(stack: Stack) -> str:
    match = re.search(r"^torch==\S+", constraints_of(stack).read_text(encoding="utf-8"), re.MULTILINE)
    assert match is not None, stack
    return match.group()


def header(name: str, stack: Stack) -> str:
    text = (
        "# The lock of images/%s: Python %s, Linux. `bash ci/locks.sh --write` writes it (uv pip compile --generate-hashes) from\n"
        "# pyproject.toml and ci/constraints-%s.txt. Hashes are the package registry's. images/install_lock.py installs it.\n"
        % (name, stack.python, stack.constraints)
    )
    if stack.elsewhere:
        pin = torch_pin(stack)
        text += (
            "# elsewhere: %s+%s from %s%s, hash: unverified\n"
            "# The registry does not have that one wheel; ci/locks.sh tests this lock with its build of the same release, %s.\n"
            % (pin, stack.elsewhere, TORCH_INDEX, stack.elsewhere, pin)
        )
    return text


def requirements(stack: Stack) -> List[str]:
    command = [sys.executable, str(ROOT / "ci/requirements.py"), *stack.extras]
    own = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()
    return [*own, *stack.also, torch_pin(stack)]


def compiled(uv: str, name: str, stack: Stack) -> str:
    """Where the constraints leave a choice (the NVIDIA packages), the version that the committed lock has stays."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder, "lock.txt")
        if lock_of(name).exists():  # uv would take hashes over, too
            output.write_text("\n".join(PIN.findall(lock_of(name).read_text(encoding="utf-8"))), encoding="utf-8")
        command = [uv, "pip", "compile", "--no-config", "--quiet", "--generate-hashes", "--no-header", "--no-annotate"]
        command += ["--python-version", stack.python, "--python-platform", "x86_64-manylinux_2_28"]
        command += ["-c", str(constraints_of(stack)), "-", "-o", str(output)]
        if subprocess.run(command, input="\n".join(requirements(stack)), stdout=subprocess.DEVNULL, text=True).returncode:
            sys.exit("%s: uv finds no such set of versions (above)" % name)
        text = output.read_text(encoding="utf-8")
    if stack.elsewhere:
        text = "".join(block for block in re.split(r"^(?=[a-z])", text, flags=re.MULTILINE) if not TORCH_PARTS.match(block))
    return header(name, stack) + text


def differences(name: str, fresh: str) -> List[str]:
    """Versions, heading, and hashes that the registry does not have; it may have more, of files added to a release since."""
    old = lock_of(name).read_text(encoding="utf-8")
    pins = [set(PIN.findall(text)) for text in (old, fresh)]
    lines = ["%s: %s is not what the constraints give" % (name, pin) for pin in sorted(pins[0] - pins[1])]
    lines += ["%s: %s is missing" % (name, pin) for pin in sorted(pins[1] - pins[0])]
    unknown = set(HASH.findall(old)) - set(HASH.findall(fresh))
    lines += ["%s: no file of the registry has the hash %s" % (name, value) for value in sorted(unknown)]
    heads = [[line for line in text.splitlines() if line.startswith("#")] for text in (old, fresh)]
    return lines + (["%s: its heading is not the one of ci/lock.py" % name] if heads[0] != heads[1] else [])


def main(uv: str, action: str) -> int:
    found: List[str] = []
    for name, stack in STACKS.items():
        fresh = compiled(uv, name, stack)
        if action == "write":
            lock_of(name).write_text(fresh, encoding="utf-8")
            print("images/%s/lock.txt: %d packages" % (name, len(PIN.findall(fresh))))
        else:
            found += differences(name, fresh)
    print("\n".join(found + ["`bash ci/locks.sh --write` writes the locks again"] if found else ["locks: as the constraints give"]))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
