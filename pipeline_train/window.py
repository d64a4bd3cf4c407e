"""What a line of metrics.jsonl is made of."""

import math
import time

from .data.feed import StepRows
from .engine import StepResult


class Window:
    """Sums over the steps since the last logged line."""

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.steps = self.tokens = self.learnt = self.samples = self.pairs = self.skipped = self.finite = 0
        self.loss = self.busy = self.span = 0.0

    def add(self, result: StepResult, rows: StepRows) -> None:
        self.steps += 1
        if math.isfinite(result.loss):  # in fp16 a forward pass may overflow too
            self.finite += 1
            self.loss += result.loss
        self.tokens += rows.tokens
        self.learnt += rows.learnt_tokens
        self.samples += len(rows.samples)
        self.skipped += int(result.skipped)
        self.busy += result.busy
        self.span += result.span
        self.pairs += int((rows.positions + 1)[rows.segments > 0].sum())  # a token attends to its position + 1 keys
