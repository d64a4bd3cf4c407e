"""The schedule of one traced step (run.trace): what every stage did when, and how close that is to what 1F1B allows."""

from pathlib import Path
from typing import Dict, List, Sequence

from .. import trace
from ..trace import Span
from . import svg
from .words import figure, text

CSS = {"ForwardPass": "a", "BackwardPass": "b", "OptimizerStep": "c"}


def schedule_section(out: Path) -> str:
    """ "" where no step was traced. The first replica stands for all."""
    step, spans = trace.read(out / trace.NAME)
    rows: Dict[int, List[Span]] = {}
    for span in spans:
        if span.replica == 0 and span.name in CSS:
            rows.setdefault(span.stage, []).append(span)
    if not rows:
        return ""
    begin = min(span.start for found in rows.values() for span in found)
    end = max(span.start + span.seconds for found in rows.values() for span in found)
    drawn = [
        ("stage %d" % stage, [
            svg.Span(CSS[span.name], span.start - begin, span.seconds, "%s of micro-batch %d: %s s" % (
                trace.SHOWN[span.name], span.micro + 1, figure(span.seconds)) if span.name != "OptimizerStep"
                else "optimizer step, with waiting for the other stages: %s s" % figure(span.seconds))
            for span in rows[stage]])
        for stage in sorted(rows)
    ]  # fmt: skip
    legend = [(trace.SHOWN[name], css) for name, css in CSS.items()]
    picture = svg.spans("Step %d, what each stage computed when" % step, drawn, end - begin, legend)
    return svg.charts_grid([picture]) + "<p>%s</p>" % text(words([rows[stage] for stage in sorted(rows)]))


def words(stages: Sequence[Sequence[Span]]) -> str:
    """The pipelined part beside the least that 1F1B needs for these stages: one micro-batch through all of them, then the slowest
    stage's time for each of the others."""
    busy = [[span for span in found if span.name in trace.BUSY] for found in stages]
    if not all(busy):
        return ""
    micro = sum(span.name == "ForwardPass" for span in busy[0])
    took = max(s.start + s.seconds for found in busy for s in found) - min(s.start for found in busy for s in found)
    least = bound([sum(span.seconds for span in found) / max(1, micro) for found in busy], micro)
    line = "Pipelined part: %s s. 1F1B with these stages' own times needs %s s: %.1f %% of it."
    return line % (figure(took), figure(least), 100 * least / took if took else 0.0)


def bound(stages: Sequence[float], micro_batches: int) -> float:
    """``stages``: seconds of each for a micro-batch, forward and backward."""
    return sum(stages) + (micro_batches - 1) * max(stages)
