"""One machine's own state: what is measured of it, and the checks that need nothing else. Checks take what was measured as data."""

import os
import resource
import shutil
from pathlib import Path
from typing import Dict, List, Optional, Tuple

from .. import compat, host
from ..errors import UserError
from ..hub import HUB_NAME
from .finding import FAILURE, NOTE, OK, WARNING, Facts, Finding, size

SHM = Path("/dev/shm")
INFINIBAND = Path("/sys/class/infiniband")
IN_CONTAINER = (Path("/.dockerenv"), Path("/run/.containerenv"))
LIMITS = {"memlock": resource.RLIMIT_MEMLOCK, "stack": resource.RLIMIT_STACK, "nofile": resource.RLIMIT_NOFILE}
MIB, GIB = 1 << 20, 1 << 30
SHM_LEAST = 512 * MIB  # NCCL's ring buffers between the GPUs of a machine; docker's default is 64 MiB
MEMLOCK_LEAST = 64 * MIB  # an InfiniBand card pins its buffers; Ubuntu's default is 8 MiB and less
STACK_LEAST = 8 * MIB  # the usual; threads of BLAS libraries overflow a smaller one
FILES_BASE, FILES_PER_RANK = 512, 16  # open files: Python and shards; sockets to every other rank
Limit = Tuple[Optional[int], Optional[int]]


def measure(out: Optional[Path]) -> Facts:
    """``out``: the run folder, if there is a run. Sizes in bytes; None where there is no such thing or no limit."""
    return {
        "versions": compat.versions(), "shm": _disk(SHM) if SHM.is_dir() else None,
        "limits": {name: [_limit(value) for value in resource.getrlimit(number)] for name, number in LIMITS.items()},
        "memory": {"available": host.available_memory(), "limit": host.memory_limit()},
        "infiniband": INFINIBAND.is_dir() and any(INFINIBAND.iterdir()), "container": any(path.exists() for path in IN_CONTAINER),
        "disk": None if out is None else dict(_disk(_there(out)), path=str(out), wrong=_unusable(_there(out))),
    }  # fmt: skip


def _limit(value: int) -> Optional[int]:
    return None if value == resource.RLIM_INFINITY else value


def _disk(path: Path) -> Dict[str, int]:
    usage = shutil.disk_usage(str(path))
    return {"size": usage.total, "free": usage.free}


def _there(path: Path) -> Path:
    """The nearest folder above that exists."""
    path = path.absolute()
    return next(folder for folder in [path] + list(path.parents) if folder.exists())


def _unusable(path: Path) -> str:
    """Why nothing can be made below it; "" where it can."""
    if not path.is_dir():
        return "%s is no folder" % path
    return "" if os.access(str(path), os.W_OK | os.X_OK) else "%s cannot be written" % path


def check_versions(facts: Facts) -> List[Finding]:
    found = facts["versions"]
    told = ", ".join("%s %s" % (name, found[name]) for name in ("python", "deepspeed", "torch", "transformers") if found.get(name))
    if not found.get("torch"):
        return [
            Finding("versions", FAILURE, "torch is not installed", "pip install torch, the build for this machine's GPUs, or CPU")
        ]
    try:
        compat.check_deepspeed(found["deepspeed"])
    except UserError as error:
        said, _, fix = str(error).rstrip(".").rpartition(". ") if ". Install" in str(error) else str(error).partition("; ")
        release = compat.TESTED[0] if compat.release(found["torch"]) < (2,) else compat.TESTED[-1]
        return [Finding("versions", FAILURE, said, "pip install deepspeed==%s" % release)]
    notes = compat.notes(found)
    return [Finding("versions", WARNING, note, "pip install deepspeed==%s" % compat.TESTED[-1]) for note in notes] or [
        Finding("versions", OK, told)
    ]


def check_shm(facts: Facts) -> List[Finding]:
    """NCCL joins the GPUs of one machine through it, and dies with "unhandled system error" when it is full."""
    shm, several = facts["shm"], len(facts["gpus"]["cards"]) > 1 and facts["ranks"] != 1
    if shm is None:
        return [Finding("/dev/shm", FAILURE if several else NOTE, "is not there", "sudo mount -t tmpfs -o size=8G tmpfs /dev/shm" if
                        several else "")]  # fmt: skip
    said = "%s, %s free" % (size(shm["size"]), size(shm["free"]))
    if several and shm["free"] < SHM_LEAST:
        if shm["size"] >= SHM_LEAST:
            return [Finding("/dev/shm", FAILURE, "%s, NCCL needs %s" % (said, size(SHM_LEAST)),
                            "remove what fills it: ls -lS /dev/shm")]  # fmt: skip
        fix = "start the container with --shm-size 8g or --ipc host (compose: shm_size: 8gb)" if facts["container"] else \
            "sudo mount -o remount,size=8G /dev/shm"  # fmt: skip
        return [Finding("/dev/shm", FAILURE, "%s, NCCL needs %s" % (said, size(SHM_LEAST)), fix)]
    return [Finding("/dev/shm", OK, said)]


