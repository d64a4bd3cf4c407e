"""How fast the ranks talk: real ranks on every node, gloo on CPUs and nccl on GPUs, for a few seconds."""

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence

from ..control import Channel
from ..worker import PARENT
from . import gpus
from .finding import FAILURE, OK, WARNING, Facts, Finding

PROBE = ["-m", "pipeline_train.preflight.probe"]
LIMIT_S, LIMIT_RANK_S = 60.0, 2.0  # for everything, and for each rank: pairs are measured one after the other
ON_CPU = 2  # ranks of a machine that is alone, so that there is something to measure
SLOW_GBS = 0.1  # 10^9 bytes a second: a 1 Gb Ethernet that is alone does more
ODD = 4.0  # a pair that is so many times slower than the usual one
GLOO_ERRORS = ("Connection", "connect", "gloo", "timed out", "Timeout")


def measure(channel: Channel, addr: str, port: int, facts: Facts) -> Dict[str, Any]:
    """All nodes call it. {"ranks": of each node, "error": by node, "backend", "neighbours", "all_reduce"}, see probe. ``port``:
    node 0's, where torch's store will listen."""
    cards = gpus.number(facts)
    mine = min(cards, facts["ranks"] or cards) if cards else (ON_CPU if channel.nodes == 1 else 1)
    ranks = [int(row["ranks"]) for row in channel.exchange({"ranks": mine})]
    if sum(ranks) < 2:
        return {"ranks": ranks, "error": [""] * len(ranks)}
    env = dict(os.environ, WORLD_SIZE=str(sum(ranks)), MASTER_ADDR=addr, MASTER_PORT=str(port), OMP_NUM_THREADS="1")
    root = str(Path(__file__).resolve().parents[2])
    env["PYTHONPATH"] = os.pathsep.join([root] + ([env["PYTHONPATH"]] if env.get("PYTHONPATH") else []))
    env.update(facts["network"]["set"])
    env[PARENT] = str(os.getpid())
    if not cards:
        env["DS_ACCELERATOR"] = "cpu"
    envs = [dict(env, RANK=str(sum(ranks[: channel.node]) + local), LOCAL_RANK=str(local)) for local in range(mine)]
    found = run_ranks([sys.executable] + PROBE, envs, LIMIT_S + LIMIT_RANK_S * sum(ranks), channel.check)
    rows = channel.exchange(found)
    document = dict(rows[0]["answer"] or {})
    document.update(ranks=ranks, error=[row["error"] for row in rows])
    return document


def run_ranks(
    command: List[str], envs: Sequence[Dict[str, str]], limit_s: float, check: Callable[[], None] = lambda: None
) -> Dict[str, Any]:
    """Start them, wait for them, leave none behind. {"answer": what the first printed, "error": "" or the first cause}. ``check``
    may raise what makes waiting useless."""
    deadline = time.monotonic() + limit_s
    processes: List[subprocess.Popen] = []
    with contextlib.ExitStack() as stack:
        stack.callback(_end, processes)
        outputs = [stack.enter_context(tempfile.TemporaryFile()) for _ in envs]
        errors = [stack.enter_context(tempfile.TemporaryFile()) for _ in envs]
        try:
            for env, out, err in zip(envs, outputs, errors):
                processes.append(subprocess.Popen(command, env=env, stdin=subprocess.DEVNULL, stdout=out, stderr=err))
        except OSError as error:
            return {"answer": None, "error": "a rank cannot be started: %s" % error.strerror}
        while any(process.poll() is None for process in processes) and not any(process.poll() for process in processes):
            if time.monotonic() > deadline:
                return {"answer": None, "error": "no end after %.0f s" % limit_s}
            check()
            time.sleep(0.05)
        failed = [number for number, process in enumerate(processes) if process.poll()]
        if failed:
            return {
                "answer": None,
                "error": "rank %s: %s" % (envs[failed[0]]["RANK"], _last(errors[failed[0]], processes[failed[0]])),
            }
        return {"answer": _answer(outputs[0]), "error": ""}


def _end(processes: List[subprocess.Popen]) -> None:
    for process in processes:
        if process.poll() is None:
            process.kill()
    for process in processes:
        process.wait()


def _last(file: Any, process: subprocess.Popen) -> str:
    """The last line that a rank has written, or how it ended."""
    file.seek(0)
    lines = [line.strip() for line in file.read().decode("utf-8", "replace").splitlines() if line.strip()]
    said = [line for line in lines if "Error" in line.split(":")[0]] or lines
    return said[-1][:300] if said else "ended with code %s" % process.returncode


def _answer(file: Any) -> Optional[Dict[str, Any]]:
    file.seek(0)
    lines = [line for line in file.read().decode("utf-8", "replace").splitlines() if line.startswith("{")]
    return json.loads(lines[-1]) if lines else None


def check(document: Optional[Dict[str, Any]]) -> List[Finding]:
    """A rank that fails; pairs that are slow, or much slower than the others of their kind (inside a node, between two)."""
    if document is None:
        return []
    found = [_failed(node, line) for node, line in enumerate(document["error"]) if line]
    if found or "neighbours" not in document:
        return found
    homes = [node for node, number in enumerate(document["ranks"]) for _ in range(number)]
    pairs = [(homes[rank], homes[rank + 1], rank, gbs) for rank, (gbs, _) in enumerate(document["neighbours"])]
    for kind in (True, False):  # inside a node, between two
        rows = [row for row in pairs if (row[0] == row[1]) is kind]
        usual = statistics.median(row[3] for row in rows) if rows else 0.0
        for left, right, rank, gbs in rows:
            said = "rank %d to %d (node %d to %d): %.3g GB/s" % (rank, rank + 1, left, right, gbs)
            if gbs * ODD < usual:
                found.append(Finding("bandwidth", WARNING, "%s, others do %.3g" % (said, usual),
                                     "look at that cable, port or slot: ethtool, nvidia-smi topo -m", right))  # fmt: skip
            elif gbs < SLOW_GBS and not kind:
                found.append(Finding("bandwidth", WARNING, "%s, less than 1 Gb Ethernet" % said,
                                     "name the fast network in NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME", right))  # fmt: skip
    return found or [Finding("bandwidth", OK, _told(document, pairs))]


def _failed(node: int, line: str) -> Finding:
    fix = "NCCL_DEBUG=INFO pipedock preflight ... shows where it stops; NCCL_IB_DISABLE=1 leaves InfiniBand out"
    if "CUDA" not in line and "NCCL" not in line and any(word in line for word in GLOO_ERRORS):
        fix = "let the nodes reach all ports of each other; GLOO_SOCKET_IFNAME names the interface"
    return Finding("bandwidth", FAILURE, line.rstrip("."), fix, node)


def _told(document: Dict[str, Any], pairs: Sequence[Any]) -> str:
    slowest, pause = min(row[3] for row in pairs), max(row[1] for row in document["neighbours"])
    return "%s, %d ranks: neighbours at least %.3g GB/s, at most %.0f us; all-reduce %.3g GB/s" % (
        document["backend"], len(pairs) + 1, slowest, pause, document["all_reduce"])  # fmt: skip
