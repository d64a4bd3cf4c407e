"""Runs the processes of measurements, one after the other, and puts the engines beside each other."""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, Callable, Dict, List, Tuple

from pipeline_train import compat, config, families, plan
from pipeline_train.device import resolve_device
from pipeline_train.errors import RunFailed, UserError
from pipeline_train.network import free_port

from .task import Case

ROOT = Path(__file__).resolve().parents[1]
ALONE = ("ancestor", "hf", "hf-compiled")  # peers of one process
TOGETHER = ("ancestor", "zero3", "fsdp2", "fsdp2-compiled")  # of several
MICROS = (1, 2, 4, 8)
LIMIT_S = 900.0
Say = Callable[[str], None]
Row = Dict[str, Any]


def checked(case: Case, say: Say) -> Tuple[Case, bool]:
    """The case with its dtype decided by what is here, as ``train`` does it; whether on GPUs. Raises UserError."""
    run = config.parse(case.settings())
    gpus = resolve_device(run, compat.versions(), "bench train", say)
    dims = families.dims_of(case.model)
    if case.fp8:
        plan.check_fp8_sizes(dims)
    plan.bounds(dims, case.pipe, run.parallel.parts, case.seq)
    if dims.max_positions is not None and case.seq > dims.max_positions:
        raise UserError("--seq-len %d: the model has %d positions" % (case.seq, dims.max_positions))
    return replace(case, dtype=run.model.dtype), bool(gpus)


def bench(case: Case, peers: bool, cuda: bool, say: Say) -> List[Row]:
    """Our pipeline, then with ``peers`` the others on the same documents and as many rows a step, each at its best micro-batch.
    Every row has ``ratio``: our tokens per second through its. Raises RunFailed when ours cannot be measured."""
    ours = measured(case, cuda)
    if "error" in ours:
        raise RunFailed("bench: our pipeline: %s" % ours["error"])
    say(line(ours))
    rows = [ours]
    for engine in (ALONE if case.world == 1 else TOGETHER) if peers else ():
        best = tuned(replace(case, engine=engine, compile=False, fp8=False), cuda, say)
        rows.append(best)
    for row in rows:
        if "tokens_per_s" in row:
            row["ratio"] = ours["tokens_per_s"] / row["tokens_per_s"]
    return rows


def tuned(case: Case, cuda: bool, say: Say) -> Row:
    """The row of the fastest micro-batch, larger ones until one does not fit; -> the last error where none can be measured."""
    best: Row = {}
    for micro in MICROS:
        wanted = with_micro(case, micro)
        if wanted is None:
            continue
        row = measured(wanted, cuda)
        say(line(row))
        if "error" in row:
            best = best or row
            break
        if "error" in best or not best or row["tokens_per_s"] > best["tokens_per_s"]:
            best = row
    return best


def with_micro(case: Case, micro: int) -> Any:
    """The same rows a step in micro-batches of ``micro``; None where they do not divide."""
    replicas = case.data if case.engine in ("ours", "ancestor") else case.world
    each, rest = divmod(case.rows, replicas * micro)
    if rest or not each:
        return None
    return replace(case, micro=micro, micro_batches=case.rows // case.data // micro)


def measured(case: Case, cuda: bool) -> Row:
    """One case in processes of its own; -> its row, {"engine", "micro", "error"} when it fails."""
    port = free_port()
    common = dict(os.environ, WORLD_SIZE=str(case.world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
                  PYTHONPATH=os.pathsep.join([str(ROOT)] + [p for p in [os.environ.get("PYTHONPATH")] if p]))  # fmt: skip
    if not cuda:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        common.update(DS_ACCELERATOR="cpu")
        common.setdefault("OMP_NUM_THREADS", str(max(1, cores // case.world)))
    processes = []
    for rank in range(case.world):
        env = dict(common, RANK=str(rank), LOCAL_RANK=str(rank))
        command = [sys.executable, "-m", "bench.rank", case.text()]
        processes.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    return _answer(case, processes)


def _answer(case: Case, processes: "List[subprocess.Popen[str]]") -> Row:
    deadline, failed = time.monotonic() + LIMIT_S, False
    try:
        while any(process.poll() is None for process in processes) and not failed and time.monotonic() < deadline:
            failed = any(process.poll() not in (None, 0) for process in processes)
            time.sleep(0.1)
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
    outputs = [process.communicate() for process in processes]
    rows = [json.loads(text) for out, _ in outputs for text in out.splitlines() if text.startswith("{")]
    if rows:
        return next((row for row in rows if "error" in row), rows[0])
    words = [error.strip().splitlines()[-1] for _, error in outputs if error.strip()]
    what = "no answer within %d s" % LIMIT_S if time.monotonic() >= deadline else (words or ["ended without a word"])[0]
    return {"engine": case.engine, "micro": case.micro, "error": what}


def line(row: Row) -> str:
    """One measurement in one line."""
    what = "%-12s micro %d" % (row["engine"], row["micro"])
    if "error" in row:
        return "%s: %s" % (what, row["error"])
    mfu = "" if row["mfu"] is None else ", MFU %.3f" % row["mfu"]
    return "%s: %.0f tokens/s (%.0f learnt), step %.3f s%s, %s GiB" % (
        what, row["tokens_per_s"], row["learnt_tokens_per_s"], row["step_s"], mfu,
        " ".join("%.2f" % gib for gib in row["gib"]),
    )  # fmt: skip
