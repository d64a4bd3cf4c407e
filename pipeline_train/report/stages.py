"""The stages of the pipeline: what the plan gave them beside what they were measured to do."""

from typing import List, Optional, Sequence, Tuple

from ..config_schema import RunConfig
from .curves import Curves
from .facts import Stage
from .svg import Bar, bars, charts_grid
from .words import count, figure, text


def stages_section(curves: Curves, run: Optional[RunConfig], plan: Sequence[Stage]) -> str:
    busy, memory = curves.per_stage("stage_s"), curves.per_stage("mem_gib")
    number = len(busy) or len(memory) or len(plan)
    plan = plan if len(plan) == number else []  # resumed at another stage count, no step since
    memory = memory if len(memory) == number else []
    if not number:
        return ""
    parts = []
    work = [(stage_name(plan, stage), work_bars(plan, busy, stage)) for stage in range(number)]
    if plan or busy:
        most = max(bar.value for _, found in work for bar in found)
        parts.append(bars("Share of the work", work, most))
    planned = curves.planned if len(curves.planned) == number else []
    if memory:
        rows = [(stage_name(plan, s), memory_bars(planned, memory, s)) for s in range(number)]
        parts.append(bars("Peak memory, largest rank of each stage", rows, max(memory + planned)))
    return charts_grid(parts) + bubble(curves, run) + stage_table(plan, busy, memory, planned, curves.mean("step_s"))


def stage_name(plan: Sequence[Stage], stage: int) -> str:
    if not plan:
        return "stage %d" % stage
    first, last = plan[stage].first, plan[stage].last
    return "stage %d, layer%s" % (stage, "s %d-%d" % (first, last) if last > first else " %d" % first)


def work_bars(plan: Sequence[Stage], busy: Sequence[float], stage: int) -> List[Bar]:
    found = []
    if plan:
        found.append(Bar("FLOPs by the plan", "a", plan[stage].share, "%.1f %%" % (100 * plan[stage].share)))
    if busy and sum(busy) > 0:
        share = busy[stage] / sum(busy)
        found.append(Bar("measured busy time", "b", share, "%.1f %%" % (100 * share)))
    return found


def memory_bars(planned: Sequence[float], memory: Sequence[float], stage: int) -> List[Bar]:
    found = [Bar("planned", "a", planned[stage], "%.2f GiB" % planned[stage])] if planned else []
    return found + [Bar("measured", "c", memory[stage], "%.2f GiB" % memory[stage])]


def bubble(curves: Curves, run: Optional[RunConfig]) -> str:
    """The measured idle share beside what the schedule costs at least."""
    measured = curves.mean("bubble")
    if run is None:
        return ""
    stages, micro = run.parallel.pipe, run.micro_batches
    ideal = (stages - 1) / (micro + stages - 1)
    schedule = "(P-1)/(M+P-1) = %d/%d = %.1f %%" % (stages - 1, micro + stages - 1, 100 * ideal)
    line = "Idle time of the schedule with P = %d stages and M = %d micro-batches: %s." % (stages, micro, schedule)
    if measured is not None:
        line = "Bubble measured: %.1f %% of the pipelined part of a step, the stages' mean. %s" % (100 * measured, line)
    return '<p class="bubble">%s</p>' % text(line)


def stage_table(
    plan: Sequence[Stage], busy: Sequence[float], memory: Sequence[float], planned: Sequence[float], step_s: Optional[float]
) -> str:
    columns: List[Tuple[str, List[str]]] = []
    if plan:
        columns.append(("layers", ["%d-%d" % (s.first, s.last) for s in plan]))
        columns.append(("parameters", [count(s.params) for s in plan]))
        columns.append(("FLOPs by the plan", ["%.1f %%" % (100 * s.share) for s in plan]))
    if busy:
        columns.append(("busy, s a step", [figure(s) for s in busy]))
        if step_s:
            columns.append(("busy part of a step", ["%.1f %%" % (100 * s / step_s) for s in busy]))
    if memory:
        columns.append(("peak memory, GiB", ["%.2f" % gib for gib in memory]))
    if planned:
        columns.append(("planned, GiB", ["%.2f" % gib for gib in planned]))
    head = "".join("<th scope=col>%s</th>" % text(name) for name, _ in [("stage", [])] + columns)
    rows = "".join(
        "<tr><th scope=row>%d</th>%s</tr>" % (stage, "".join("<td>%s</td>" % text(cells[stage]) for _, cells in columns))
        for stage in range(max(len(plan), len(busy), len(memory)))
    )
    return '<details><summary>The same as a table</summary><table class="wide"><tr>%s</tr>%s</table></details>' % (head, rows)