def check_limits(facts: Facts) -> List[Finding]:
    """ulimits: pinned memory, stack, open files."""
    limits, gpu = facts["limits"], bool(facts["gpus"]["cards"])
    world = facts["world"] or facts["ranks"] or 1
    files = FILES_BASE + FILES_PER_RANK * world
    least = {"memlock": MEMLOCK_LEAST, "stack": STACK_LEAST, "nofile": files}
    severe = {"memlock": facts["infiniband"] and gpu, "stack": False, "nofile": True}
    why = {
        "memlock": "InfiniBand pins more" if facts["infiniband"] else "pinned memory for GPUs wants more",
        "stack": "threads of numerical libraries want %s" % size(STACK_LEAST),
        "nofile": "%d processes need about %d" % (world, files),
    }
    found = []
    for name, (soft, hard) in ((name, limits[name]) for name in LIMITS):
        if soft is None or soft >= least[name] or (name == "memlock" and not gpu):
            continue
        level = FAILURE if severe[name] else WARNING
        found.append(
            Finding("ulimit " + name, level, "%s, %s" % (_shown(name, soft), why[name]), _raise(name, hard, facts["container"]))
        )
    told = ", ".join("%s %s" % (name, _shown(name, limits[name][0])) for name in LIMITS)
    return found or [Finding("ulimits", OK, told)]


def _raise(name: str, hard: Optional[int], container: bool) -> str:
    wish = {
        "memlock": ("-l unlimited", "memlock=-1"),
        "stack": ("-s 65536", "stack=67108864"),
        "nofile": ("-n 65536", "nofile=65536"),
    }
    here, docker = wish[name]
    if container:
        return "start the container with --ulimit %s" % docker
    return "ulimit %s (if that is refused: a line for it in /etc/security/limits.conf, then log in anew)" % here


def _shown(name: str, value: Optional[int]) -> str:
    return "unlimited" if value is None else str(value) if name == "nofile" else size(value)


def check_disk(facts: Facts) -> List[Finding]:
    disk, need = facts["disk"], facts["need"]
    if disk is None or need is None:
        return []
    if disk["wrong"]:
        return [Finding("disk", FAILURE, "%s: %s" % (disk["path"], disk["wrong"]),
                        "name a folder in run.out that this user can write")]  # fmt: skip
    one, several = need["checkpoint"], need["checkpoint"] * need["checkpoints"]
    said = "%s: %s free" % (disk["path"], size(disk["free"]))
    if disk["free"] < one:
        return [Finding("disk", FAILURE, "%s, one checkpoint needs %s" % (said, size(one)),
                        "make room there, or name a folder of another disk in run.out")]  # fmt: skip
    if disk["free"] < several:
        return [Finding("disk", WARNING, "%s, train.keep wants room for %d checkpoints, %s" % (said, need["checkpoints"],
                        size(several)), "make room there, or lower train.keep")]  # fmt: skip
    return [Finding("disk", OK, said)]


def check_memory(facts: Facts) -> List[Finding]:
    """The host's memory, or what a container may take of it."""
    memory, need = facts["memory"], facts["need"] or {"host": 0, "copy": 0}
    if memory["available"] is None:
        return [Finding("memory", NOTE, "this system does not tell how much is left")]
    said = "%s available" % size(memory["available"])
    fix = "end other programs, or run with more stages on more nodes"
    if memory["limit"] is not None:
        said += " (limit of the container: %s)" % size(memory["limit"])
        fix = "give the container more (docker run --memory, compose: mem_limit)"
    if memory["available"] < need["host"]:
        return [Finding("memory", FAILURE, "%s, weights, gradients and optimizer take %s here" % (said, size(need["host"])), fix)]
    if memory["available"] < need["host"] + need["copy"]:
        return [
            Finding(
                "memory", WARNING, "%s, not enough to hold a copy while a checkpoint is written: steps wait for saves" % said, fix
            )
        ]
    return [Finding("memory", OK, said)]


def check_files(facts: Facts) -> List[Finding]:
    """Are the model and the data that run.yaml names here? ``facts["files"]``: {key: path} of those that are not;
    ``facts["weights"]``: what is wrong with the model's."""
    fix = "copy the model again, or set model.path; model.init: random needs no weights"
    found = [Finding("files", FAILURE, "model.path: %s" % facts["weights"], fix)] if facts["weights"] else []
    for key, path in facts["files"].items():
        if key == "model.path" and HUB_NAME.match(path):
            found.append(Finding("files", NOTE, "%s: %s is no folder here; train asks the hub for it on every node" % (key, path)))
            continue
        found.append(Finding("files", FAILURE, "%s: %s is not here" % (key, path),
                             "copy it to this node (rsync -a), mount the folder that holds it, or set %s" % key))  # fmt: skip
    return found


def check_run(facts: Facts) -> List[Finding]:
    """Room for the run's checkpoints and memory, and its files."""
    return check_disk(facts) + check_memory(facts) + check_files(facts)


def check(facts: Facts) -> List[Finding]:
    return check_versions(facts) + check_shm(facts) + check_limits(facts) + check_run(facts)
