"""The curves of a metrics.jsonl, read so that nothing in the file can stop the report. Standard library only."""

import math
from array import array
from bisect import bisect_right
from collections import deque
from pathlib import Path
from typing import Any, Deque, Dict, List, Optional, Sequence, Tuple

from .. import metrics

KEYS = (
    "loss", "grad_norm", "lr", "tokens", "learnt_tokens", "tokens_per_s", "learnt_tokens_per_s", "step_s", "mfu", "bubble",
    "loss_scale", "skipped",
)  # fmt: skip
STAGE_LINES = 200  # the newest lines that the figures per stage are averaged over
MOST_STEPS = 2**53


class Series:
    """One curve: ``steps`` rising, ``values`` finite."""

    def __init__(self) -> None:
        self.steps, self.values = array("q"), array("d")

    def add(self, step: int, value: float) -> None:
        self.steps.append(step)
        self.values.append(value)

    def cut(self, step: int) -> None:
        """Forget everything after ``step``."""
        if self.steps and self.steps[-1] > step:
            keep = bisect_right(self.steps, step)
            del self.steps[keep:], self.values[keep:]


class Curves:
    """``series``: key of KEYS or "eval" -> Series. ``saves``: lines of kind "save". ``starts``: (step, total steps) of each start.
    ``planned``: GiB per stage, from the last start's line of kind "memory"; [] if there is none.

    ``update`` reads what the file has got since the last call. A start voids what earlier lines say of later steps, and of two
    lines for one step the later one counts. Lines that are no JSON objects with a step are counted in ``unreadable``.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.offset = path, 0
        self.series: Dict[str, Series] = {key: Series() for key in KEYS + ("eval",)}
        self.saves: List[Dict[str, Any]] = []
        self.starts: List[Tuple[int, int]] = []
        self.stage_lines: Deque[Dict[str, Any]] = deque(maxlen=STAGE_LINES)
        self.planned: List[float] = []
        self.unreadable = 0

    @property
    def step(self) -> int:
        """The last step with a line, or what the last start began from."""
        return max([s.steps[-1] for s in self.series.values() if s.steps] + [start for start, _ in self.starts[-1:]] + [0])

    @property
    def total(self) -> int:
        return self.starts[-1][1] if self.starts else 0

    def update(self) -> "Curves":
        try:
            with open(str(self.path), "rb") as file:
                file.seek(self.offset)
                for raw in file:
                    if not raw.endswith(b"\n"):
                        break  # it is being written, or was when the machine died
                    self.offset += len(raw)
                    self._take(raw)
        except OSError:
            return self  # no file yet, or none that can be read: the page says that there are no steps
        return self

    def _take(self, raw: bytes) -> None:
        line = metrics.parsed(raw) or {}
        step = line.get("step")
        if isinstance(step, bool) or not isinstance(step, int) or not 0 <= step < MOST_STEPS:
            self.unreadable += 1
            return
        kind = line.get("kind")
        if kind == "start":
            total = line.get("total_steps")
            total = total if isinstance(total, int) and 0 <= total < MOST_STEPS else 0
            self._cut(step)
            if step < total or not total:  # else it only evaluates what has been trained
                self.stage_lines.clear()
                self.planned = []
            self.starts.append((step, total))
        elif kind == "step":
            for key in KEYS:
                self._add(key, step, line.get(key))
            self.stage_lines.append(line)
        elif kind == "eval":
            self._add("eval", step, line.get("loss"))
        elif kind == "memory":
            self.planned = numbers(line.get("planned_gib"))
        elif kind == "save":
            self.saves = [save for save in self.saves if save["step"] != step] + [line]

    def _add(self, key: str, step: int, value: Any) -> None:
        number = finite(value)
        series = self.series[key]
        series.cut(step - 1)
        if number is not None:
            series.add(step, number)

    def _cut(self, step: int) -> None:
        for series in self.series.values():
            series.cut(step)
        self.saves = [save for save in self.saves if save["step"] <= step]

    def per_stage(self, key: str) -> List[float]:
        """The mean of a list such as "stage_s" over the newest lines that have as many stages as the last one; [] if unknown."""
        found = [row for row in (numbers(line.get(key)) for line in self.stage_lines) if row]
        rows = [row for row in found if len(row) == len(found[-1])]
        return [sum(column) / len(rows) for column in zip(*rows)]

    def mean(self, key: str) -> Optional[float]:
        """Of the newest lines since the last start."""
        found = [number for number in (finite(line.get(key)) for line in self.stage_lines) if number is not None]
        return sum(found) / len(found) if found else None


def finite(value: Any) -> Optional[float]:
    """A number that can be drawn, or None."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def numbers(value: Any) -> List[float]:
    """A list of numbers, or [] for anything else."""
    found = [finite(v) for v in value] if isinstance(value, list) else []
    return [] if None in found else [v for v in found if v is not None]


def smooth(values: Sequence[float], span: float) -> List[float]:
    """Exponential moving average over about ``span`` values, its start corrected (Kingma & Ba 2015, section 3)."""
    decay, average, weight, out = 1.0 - 1.0 / max(1.0, span), 0.0, 0.0, []
    for value in values:
        average = decay * average + (1.0 - decay) * value
        weight = decay * weight + (1.0 - decay)
        out.append(average / weight)
    return out


def thin(steps: Sequence[int], values: Sequence[float], buckets: int) -> Tuple[List[int], List[float]]:
    """At most 2 x ``buckets`` + 2 points: the smallest and the largest of each bucket, the first and the last point."""
    count = len(steps)
    if count <= 2 * buckets:
        return list(steps), list(values)
    keep = {0, count - 1}
    for bucket in range(buckets):
        places = range(bucket * count // buckets, (bucket + 1) * count // buckets)
        keep.add(min(places, key=values.__getitem__))
        keep.add(max(places, key=values.__getitem__))
    chosen = sorted(keep)
    return [steps[i] for i in chosen], [values[i] for i in chosen]
