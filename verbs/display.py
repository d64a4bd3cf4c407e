"""The live display of a training on a terminal: step bar, figures, stages. Imports rich, so only when there is a terminal."""

import time
from typing import Any, Dict, List, Optional, Tuple

from rich.console import Console, Group
from rich.live import Live as RichLive
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from .progress import Figures, clock, percent, told


class Live:
    """Redrawn in place four times a second, so that it shows life during long steps too."""

    STAGES_FROM_HEIGHT = 9  # rows that everything else may take

    def __init__(self, figures: Figures) -> None:
        self.figures = figures
        self.console = Console(stderr=True)
        self.live = RichLive(get_renderable=self.render, console=self.console, refresh_per_second=4)
        self.live.start()

    def show(self, message: Dict[str, Any]) -> None:
        said = message.get("say") or told(message.get("line"))
        if said:
            self.console.print(said, markup=False, highlight=False)

    def close(self) -> None:
        self.live.stop()

    def render(self) -> Any:
        return Group(self._bar(), *self._figures(), *self._stages())

    def _bar(self) -> Any:
        figures, left = self.figures, self.figures.left()
        begun = Text("step %d/%d" % (figures.step, figures.total), style="bold") if figures.now else Text("starting", style="bold")
        name = figures.name if len(figures.name) <= 24 else figures.name[:23] + "~"
        if name and self.console.width >= 70:
            begun = Text(name + "  ", style="cyan").append(begun)
        spent = clock(time.monotonic() - figures.began)
        times = Text(spent + (" spent, %s left" % clock(left) if left is not None else " spent"))
        table = Table.grid(padding=(0, 2), expand=True)
        table.add_column(no_wrap=True)
        cells = [begun]  # type: List[Any]
        if self.console.width >= 50:
            table.add_column(ratio=1)
            cells.append(ProgressBar(total=max(1, figures.total), completed=figures.step))
        if self.console.width >= 40:
            table.add_column(no_wrap=True, justify="right")
            cells.append(times)
        table.add_row(*cells)
        return table

    def _figures(self) -> List[Any]:
        """The figures, as many in a line as fit; none is broken unless it alone is wider than the terminal."""
        lines, width = [Text()], self.console.width
        for name, value in self.figures.known():
            piece = Text(name + " ", style="dim").append(value, style="not dim bold")
            if lines[-1].cell_len and lines[-1].cell_len + 3 + piece.cell_len > width:
                lines.append(Text())
            lines[-1].append("   " if lines[-1].cell_len else "").append(piece)
        return [line for line in lines if line.cell_len]

    def _stages(self) -> List[Any]:
        stages, step_s = self.figures.stages(), self.figures.line.get("step_s")
        if not stages:
            return []
        if len(stages) + self.STAGES_FROM_HEIGHT > self.console.height:
            return [Text(extremes(stages), no_wrap=True, overflow="ellipsis")]
        table = Table.grid(padding=(0, 2))
        wide = self.console.width >= 50
        for _ in range(5):
            table.add_column(no_wrap=True)
        for stage, (busy, memory) in enumerate(stages):
            cells = [Text("stage %d" % stage, style="dim")]  # type: List[Any]
            if busy is not None:
                cells.append(Text("busy %.3g s" % busy))
                if wide and step_s:
                    cells += [ProgressBar(total=step_s, completed=min(busy, step_s), width=20), Text(percent(busy / step_s))]
            cells += [Text("%.2f GiB" % memory)] if memory is not None else []
            table.add_row(*cells)
        return [table]


def extremes(stages: List[Tuple[Optional[float], Optional[float]]]) -> str:
    """Many stages in one line: the slowest and the fullest."""
    busy = [(seconds, stage) for stage, (seconds, _) in enumerate(stages) if seconds is not None]
    memory = [(gib, stage) for stage, (_, gib) in enumerate(stages) if gib is not None]
    parts = ["busy %.3g to %.3g s (stage %d)" % (min(busy)[0], max(busy)[0], max(busy)[1])] if busy else []
    parts += ["%.2f to %.2f GiB (stage %d)" % (min(memory)[0], max(memory)[0], max(memory)[1])] if memory else []
    return "%d stages: %s" % (len(stages), ", ".join(parts))
