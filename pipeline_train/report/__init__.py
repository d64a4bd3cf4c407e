"""<out>/report.html: a run as one page that needs no network, made of what the run folder holds.

``python -m pipeline_train.report OUT`` and ``pipedock report --run OUT`` write it again at any time.
"""

import os
import time
from pathlib import Path
from typing import Any, Callable, Dict, Optional

from ..errors import RunFailed, UserError
from . import facts
from .curves import Curves
from .page import build

NAME = "report.html"
Say = Callable[[str], None]


def write(out: Path, output: Optional[Path] = None, curves: Optional[Curves] = None) -> Path:
    """Write the report of the run folder ``out`` to ``output`` (<out>/report.html), replacing it at once; -> its path.

    ``curves``: from an earlier call, read on. Raises UserError for a folder that holds no run, and when ``output`` cannot
    be written; RunFailed when the run's own page cannot.
    """
    if not (out / "metrics.jsonl").exists() and not (out / "resolved").is_dir():
        raise UserError("%s: holds no run (no metrics.jsonl, no resolved/); name the run.out of a training" % out)
    target = output or out / NAME
    page = build(out, (curves or Curves(out / "metrics.jsonl")).update())
    aside = target.with_name("%s.%d.partial" % (target.name, os.getpid()))
    try:
        aside.write_bytes(page.encode("utf-8"))
        os.replace(str(aside), str(target))
    except OSError as error:
        kind = RunFailed if output is None else UserError
        raise kind("%s: cannot be written: %s" % (target, error.strerror)) from None
    finally:
        if aside.exists():
            aside.unlink()
    return target


class Keeper:
    """The report of a running training: written after a save or an evaluation, but not so often that it would cost time, and at
    the end. What goes wrong with it is said once and costs the run nothing."""

    SHARE = 0.02  # of the launcher's time
    REST_S = 30.0  # between two reports at least

    def __init__(self, out: Path, step: int, say: Say, clock: Callable[[], float] = time.monotonic) -> None:
        self.out, self.say, self.clock = out, say, clock
        self.curves = Curves(out / "metrics.jsonl")
        self.next, self.told = 0.0, False
        self._try(lambda: facts.begin(out, step))

    def show(self, message: Dict[str, Any]) -> None:
        """Takes every progress message of the launcher."""
        line = message.get("line") or {}
        if line.get("kind") in ("save", "eval") and self.clock() >= self.next:
            began = self.clock()
            self.write()
            self.next = self.clock() + max(self.REST_S, (self.clock() - began) / self.SHARE)

    def write(self) -> None:
        self._try(lambda: write(self.out, curves=self.curves))

    def end(self, state: str, line: str = "") -> None:
        """``state``: finished, stopped, interrupted or failed; ``line``: the error."""
        self._try(lambda: facts.end(self.out, state, line))
        self.write()

    def _try(self, action: Callable[[], Any]) -> None:
        try:
            action()
        except Exception as error:  # noqa: BLE001 - a report is never worth the run, whatever is wrong with the folder
            if not self.told:
                self.say("report.html is not up to date: %s" % (" ".join(str(error).split()) or type(error).__name__))
            self.told = True
