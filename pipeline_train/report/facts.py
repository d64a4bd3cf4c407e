"""What a run folder holds beside its metrics. Missing or spoilt files are left out: a report is made of what is there."""

import fcntl
import json
from datetime import datetime
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional

import yaml

from .. import config, families, plan
from ..config_schema import RunConfig
from ..errors import UserError

SESSIONS = "sessions.json"  # in <out>/resolved: when and how each start of the run ended
MOST_CONFIG = 100_000  # characters of run.yaml


class Stage(NamedTuple):
    """One stage of the plan: its layers [first, last], their parameters, its share of the FLOPs."""

    first: int
    last: int
    params: int
    share: float


def document(path: Path) -> Dict[str, Any]:
    """A JSON object, or {}."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def sessions(out: Path) -> List[Dict[str, Any]]:
    """[{"began", "step", "ended", "state", "line"}]: one for each start; state: running, finished, stopped, interrupted, failed."""
    found = document(out / "resolved" / SESSIONS).get("sessions")
    return [s for s in found if isinstance(s, dict)] if isinstance(found, list) else []


def begin(out: Path, step: int) -> None:
    """Note that a start begins after ``step``. Raises OSError."""
    _write_sessions(out, sessions(out) + [{"began": _now(), "step": step, "state": "running"}])


def end(out: Path, state: str, line: str = "") -> None:
    """Note how the last start ended; ``line``: its error. Raises OSError."""
    known = sessions(out)
    if known:
        known[-1].update(ended=_now(), state=state, line=line)
        _write_sessions(out, known)


def _write_sessions(out: Path, known: List[Dict[str, Any]]) -> None:
    (out / "resolved" / SESSIONS).write_text(json.dumps({"sessions": known}, indent=1) + "\n", encoding="utf-8")


def _now() -> str:
    return datetime.now().astimezone().isoformat(timespec="seconds")


def in_use(out: Path) -> bool:
    """Whether a train holds the folder's lock (run_folder.take)."""
    try:
        with open(str(out / ".lock"), "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def run_yaml(out: Path) -> str:
    try:
        text = (out / "resolved" / "run.yaml").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    return text[:MOST_CONFIG]


def run_config(text: str) -> Optional[RunConfig]:
    """None for a configuration that this version does not understand."""
    try:
        raw = yaml.safe_load(text)
        return config.parse(raw) if isinstance(raw, dict) else None
    except (UserError, yaml.YAMLError, ValueError, RecursionError):
        return None


def stages(out: Path, run: Optional[RunConfig]) -> List[Stage]:
    """The plan that the run follows, or [] when its model's config.json is gone."""
    if run is None or run.data.seq_len is None or run.parallel.parts == "auto":
        return []
    try:
        dims = families.dims_of(families.read_config(str(out / "resolved" / "model")))
        bounds = plan.bounds(dims, run.parallel.pipe, run.parallel.parts, run.data.seq_len)
    except UserError:
        return []
    weights = plan.layer_weights(dims, run.data.seq_len, run.parallel.recompute == "blocks", run.run.fp8 and run.run.compile)
    family = families.FAMILIES[dims.family]
    return [
        Stage(a, b - 1, sum(family.layer_params(dims, n) for n in range(a, b)), sum(weights[a:b]) / sum(weights))
        for a, b in zip(bounds, bounds[1:])
    ]
