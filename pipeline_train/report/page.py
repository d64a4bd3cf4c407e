"""The page: facts and curves -> HTML. Every section is left out when there is nothing to show in it."""

import base64
import hashlib
import re
from datetime import datetime
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

from ..config_schema import RunConfig
from . import facts
from .curves import Curves, Series, smooth, thin
from .facts import Stage
from .schedule import schedule_section
from .stages import stages_section
from .svg import Line, chart, charts_grid
from .tables import data_section, proofs_section, saves_section, starts_section, table
from .words import count, duration, script_json, text

BUCKETS = 240  # of a curve: at most twice as many points
MOST_DOTS = 120  # more points than these are joined to a line
STATES = ("running", "finished", "stopped", "interrupted", "failed")
HERE = Path(__file__).resolve().parent

Charts = List[Tuple[str, Dict[str, Any]]]  # (figure element, what the script needs)


def build(out: Path, curves: Curves) -> str:
    """The whole page of the run folder ``out``."""
    source = facts.run_yaml(out)
    run = facts.run_config(source)
    plan = facts.stages(out, run)
    drawn = curve_charts(curves)
    name = (run.run.name if run else "") or out.resolve().name
    state, why = state_of(out, curves)
    sections = [
        ("Curves", charts_grid([element for element, _ in drawn]) or "<p>No step has been logged yet.</p>"),
        ("Stages", stages_section(curves, run, plan)),
        ("Schedule", schedule_section(out)),
        ("Saves", saves_section(curves)),
        ("Data", data_section(out)),
        ("Proofs", proofs_section(out, run)),
        ("Starts", starts_section(out)),
        ("Versions", table(sorted(facts.document(out / "resolved" / "versions.json").items()))),
        ("Configuration", configuration(source)),
    ]
    script = (HERE / "page.js").read_text(encoding="utf-8")
    parts = {
        "title": text(name), "state": text(state), "state_class": state if state in STATES else "stopped",
        "why": '<p class="why">%s</p>' % text(why) if why else "",
        "subtitle": text(subtitle(out, run, plan)), "tiles": tiles(curves, run),
        "sections": "".join("<section><h2>%s</h2>%s</section>" % section for section in sections if section[1]),
        "style": (HERE / "page.css").read_text(encoding="utf-8"), "script": script,
        "hash": base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode("ascii"),
        "data": script_json([known for _, known in drawn]),
        "written": text(datetime.now().astimezone().strftime("%Y-%m-%d %H:%M:%S %z")),
        "unreadable": "<p>%s lines of metrics.jsonl could not be read.</p>" % count(curves.unreadable) if curves.unreadable else "",
    }  # fmt: skip
    page = (HERE / "page.html").read_text(encoding="utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found.group(1)], page)  # in one pass: a name may look like a place


def state_of(out: Path, curves: Curves) -> Tuple[str, str]:
    """-> (state, the line that says why). States: running, finished, stopped, interrupted, failed."""
    last = (facts.sessions(out) or [{}])[-1]
    state, why = str(last.get("state", "")), str(last.get("line") or "")
    done = 0 < curves.total <= curves.step
    if facts.in_use(out) and state in ("running", ""):
        return "running", ""
    if state == "running":
        return "stopped", "It ended without a word, killed or with its machine."
    return state or ("finished" if done else "stopped"), why


def subtitle(out: Path, run: Optional[RunConfig], plan: Sequence[Stage]) -> str:
    if run is None:
        return str(out)
    stages = "%d stages x %d replicas" % (run.parallel.pipe, run.parallel.data)
    params = sum(stage.params for stage in plan)
    size = ", %s parameters on the stages" % count(params) if params else ""
    return "%s · %s · %s, %d micro-batches a step%s" % (run.model.path, run.model.dtype, stages, run.micro_batches, size)


def tiles(curves: Curves, run: Optional[RunConfig]) -> str:
    """The figures a person looks for first."""
    series = curves.series
    found: List[Tuple[str, str]] = [("step", "%s of %s" % (count(curves.step), count(curves.total)) if curves.total else "-")]
    for key, name in (("loss", "training loss"), ("eval", "eval loss")):
        if series[key].values:
            found.append((name, "%.4f" % series[key].values[-1]))
    if len(series["eval"].values) > 1:
        best = min(range(len(series["eval"].values)), key=series["eval"].values.__getitem__)
        found.append(("best eval loss", "%.4f at step %s" % (series["eval"].values[best], count(series["eval"].steps[best]))))
    for key, name in (("tokens", "tokens"), ("learnt_tokens", "learnt tokens")):
        if series[key].values:
            found.append((name, count(sum(series[key].values))))
    for key, name in (("tokens_per_s", "tokens/s"), ("learnt_tokens_per_s", "learnt tokens/s")):
        recent = curves.mean(key)
        found += [(name, count(recent))] if recent is not None else []
    mfu = curves.mean("mfu")
    found += [("MFU", "%.1f %%" % (100 * mfu))] if mfu is not None else []
    seconds = training_seconds(series["tokens"], series["tokens_per_s"])
    found += [("training time", duration(seconds))] if seconds else []
    return "".join('<div class="tile"><dt>%s</dt><dd>%s</dd></div>' % (text(name), text(value)) for name, value in found)


def training_seconds(tokens: Series, speed: Series) -> float:
    """Of all steps, without saving and evaluating."""
    if tokens.steps != speed.steps:
        return 0.0
    return sum(n / rate for n, rate in zip(tokens.values, speed.values) if rate > 0)


def curve(name: str, css: str, series: Series, kind: str = "line", buckets: int = BUCKETS) -> Line:
    steps, values = thin(series.steps, series.values, buckets)
    return Line(name, css, kind, steps, values)


def curve_charts(curves: Curves) -> Charts:
    series, marks = curves.series, [start for start, _ in curves.starts[1:]]
    wanted: List[Tuple[str, str, List[Line], bool]] = []
    many = len(series["loss"].values) >= 50
    loss = [curve("training loss", "a faint" if many else "a", series["loss"])]
    if many:
        span = len(series["loss"].values) / 50
        smoothed = thin(series["loss"].steps, smooth(series["loss"].values, span), BUCKETS // 2)
        loss.append(Line("smoothed over about %d lines" % span, "a", "line", *smoothed))
    kind = "dots" if len(series["eval"].values) <= MOST_DOTS else "line"
    loss.append(curve("eval loss", "b", series["eval"], kind, BUCKETS // 2))
    wanted.append(("Loss", "nats per learnt token", loss, False))
    wanted.append(("Gradient norm", "norm before clipping", [curve("gradient norm", "c", series["grad_norm"])], False))
    wanted.append(("Learning rate", "learning rate", [curve("learning rate", "d", series["lr"], "line", BUCKETS // 2)], True))
    speeds = [curve("tokens", "a", series["tokens_per_s"]), curve("learnt tokens", "b", series["learnt_tokens_per_s"])]
    wanted.append(("Throughput", "tokens per second", speeds, True))
    wanted.append(("Time of a step", "seconds", [curve("step", "c", series["step_s"], "line", BUCKETS // 2)], True))
    mfu = [curve("MFU", "d", series["mfu"], "line", BUCKETS // 2)]
    wanted.append(("Model FLOPs utilisation", "share of the devices' peak", mfu, True))
    bubble = [curve("bubble", "b", series["bubble"], "line", BUCKETS // 2)]
    wanted.append(("Pipeline bubble", "share of pipelined time", bubble, True))
    wanted.append(("Loss scale (fp16)", "loss scale", loss_scale(curves), False))
    return [chart(name, unit, lines, marks, zero) for name, unit, lines, zero in wanted if any(len(line.steps) for line in lines)]


def loss_scale(curves: Curves) -> List[Line]:
    """The scale, and a dot where steps were skipped."""
    scale, skipped = curves.series["loss_scale"], curves.series["skipped"]
    at = dict(zip(scale.steps, scale.values))
    places = [step for step, number in zip(skipped.steps, skipped.values) if number > 0 and step in at]
    dots = thin(places, [at[step] for step in places], MOST_DOTS)
    return [curve("loss scale", "c", scale, "steps", BUCKETS // 2), Line("steps skipped here", "b", "dots", *dots)]


def configuration(source: str) -> str:
    return (
        "<details><summary>run.yaml with every default filled in</summary><pre>%s</pre></details>" % text(source) if source else ""
    )
