"""One step of the pipeline, instruction by instruction, as a Chrome trace (chrome://tracing, Perfetto); report.html draws it.

Format: Trace Event Format, a JSON object with "traceEvents", complete events ("ph": "X"), times in microseconds; a process is a
stage, a thread one of its replicas.
"""

import json
from pathlib import Path
from typing import Any, Dict, List, NamedTuple

NAME = "trace.json"
STEP = 3  # of a start: the first ones allocate and compile
BUSY = ("ForwardPass", "BackwardPass")  # computing; the rest of the pipelined part is waiting for other stages
SHOWN = {"ForwardPass": "forward", "BackwardPass": "backward", "OptimizerStep": "optimizer"}


class Span(NamedTuple):
    """An instruction of one rank: ``micro`` counts those of this name, ``start`` and ``seconds`` from the step's begin."""

    stage: int
    replica: int
    name: str
    micro: int
    start: float
    seconds: float


def write(path: Path, step: int, spans: List[Span]) -> None:
    """Replace the trace at ``path``. Raises OSError."""
    events: List[Dict[str, Any]] = []
    for stage in sorted({span.stage for span in spans}):
        events.append({"name": "process_name", "ph": "M", "pid": stage, "args": {"name": "stage %d" % stage}})
    for span in spans:
        events.append({
            "name": span.name, "cat": SHOWN.get(span.name, "other"), "ph": "X", "pid": span.stage, "tid": span.replica,
            "ts": round(1e6 * span.start, 1), "dur": round(1e6 * span.seconds, 1), "args": {"micro_batch": span.micro},
        })  # fmt: skip
    aside = path.with_name(path.name + ".partial")
    aside.write_text(json.dumps({"traceEvents": events, "otherData": {"step": step}}), encoding="utf-8")
    aside.replace(path)


def read(path: Path) -> "tuple[int, List[Span]]":
    """(step, its spans); (0, []) where there is no trace that can be read."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        spans = [
            Span(int(e["pid"]), int(e["tid"]), str(e["name"]), int(e["args"]["micro_batch"]), float(e["ts"]) / 1e6,
                 float(e["dur"]) / 1e6)
            for e in document["traceEvents"] if e["ph"] == "X"
        ]  # fmt: skip
        return int(document["otherData"]["step"]), spans
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return 0, []
