"""What happens around each instruction of DeepSpeed's schedule: a sign of life, the time it takes, and one agreement per step.

The engine looks its methods up in ``_INSTRUCTION_MAP`` by the instruction's class (the same in every version since 0.3); this
gives one engine a map of its own.
"""

import time
from collections import Counter
from typing import Any, Callable, List, NamedTuple, Optional, Tuple

import torch
import torch.distributed as dist

from .pulse import Pulse
from .trace import BUSY, Span

ENDS = ("ReduceTiedGrads", "ReduceGrads", "OptimizerStep")  # the first of them ends the pipelined part of a step
SAID = {
    "LoadMicroBatch": "reading a micro-batch", "ForwardPass": "forward pass", "BackwardPass": "backward pass",
    "SendActivation": "sending activations", "RecvActivation": "waiting for activations", "SendGrad": "sending gradients",
    "RecvGrad": "waiting for gradients", "ReduceTiedGrads": "summing tied gradients",
    "ReduceGrads": "averaging gradients over replicas", "OptimizerStep": "optimizer step",
}  # fmt: skip


class NotFinite(Exception):
    """Loss or gradient of this step are not numbers: raised on every rank, before any weight has moved. The text says which."""


class Agreed(NamedTuple):
    """What all ranks know when a step's optimizer part begins: the largest of what each has seen."""

    stop: int
    saves: int


class Clock:
    """Seconds of this rank in the step that has just ended: ``busy`` computing, ``span`` of the pipelined part."""

    def __init__(self, cuda: bool) -> None:
        self.cuda = cuda
        self.marks: List[Tuple[Any, Any]] = []
        self.first: Any = None
        self.last: Any = None
        self.origin: Any = None  # of a traced step
        self.spans: List[Tuple[str, Any, Any]] = []  # its instructions: name, start, end

    def trace(self) -> None:
        """Note every instruction from now on, until ``traced``."""
        self.origin, self.spans = self.now(), []

    def traced(self) -> List[Tuple[str, float, float]]:
        """(name, start, seconds) of each, seconds from ``trace``'s call. The step's work must be done."""
        origin, spans = self.origin, self.spans
        self.origin, self.spans = None, []
        return [(name, self.between(origin, start), self.between(start, end)) for name, start, end in spans]

    def now(self) -> Any:
        """A point in time: of the host, or in the GPU's queue of work."""
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, start: Any, end: Any) -> float:
        return float(start.elapsed_time(end)) / 1000 if self.cuda else end - start

    def note(self, name: str, start: Any) -> None:
        """An instruction that has ended now."""
        end = self.now()
        if name in BUSY:
            self.marks.append((start, end))
        if self.origin is not None:
            self.spans.append((name, start, end))

    def take(self) -> Tuple[float, float]:
        """(busy, span), and begin again. On a GPU the step's work must be done (reading the loss has waited for it)."""
        busy = sum(self.between(start, end) for start, end in self.marks)
        span = self.between(self.first, self.last) if self.first is not None and self.last is not None else 0.0
        self.marks, self.first, self.last = [], None, None
        return busy, span


class Watched:
    """One engine's instructions, watched. ``agreed`` is that of the last step; ``fp16``: overflows are not errors."""

    def __init__(self, engine: Any, pulse: Pulse, cuda: bool, fp16: bool) -> None:
        self.pulse, self.fp16, self.clock = pulse, fp16, Clock(cuda)
        self.device = "cuda" if cuda else "cpu"
        self.agreed = Agreed(0, 0)
        engine._INSTRUCTION_MAP = {cls: self._wrapped(cls.__name__, do) for cls, do in engine._INSTRUCTION_MAP.items()}

    def begin_trace(self) -> None:
        """Note the next step's instructions. All ranks call it together: clocks differ, so they begin at once."""
        dist.barrier()
        self.clock.trace()

    def end_trace(self, stage: int, replica: int) -> List[Span]:
        """What all ranks have done since, on every rank. The step's work must be done."""
        mine: List[Span] = []
        counts: Counter = Counter()
        for name, start, seconds in self.clock.traced():
            mine.append(Span(stage, replica, name, counts[name], start, seconds))
            counts[name] += 1
        everyone: List[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, mine)
        return [Span(*span) for rank in everyone for span in rank]

    def _wrapped(self, name: str, do: Callable[..., Any]) -> Callable[..., Any]:
        def instruction(engine: Any, *args: Any, **kwargs: Any) -> Any:
            self.pulse.tick(SAID.get(name, name))
            clock = self.clock
            if name in ENDS and clock.last is None:
                clock.last = clock.now()
            start = clock.now() if name in BUSY or clock.origin is not None else None
            if name in BUSY and clock.first is None:
                clock.first = start
            if name == "OptimizerStep":
                result = self._step(engine, lambda: do(engine, *args, **kwargs))
            else:
                result = do(engine, *args, **kwargs)
            if start is not None:
                clock.note(name, start)
            return result

        return instruction

    def _step(self, engine: Any, do: Callable[[], Any]) -> Any:
        """DeepSpeed 0.9.2 and 0.19.8 move the loss scale before they divide the gradient by it: a step that doubles the scale would
        use half of an unclipped gradient. Here the scale moves after the step."""
        self._agree(engine)
        if self.fp16:
            engine.optimizer._update_scale = lambda overflow: None
        result = do()
        if self.fp16:
            engine.optimizer.loss_scaler.update_scale(engine.optimizer.overflow)
        self._check_gradients(engine)
        return result

    def _agree(self, engine: Any) -> None:
        """One all-reduce, before any weight moves: is the loss a number on every replica, and does anybody wish anything?"""
        loss: Optional[torch.Tensor] = engine.total_loss
        flags = torch.tensor((0,) + self.pulse.wishes(), dtype=torch.int64, device=self.device)
        if loss is not None and not self.fp16:
            flags[0] = (~torch.isfinite(loss.detach())).to(flags).max()
        dist.all_reduce(flags, op=dist.ReduceOp.MAX)
        broken, stop, saves = flags.tolist()
        self.agreed = Agreed(stop, saves)
        if broken:
            raise NotFinite("the loss is not a number")

    def _check_gradients(self, engine: Any) -> None:
        """DeepSpeed has looked at all gradients of all stages and replicas, and left the weights alone if one was not finite."""
        if not self.fp16 and getattr(engine.optimizer, "overflow", False):
            raise NotFinite("the gradient is not a number")
