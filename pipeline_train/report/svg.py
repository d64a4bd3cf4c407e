"""Charts as inline SVG: they stand without a script; the page's script only adds the values under the pointer."""

import math
from typing import Any, Dict, List, NamedTuple, Sequence, Tuple

from .words import attribute, figure, text

WIDTH, HEIGHT = 760.0, 250.0
LEFT, RIGHT, TOP, BOTTOM = 66.0, 14.0, 12.0, 40.0
ROW = 46.0  # height of one stage in a bar chart


class Line(NamedTuple):
    """A curve. ``kind``: "line", "dots", or "steps" (a value holds until the next one). ``css``: class that colours it."""

    name: str
    css: str
    kind: str
    steps: Sequence[int]
    values: Sequence[float]


class Span(NamedTuple):
    """A time in which a stage did something."""

    css: str
    start: float
    seconds: float
    label: str


class Bar(NamedTuple):
    """One bar of a stage: what it is, its colour, its length, the length in words."""

    name: str
    css: str
    value: float
    label: str


def ticks(low: float, high: float, wanted: int = 5) -> List[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) within [low, high]."""
    if not high > low:
        return [low]
    rough = (high - low) / wanted
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * m for m in (1, 2, 5, 10) if unit * m >= rough * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [n * step for n in range(first, last + 1)]


def log_ticks(low: float, high: float) -> List[float]:
    """Powers of ten within [low, high], thinned to at most eight; the ends where there is none."""
    powers = range(math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9) + 1)
    found = [10.0**n for n in powers][:: max(1, math.ceil(len(powers) / 8))]
    return found if len(found) > 1 else [low, high]


def _range(values: Sequence[float], log: bool, zero: bool) -> Tuple[float, float]:
    low, high = min(values), max(values)
    if log:
        return (low, high) if high > low else (low / 2, high * 2)
    if zero and low >= 0:
        low = 0.0
    margin = 0.04 * (high - low) or 0.5 * abs(high) or 1.0
    return (low if zero and low == 0 else low - margin), high + margin


class Scale:
    """Values to the picture's units."""

    def __init__(self, low: float, high: float, start: float, end: float, log: bool = False) -> None:
        self.map = math.log10 if log else float
        self.low, self.start = self.map(low), start
        self.unit = (end - start) / ((self.map(high) - self.low) or 1.0)

    def __call__(self, value: float) -> float:
        return self.start + (self.map(value) - self.low) * self.unit


def chart(name: str, unit: str, lines: Sequence[Line], marks: Sequence[int] = (), zero: bool = False) -> Tuple[str, Dict[str, Any]]:
    """-> (figure element, what the script must know to show values). ``marks``: steps at which the run was resumed.

    The vertical axis is logarithmic where all values are positive and the largest is over 100 times the smallest.
    """
    lines = [line for line in lines if len(line.steps)]
    values = [v for line in lines for v in line.values]
    steps = [s for line in lines for s in (line.steps[0], line.steps[-1])]
    log = not zero and min(values) > 0 and max(values) > 100 * min(values)
    first, last = min(steps), max(steps)
    low, high = _range(values, log, zero)
    across = Scale(first, last if last > first else first + 1, LEFT, WIDTH - RIGHT)
    up = Scale(low, high, HEIGHT - BOTTOM, TOP, log)
    parts = _axes(across, up, ticks(first, last, 8), log_ticks(low, high) if log else ticks(low, high), unit, log)
    for mark in marks:
        if first <= mark <= last:
            x = across(mark)
            parts.append('<line class="mark" x1="%.1f" x2="%.1f" y1="%.1f" y2="%.1f"><title>resumed after step %d</title></line>'
                         % (x, x, TOP, HEIGHT - BOTTOM, mark))  # fmt: skip
    for line in lines:
        parts += _draw(line, across, up)
    parts.append('<line class="cursor" y1="%.1f" y2="%.1f" visibility="hidden"/>' % (TOP, HEIGHT - BOTTOM))
    known = {
        "x": [across(first), across.unit, first],
        "lines": [{"name": line.name, "steps": list(line.steps), "values": [short(v) for v in line.values]} for line in lines],
    }
    about = "%s over the optimizer step, step %d to %d. " % (name, first, last)
    about += "; ".join("%s: from %s to %s" % (line.name, figure(line.values[0]), figure(line.values[-1])) for line in lines)
    return _figure(name, about, HEIGHT, parts, [(line.name, line.css) for line in lines]), known


def short(value: float) -> float:
    """Five digits are enough for a value under the pointer."""
    return float("%.5g" % value)


