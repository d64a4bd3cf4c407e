"""The GPUs of this machine: what nvidia-smi says of them and whether torch can use them. No torch import in this process."""

import os
import shutil
import subprocess
from typing import Any, Dict, List, Optional

from .. import compat
from ..errors import RunFailed, UserError
from .finding import FAILURE, NOTE, OK, WARNING, Facts, Finding, size

CARDS = ("index", "uuid", "name", "driver_version", "memory.total", "memory.free")
PROCESSES = ("gpu_uuid", "pid", "process_name", "used_memory")
MIB = 1 << 20
NONE_FOUND = 6  # nvidia-smi(1), "return value": a query found nothing
PATIENCE_S = 30.0
CONTEXT_BYTES = 1 << 30  # what an idle card may have in use: the driver's and a desktop's


def measure() -> Dict[str, Any]:
    """{"cards": [{index, uuid, name, driver, total, free (bytes), processes: [{pid, name, bytes}]}], "torch": cards that torch can
    use, or None when it was not asked, "error": what nvidia-smi or torch says, "" if all is well, "cpu": the user wants none,
    "no_cpu": why DeepSpeed cannot train without one, "" where it can}."""
    found: Dict[str, Any] = {
        "cards": [],
        "torch": None,
        "error": "",
        "cpu": os.environ.get("DS_ACCELERATOR") == "cpu",
        "no_cpu": "",
    }
    try:
        compat.check_cpu(compat.versions()["deepspeed"])
    except UserError as error:
        found["no_cpu"] = str(error)
    if found["cpu"]:
        return found
    try:
        if shutil.which("nvidia-smi") is not None:
            cards = _query("--query-gpu=" + ",".join(CARDS))
            processes = _query("--query-compute-apps=" + ",".join(PROCESSES))
            found["cards"] = visible(parse(cards, processes), os.environ.get("CUDA_VISIBLE_DEVICES"))
        found["torch"] = compat.gpus().number
    except RunFailed as error:
        found["error"] = str(error)
    return found


def _query(what: str) -> str:
    try:
        done = subprocess.run(["nvidia-smi", what, "--format=csv,noheader,nounits"], capture_output=True, text=True,
                              timeout=PATIENCE_S)  # fmt: skip
    except subprocess.TimeoutExpired:
        raise RunFailed("nvidia-smi does not answer within %.0f s" % PATIENCE_S) from None
    except OSError as error:
        raise RunFailed("nvidia-smi cannot be started: %s" % error.strerror) from None
    if done.returncode == NONE_FOUND:
        return ""
    if done.returncode:
        raise RunFailed("nvidia-smi: %s" % " ".join((done.stdout or done.stderr).split()))
    return done.stdout


def parse(cards: str, processes: str) -> List[Dict[str, Any]]:
    """nvidia-smi's two tables -> cards. A process's name may have commas in it; a number may be "[N/A]"."""
    found: List[Dict[str, Any]] = []
    for line in cards.splitlines():
        cells = [cell.strip() for cell in line.split(",")]
        if len(cells) == len(CARDS):
            index, uuid, name, driver = cells[:4]
            found.append({"index": int(index), "uuid": uuid, "name": name, "driver": driver, "total": _bytes(cells[4]),
                          "free": _bytes(cells[5]), "processes": []})  # fmt: skip
    by_uuid: Dict[str, Dict[str, Any]] = {card["uuid"]: card for card in found}
    for line in processes.splitlines():
        cells = [cell.strip() for cell in line.split(",")]
        if len(cells) >= len(PROCESSES) and cells[0] in by_uuid and cells[1].isdigit():
            row = {"pid": int(cells[1]), "name": ",".join(cells[2:-1]), "bytes": _bytes(cells[-1])}
            by_uuid[cells[0]]["processes"].append(row)
    return found


def _bytes(mib: str) -> Optional[int]:
    return int(mib) * MIB if mib.isdigit() else None


def visible(cards: List[Dict[str, Any]], wish: Optional[str]) -> List[Dict[str, Any]]:
    """Those that CUDA_VISIBLE_DEVICES leaves, in its order: numbers or beginnings of UUIDs; it ends at the first that is none."""
    if wish is None:
        return cards
    kept: List[Dict[str, Any]] = []
    for word in wish.split(","):
        word = word.strip()
        fits = [c for c in cards if word and (str(c["index"]) == word or c["uuid"].startswith(word))]
        if not fits or fits[0] in kept:
            break
        kept.append(fits[0])
    return kept


def number(facts: Facts) -> int:
    """Cards that ranks here can use."""
    gpus = facts["gpus"]
    return 0 if gpus["cpu"] else len(gpus["cards"]) if gpus["torch"] is None else int(gpus["torch"])


