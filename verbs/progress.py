"""What a person sees of a running training: a live display on a terminal, plain lines elsewhere.

Messages come from rank 0 through the launcher (keys that are missing are not shown):
{"step", "total", "loss", "tokens", "learnt_tokens", "eta_s", "epoch"}   after each step
{"line": a line of metrics.jsonl}                                         see pipeline_train/metrics.py
{"say": text}                                                             something the user should know
"""

import contextlib
import os
import sys
import time
from typing import Any, Dict, List, Optional, Tuple

RECENT = 21  # steps over which speed is averaged
Figure = Tuple[str, str]  # what, its value with the unit


class Progress:
    """``show`` takes every message, ``close`` leaves the terminal as it was. ``pipe`` stages, ``micro`` micro-batches a step."""

    def __init__(self, total: int, name: str = "", pipe: int = 1, micro: int = 1) -> None:
        self.figures = Figures(total, name, pipe, micro)
        terminal = sys.stderr.isatty() and os.environ.get("TERM", "dumb") not in ("dumb", "unknown")
        self.view: Any = Lines(self.figures)
        if terminal:
            from .display import Live

            self.view = Live(self.figures)

    def show(self, message: Dict[str, Any]) -> None:
        self.figures.take(message)
        self.view.show(message)

    def close(self) -> None:
        """May be called twice."""
        self.view.close()


class Figures:
    """The newest value of everything, gathered from the messages."""

    def __init__(self, total: int, name: str, pipe: int, micro: int) -> None:
        self.total, self.name, self.ideal_bubble = total, name, (pipe - 1) / (micro + pipe - 1)
        self.now: Dict[str, Any] = {}  # the newest message of a step
        self.line: Dict[str, Any] = {}  # the newest line of kind "step"
        self.evaluation: Dict[str, Any] = {}
        self.save: Dict[str, Any] = {}
        self.taken = self.began = time.monotonic()
        self._recent: List[Tuple[float, int, Optional[int]]] = []

    def take(self, message: Dict[str, Any]) -> None:
        line = message.get("line") or {}
        if line.get("kind", "step" if line else "") == "step":
            self.line = line
        elif line.get("kind") == "eval":
            self.evaluation = line
        elif line.get("kind") == "save":
            self.save = line
        if "step" in message:
            self.now, self.taken = message, time.monotonic()
            self._recent = (self._recent + [(self.taken, message.get("tokens", 0), message.get("learnt_tokens"))])[-RECENT:]

    @property
    def step(self) -> int:
        return int(self.now.get("step", 0))

    def left(self) -> Optional[float]:
        """Seconds to the end, counting down between two messages."""
        eta = self.now.get("eta_s")
        return None if eta is None else max(0.0, eta - (time.monotonic() - self.taken))

    def speed(self) -> List[Figure]:
        seconds = self._recent[-1][0] - self._recent[0][0] if self._recent else 0.0
        if seconds <= 0:
            return []
        tokens = sum(row[1] for row in self._recent[1:])
        learnt = [row[2] for row in self._recent[1:]]
        text = f"{tokens / seconds:,.0f}"
        if None not in learnt:
            text += f" ({sum(n or 0 for n in learnt) / seconds:,.0f} learnt)"
        return [("tokens/s", text)]

    def known(self) -> List[Figure]:
        """Everything that is known, most wanted first."""
        now, line = self.now, self.line
        out = [("loss", "%.4f" % now["loss"])] if now.get("loss") is not None else []
        if self.evaluation.get("loss") is not None:
            out.append(("eval loss", "%.4f at step %d" % (self.evaluation["loss"], self.evaluation["step"])))
        out += self.speed()
        for key, name, form in (("grad_norm", "gradient norm", "%.3g"), ("lr", "lr", "%.3g"), ("step_s", "step", "%.3g s")):
            out += [(name, form % line[key])] if line.get(key) is not None else []
        out += [("MFU", percent(line["mfu"]))] if line.get("mfu") is not None else []
        if line.get("bubble") is not None:
            out.append(("bubble", "%s (schedule %s)" % (percent(line["bubble"]), percent(self.ideal_bubble))))
        if line.get("loss_scale") is not None:
            out.append(("loss scale", "%g, %d steps skipped" % (line["loss_scale"], line.get("skipped") or 0)))
        out += [("epoch", str(now["epoch"] + 1))] if now.get("epoch") is not None else []
        return out + ([("saved", saved(self.save))] if self.save else [])

    def stages(self) -> List[Tuple[Optional[float], Optional[float]]]:
        """Per stage: seconds of a step it computed, GiB."""
        busy, memory = self.line.get("stage_s") or [], self.line.get("mem_gib") or []
        return [
            (busy[s] if s < len(busy) else None, memory[s] if s < len(memory) else None) for s in range(max(len(busy), len(memory)))
        ]