def _axes(across: Scale, up: Scale, steps: Sequence[float], values: Sequence[float], unit: str, log: bool) -> List[str]:
    out = []
    for value in values:
        y = up(value)
        out.append('<line class="grid" x1="%g" x2="%g" y1="%.1f" y2="%.1f"/>' % (LEFT, WIDTH - RIGHT, y, y))
        out.append('<text class="tick" x="%g" y="%.1f" text-anchor="end">%s</text>' % (LEFT - 6, y + 4, figure(value)))
    for step in sorted({int(s) for s in steps}):
        x = across(step)
        out.append('<text class="tick" x="%.1f" y="%g" text-anchor="middle">%s</text>' % (x, HEIGHT - BOTTOM + 16, f"{step:,}"))
    out.append('<text class="unit" x="%g" y="%g" text-anchor="middle">optimizer step</text>' % ((LEFT + WIDTH) / 2, HEIGHT - 6))
    middle = (TOP + HEIGHT - BOTTOM) / 2
    label = unit + (", log scale" if log else "")
    out.append('<text class="unit" transform="translate(13 %g) rotate(-90)" text-anchor="middle">%s</text>' % (middle, text(label)))
    return out


def _draw(line: Line, across: Scale, up: Scale) -> List[str]:
    points = [(across(s), up(v)) for s, v in zip(line.steps, line.values)]
    if line.kind == "dots" or len(points) == 1:
        titles = ["%s, step %d: %s" % (line.name, s, figure(v)) for s, v in zip(line.steps, line.values)]
        return [
            '<circle class="dot %s" cx="%.1f" cy="%.1f" r="3.5"><title>%s</title></circle>' % (line.css, x, y, text(title))
            for (x, y), title in zip(points, titles)
        ]
    if line.kind == "steps":
        path = "M%.1f %.1f" % points[0] + "".join("H%.1fV%.1f" % point for point in points[1:])
    else:
        path = "M%.1f %.1f" % points[0] + "".join("L%.1f %.1f" % point for point in points[1:])
    return ['<path class="line %s" data-points="%d" d="%s"/>' % (line.css, len(points), path)]


def bars(name: str, stages: Sequence[Tuple[str, Sequence[Bar]]], most: float) -> str:
    """One row for each stage (label, its bars); ``most``: the value that fills the width."""
    parts, left = [], 190.0
    span = WIDTH - RIGHT - left - 110.0
    for row, (label, found) in enumerate(stages):
        top = 6 + row * ROW
        parts.append('<text class="stage" x="0" y="%.1f">%s</text>' % (top + 20, text(label)))
        thick = (ROW - 12) / 2  # room for two
        for place, bar in enumerate(found):
            y = top + place * thick + (thick / 2 if len(found) == 1 else 0)
            length = max(1.0, span * min(1.0, bar.value / most)) if most > 0 else 1.0
            parts.append('<rect class="bar %s" x="%g" y="%.1f" width="%.1f" height="%.1f"><title>%s</title></rect>' % (
                bar.css, left, y, length, thick - 2, text("%s, %s: %s" % (label, bar.name, bar.label))))  # fmt: skip
            parts.append('<text class="tick" x="%.1f" y="%.1f">%s</text>' % (left + length + 6, y + thick / 2 + 3, text(bar.label)))
    about = "; ".join("%s: %s" % (label, ", ".join("%s %s" % (b.name, b.label) for b in found)) for label, found in stages)
    legend = list({bar.css: (bar.name, bar.css) for _, found in stages for bar in found}.values())
    return _figure(name, about, 12 + ROW * len(stages), parts, legend)


def spans(name: str, stages: Sequence[Tuple[str, Sequence[Span]]], seconds: float, legend: Sequence[Tuple[str, str]]) -> str:
    """What each stage did when, one row each, over ``seconds``."""
    parts, left, thick = [], 70.0, 20.0
    across = Scale(0.0, seconds or 1.0, left, WIDTH - RIGHT)
    for row, (label, found) in enumerate(stages):
        top = 6 + row * (thick + 6)
        parts.append('<text class="stage" x="0" y="%.1f">%s</text>' % (top + 14, text(label)))
        for span in found:
            x, end = across(span.start), across(span.start + span.seconds)
            parts.append('<rect class="bar %s" x="%.1f" y="%.1f" width="%.1f" height="%g"><title>%s</title></rect>' % (
                span.css, x, top, max(0.5, end - x - 0.5), thick, text(span.label)))  # fmt: skip
    bottom = 6 + len(stages) * (thick + 6)
    for value in ticks(0.0, seconds, 6):
        parts.append('<text class="tick" x="%.1f" y="%.1f" text-anchor="middle">%s s</text>'
                     % (across(value), bottom + 14, figure(value)))  # fmt: skip
    about = "; ".join("%s: %d instructions" % (label, len(found)) for label, found in stages)
    return _figure(name, about, bottom + 22, parts, legend)


def charts_grid(figures: Sequence[str]) -> str:
    """Beside each other where the window is wide enough; "" for none."""
    return '<div class="charts">%s</div>' % "".join(figures) if figures else ""


def _figure(name: str, about: str, height: float, parts: List[str], legend: Sequence[Tuple[str, str]]) -> str:
    keys = "".join('<span class="key %s">%s</span>' % (css, text(label)) for label, css in legend)
    return (
        '<figure data-chart="%s"><figcaption>%s<span class="legend">%s</span></figcaption>'
        '<svg viewBox="0 0 %g %g" role="img" tabindex="0" aria-label="%s"><desc>%s</desc>%s</svg></figure>'
        % (attribute(name), text(name), keys, WIDTH, height, attribute(name), text(about), "".join(parts))
    )
