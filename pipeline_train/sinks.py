"""Where the lines of metrics.jsonl are shown besides: the launcher's display, TensorBoard, Weights & Biases.

<out>/tensorboard/   event files, when the package ``tensorboard`` is installed
W&B                  when ``run.wandb`` is set: ``true`` (project "pipedock") or the project's name

None of them is worth a run: what cannot be written is said once and left out from then on.
"""

import importlib
import importlib.util
import json
import threading
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional

from .config_schema import RunConfig
from .errors import UserError
from .metrics import Metrics

Message = Callable[[Dict[str, Any]], None]  # to the launcher: {"line": a line of metrics.jsonl} or {"say": text for the user}
Say = Callable[[str], None]

PROJECT = "pipedock"  # the W&B project of ``run.wandb: true``
WANDB_ID = "wandb.json"  # in <out>/resolved: a resumed run goes on in the same W&B run
INIT_S, FINISH_S = 30, 20  # W&B retries for minutes when its server cannot be reached; the other ranks would wait
LISTS = {"mem_gib": "memory_gib", "stage_s": "busy_s"}  # per stage
PLAIN = (
    "loss",
    "grad_norm",
    "lr",
    "tokens_per_s",
    "learnt_tokens_per_s",
    "mfu",
    "step_s",
    "bubble",
    "epoch",
    "loss_scale",
    "skipped",
)


def check(run: RunConfig, where: str) -> None:
    """Before anything starts. Raises UserError when ``run.wandb`` asks for a package that is not installed."""
    if run.run.wandb and importlib.util.find_spec("wandb") is None:
        raise UserError(
            '%s: run.wandb: the package wandb is not installed. pip install "pipedock[watch]", or remove the key' % where
        )


def open_metrics(run: RunConfig, out: Path, done: int, tell: Message) -> Metrics:
    """<out>/metrics.jsonl with every sink of this run, which starts after step ``done``."""

    def say(text: str) -> None:
        tell({"say": text})

    sinks: List[Any] = [Launcher(tell)]
    if importlib.util.find_spec("tensorboard") is None:
        say('no TensorBoard files: the package tensorboard is not installed (pip install "pipedock[watch]")')
    else:
        sinks.append(Guarded("TensorBoard", lambda: TensorBoard(out / "tensorboard", done), say))
    if run.run.wandb:
        sinks.append(Guarded("W&B", lambda: Wandb(run, out), say))
    return Metrics(out / "metrics.jsonl", sinks)


def scalars(line: Dict[str, Any]) -> Dict[str, float]:
    """What of a line is a curve: "train/loss", "eval/loss", "save/stall_s", "memory_gib/stage_0", ... -> number."""
    kind = line["kind"]
    if kind == "eval":
        found = {"eval/loss": line.get("loss")}
    elif kind == "save":
        found = {"save/seconds": line.get("seconds"), "save/stall_s": line.get("stall_s")}
    elif kind == "step":
        found = {"train/" + key: line.get(key) for key in PLAIN}
        for key, name in LISTS.items():
            found.update({"%s/stage_%d" % (name, stage): value for stage, value in enumerate(line.get(key) or ())})
    else:
        found = {}
    return {key: float(value) for key, value in found.items() if value is not None}


class Launcher:
    """The lines that the progress messages of the steps do not carry go to the launcher, which draws the display and the report."""

    def __init__(self, tell: Message) -> None:
        self.tell = tell

    def write(self, line: Dict[str, Any]) -> None:
        if line["kind"] != "step":
            self.tell({"line": line})

    def close(self) -> None:
        """Nothing is kept back."""


class Guarded:
    """A sink of somebody else's: its first error is said, then it is left out and the run goes on."""

    def __init__(self, name: str, make: Callable[[], Any], say: Say) -> None:
        self.name, self.say = name, say
        self.sink: Any = None
        self.sink = self._try(make)

    def write(self, line: Dict[str, Any]) -> None:
        if self.sink is not None:
            self._try(lambda: self.sink.write(line))

    def close(self) -> None:
        if self.sink is not None:
            self._try(lambda: self.sink.close())

    def _try(self, action: Callable[[], Any]) -> Any:
        try:
            return action()
        except Exception as error:  # noqa: BLE001 - a network, a disk, another package's bug: whatever it is, training goes on
            self.sink = None
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            self.say("%s is left out from here on, the run goes on: %s" % (self.name, reason))
            return None


class TensorBoard:
    """Event files. ``purge_step`` voids what an earlier start wrote of later steps, so no step shows twice."""

    def __init__(self, folder: Path, done: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder), purge_step=done + 1, flush_secs=10)

    def write(self, line: Dict[str, Any]) -> None:
        for name, value in scalars(line).items():
            self.writer.add_scalar(name, value, line["step"])

    def close(self) -> None:
        self.writer.close()


class Wandb:
    """A W&B run, online or with WANDB_MODE=offline. W&B keeps the first values of a step that is logged again."""

    def __init__(self, run: RunConfig, out: Path) -> None:
        import msgspec

        self.wandb = importlib.import_module("wandb")
        place = out / "resolved" / WANDB_ID
        known = json.loads(place.read_text(encoding="utf-8"))["id"] if place.exists() else None
        project = run.run.wandb if isinstance(run.run.wandb, str) else PROJECT
        settings = self.wandb.Settings(console="off", init_timeout=INIT_S)  # the ranks' output is in <out>/logs
        self.run = self.wandb.init(
            project=project, name=run.run.name or None, dir=str(out), id=known, resume="allow", config=msgspec.to_builtins(run),
            settings=settings,
        )  # fmt: skip
        place.write_text(json.dumps({"id": self.run.id}) + "\n", encoding="utf-8")
        self.step = 0

    def write(self, line: Dict[str, Any]) -> None:
        self.step = max(self.step, line["step"])  # a save that went on behind later steps: W&B takes no smaller step
        found = scalars(line)
        if found:
            self.run.log(found, step=self.step)

    def close(self) -> None:
        """Ends the run; a server that does not answer is waited for no longer than FINISH_S."""
        problem: List[Optional[Exception]] = [TimeoutError("not everything was sent within %g s; `wandb sync` sends it" % FINISH_S)]

        def finish() -> None:
            try:
                self.run.finish()
                problem[0] = None
            except Exception as error:  # noqa: BLE001 - handed to the thread that waits
                problem[0] = error

        thread = threading.Thread(target=finish, daemon=True)
        thread.start()
        thread.join(FINISH_S)
        if problem[0] is not None:
            raise problem[0]