class Lines:
    """Where there is no terminal: now and then a line; every evaluation and save, and the memory of the first step."""

    EVERY_S = 5.0  # between two lines of steps

    def __init__(self, figures: Figures) -> None:
        self.figures, self.last = figures, 0.0

    def show(self, message: Dict[str, Any]) -> None:
        kind = (message.get("line") or {}).get("kind")
        if "say" in message:
            say(message["say"])
        if kind == "eval" and message["line"].get("loss") is not None:
            say("step %d: eval loss %.4f" % (message["line"]["step"], message["line"]["loss"]))
        if kind == "save":
            say("saved " + saved(message["line"]))
        if told(message.get("line")):
            say(told(message["line"]))
        now = time.monotonic()
        if "step" in message and (now - self.last >= self.EVERY_S or message["step"] == message["total"]):
            self.last = now
            say(self._line())

    def _line(self) -> str:
        now, figures = self.figures.now, self.figures
        parts = ["step %d/%d" % (now["step"], now["total"])]
        parts += ["loss %.4f" % now["loss"]] if now.get("loss") is not None else []
        parts += ["%s %s" % (value, name) for name, value in figures.speed()]
        parts += ["mfu %s" % percent(figures.line["mfu"])] if figures.line.get("mfu") is not None else []
        left = figures.left()
        return "  ".join(parts + (["eta %s" % clock(left)] if left is not None else []))

    def close(self) -> None:
        """Nothing is held."""


def saved(line: Dict[str, Any]) -> str:
    """A line of kind "save" in words."""
    text = "step %d" % line["step"]
    if line.get("seconds") is not None:
        text += " in %.1f s" % line["seconds"]
    if line.get("stall_s") is not None:
        text += ", training stood still for %.1f s" % line["stall_s"]
    return text


def told(line: Optional[Dict[str, Any]]) -> str:
    """A line of kind "startup" or "memory" in words, "" for others."""
    line = line or {}
    if line.get("kind") == "startup":
        parts = ["%s %.1f s" % (name.replace("_", " "), seconds) for name, seconds in line["seconds"].items()]
        return "start-up took %.1f s: %s" % (sum(line["seconds"].values()), ", ".join(parts))
    if line.get("kind") != "memory":
        return ""
    pairs = ["stage %d: %.2f of %.2f" % (stage, *pair) for stage, pair in enumerate(zip(line["mem_gib"], line["planned_gib"]))]
    return "memory after step %d, GiB measured of planned: %s" % (line["step"], ", ".join(pairs))


def percent(part: float) -> str:
    return "%.1f %%" % (100.0 * part)


def clock(seconds: float) -> str:
    whole = int(seconds + 0.5)
    return "%d:%02d:%02d" % (whole // 3600, whole // 60 % 60, whole % 60)


def say(line: str) -> None:
    """To stderr; whoever read it may have gone (``| head``), which ends no training."""
    with contextlib.suppress(OSError):
        print(line, file=sys.stderr)