def check(facts: Facts) -> List[Finding]:
    """Are there enough, can torch use them, and is there room on them? ``facts["need"]["gpu"]``: bytes of each local rank."""
    gpus, ranks, usable = facts["gpus"], facts["ranks"], number(facts)
    cards = gpus["cards"]
    if gpus["error"]:
        fix = "sudo nvidia-smi shows the same on the machine itself; a driver that was updated under a running system needs: " \
              "sudo reboot; DS_ACCELERATOR=cpu does without"  # fmt: skip
        if "torch" in gpus["error"]:
            fix = "pip install 'pipedock[train]' and a torch for this machine"
        return [Finding("GPUs", FAILURE, gpus["error"], fix)]
    if gpus["cpu"] or not (cards or usable):
        why = "DS_ACCELERATOR=cpu" if gpus["cpu"] else "no GPU here"
        if gpus["no_cpu"]:
            said, _, fix = gpus["no_cpu"].partition("; ")
            return [Finding("GPUs", FAILURE, "%s: %s" % (why, said), fix or "pip install deepspeed==%s" % compat.TESTED[-1])]
        return [Finding("GPUs", NOTE, "%s: training runs on the CPU" % why)]
    if cards and not usable:
        said = "nvidia-smi sees %d (%s, driver %s), torch %s can use none" % (
            len(cards), cards[0]["name"], cards[0]["driver"], facts["versions"].get("torch"))  # fmt: skip
        fix = "install a torch built for this driver's CUDA (nvidia-smi's first lines tell it), not a +cpu one, or a newer driver"
        return [Finding("GPUs", FAILURE, said, fix)]
    if ranks is not None and usable < ranks:
        return [Finding("GPUs", FAILURE, "%d processes are to run here, %d GPUs can be used" % (ranks, usable),
                        "lower slots in the hostfile or parallel: pipe x data, or widen CUDA_VISIBLE_DEVICES")]  # fmt: skip
    crowded = [finding for card, need in zip(cards, _needs(facts, len(cards))) for finding in _room(card, need)]
    return crowded or [Finding("GPUs", OK, _told(cards) if cards else "%d, as torch says" % usable)]


def _needs(facts: Facts, cards: int) -> List[Optional[int]]:
    """Bytes by card; more cards than ranks are free to be full."""
    needs: List[Optional[int]] = list((facts["need"] or {}).get("gpu") or [])
    if needs:
        return needs
    return [None] * (cards if facts["ranks"] is None else facts["ranks"])


def _room(card: Dict[str, Any], need: Optional[int]) -> List[Finding]:
    used = 0 if card["free"] is None or card["total"] is None else card["total"] - card["free"]
    where = "%d (%s)" % (card["index"], card["name"])
    holders = ", ".join("pid %d (%s, %s)" % (p["pid"], p["name"], size(p["bytes"])) for p in card["processes"])
    said = "GPU %s: %s of %s are free" % (where, size(card["free"]), size(card["total"]))
    fix = "end what is there: kill %s" % " ".join(str(p["pid"]) for p in card["processes"]) if holders else (
        "find what holds it: sudo fuser -v /dev/nvidia*")  # fmt: skip
    if need is not None and card["free"] is not None and card["free"] < need:
        held = ", held by %s" % holders if holders else ""
        if card["total"] is not None and need > card["total"] - CONTEXT_BYTES:
            fix = "use more stages (parallel.pipe), parallel.recompute: blocks or a smaller batch.micro; pipedock plan tells"
        return [Finding("GPUs", FAILURE, "%s, this run needs about %s%s" % (said, size(need), held), fix)]
    if holders or used > CONTEXT_BYTES:
        return [Finding("GPUs", WARNING, "%s: %s" % (said, "other processes are on it: " + holders if holders else
                        "something that cannot be seen from here is on it"), fix)]  # fmt: skip
    return []


def _told(cards: List[Dict[str, Any]]) -> str:
    """ "8 x NVIDIA H100 80GB HBM3, driver 550.54, at least 79.1 GiB free"."""
    names = sorted({card["name"] for card in cards})
    frees = [card["free"] for card in cards if card["free"] is not None]
    free = ", at least %s free" % size(min(frees)) if frees else ""
    return "%d x %s, driver %s%s" % (len(cards), " and ".join(names), cards[0]["driver"], free)


def check_same(nodes: List[Facts]) -> List[Finding]:
    """Are the cards and their drivers the same everywhere? The slowest stage sets the pace of all."""
    kinds = {
        node: (_kind(facts["gpus"]["cards"], "name"), _kind(facts["gpus"]["cards"], "driver")) for node, facts in enumerate(nodes)
    }
    if len(set(kinds.values())) == 1:
        return []
    if any(name == "none" for name, _ in kinds.values()):
        said = "; ".join("node %d: %s" % (node, name) for node, (name, _) in kinds.items())
        return [Finding("GPUs", FAILURE, "some nodes have GPUs, some have none: %s" % said,
                        "leave the nodes without GPUs out, or set DS_ACCELERATOR=cpu on all of them")]  # fmt: skip
    said = "; ".join("node %d: %s, driver %s" % (node, name, driver) for node, (name, driver) in kinds.items())
    return [Finding("GPUs", WARNING, "not the same on all nodes: %s" % said,
                    "give slower cards fewer layers (parallel.parts), and all nodes one driver")]  # fmt: skip


def _kind(cards: List[Dict[str, Any]], key: str) -> str:
    return " and ".join(sorted({card[key] for card in cards})) or "none"
