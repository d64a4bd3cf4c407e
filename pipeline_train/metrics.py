"""<out>/metrics.jsonl: one JSON object per line, append-only. Standard library only.

kind "start"  step (done so far), total_steps           a run or a resume begins here: what earlier lines say of later steps is void
kind "step"   step (1 = the first), loss (mean over the steps since the last line), grad_norm (before clipping), lr,
              tokens and learnt_tokens and samples (of the steps since the last line), tokens_per_s, learnt_tokens_per_s, step_s,
              mem_gib (per stage: peak so far of its largest rank), mfu (null on CPU), epoch,
              stage_s (per stage: seconds of a step its slowest replica computed), bubble (the stages' mean share of waiting in the
              pipelined part of a step, which ends where gradients are reduced),
              with fp16: loss_scale, skipped (steps since the last line)
kind "eval"   step, loss, tokens
kind "startup" step, seconds of rank 0 by phase, in order: libraries, joining, stage (built), data, weights (read), evaluation
              (where an earlier start has left it out), first_step
kind "memory" step, mem_gib (per stage, what the first step after a start has needed at most), planned_gib; on GPUs
kind "save"   step, path, seconds, stall_s (the training stood still), asynchronous

This file is the truth; ``sinks`` show the same lines elsewhere.
"""

import contextlib
import json
import math
import os
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence

from .errors import RunFailed


class Metrics:
    """Appends lines, and hands each on to ``sinks`` (``write(line)``, ``close()``). Opening repairs a torn tail: a line that was
    being written when the machine died is cut off."""

    def __init__(self, path: Path, sinks: Sequence[Any] = ()) -> None:
        if path.exists():
            repair(path)
        self.file = open(str(path), "a", encoding="utf-8")
        self.sinks = sinks

    def write(self, kind: str, **fields: Any) -> None:
        """Raises RunFailed, one line, when the file cannot be written."""
        line = dict(fields, kind=kind)
        for key, value in line.items():
            if isinstance(value, float) and not math.isfinite(value):
                line[key] = None  # JSON has no NaN
        try:
            self.file.write(json.dumps(line) + "\n")
            self.file.flush()
        except OSError as error:
            raise RunFailed("%s: cannot be written: %s" % (self.file.name, error.strerror)) from None
        for sink in self.sinks:
            sink.write(line)

    def close(self) -> None:
        self.file.close()
        for sink in self.sinks:
            sink.close()


def repair(path: Path) -> None:
    """Cut everything after the last newline."""
    with open(str(path), "rb+") as file:
        end = file.seek(0, os.SEEK_END)
        while end > 0:
            file.seek(end - 1)
            if file.read(1) == b"\n":
                break
            end -= 1
        file.truncate(end)


def read(path: Path) -> List[Dict[str, Any]]:
    """Every whole line, in file order."""
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1] if line]


def parsed(raw: bytes) -> Optional[Dict[str, Any]]:
    """A line of the file; None where it is no JSON object: a crash or an editor has left it."""
    try:
        line = json.loads(raw.decode("utf-8", "replace"))
    except (ValueError, RecursionError):
        return None
    return line if isinstance(line, dict) else None


def evaluated(path: Path, step: int) -> bool:
    """Whether a line of kind "eval" tells of this step, and no later start has made it void."""
    found = False
    with contextlib.suppress(OSError), open(str(path), "rb") as file:
        for raw in file:
            line = parsed(raw)
            if line is None or not isinstance(line.get("step"), int):
                continue
            if line.get("kind") == "start" and line["step"] < step:
                found = False
            found = found or (line.get("kind") == "eval" and line["step"] == step)
    return found
