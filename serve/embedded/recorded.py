"""Forward passes of a few fixed shapes, recorded once and run again: on a GPU as CUDA graphs.

A decode step of a small model is a thousand kernels of microseconds, and Python needs longer to launch one than the GPU to run it.
A recorded pass is launched as a whole. Its shape and its addresses are fixed, so what differs from step to step is written into a
tensor of numbers that the pass reads:

decode   one token for each of B rows. With our own attention B is at least ``LEAST``, whoever is there: the same matrix products
         for one request as for many. Attention is computed for the next power of two of the rows in use, and of the columns of
         the longest, by a kernel that gives a row the same bits in all of them, if there is one (Engine.record).
prefill  a piece of a prompt, padded to one of ``PIECES``; what the padding writes behind the prompt is overwritten by what follows.

Rows that are not in use write their key into the table's last column, which nobody reads.
"""

from typing import Any, Callable, Dict, List, Optional, Tuple

import torch
from torch import Tensor

from .cache import COLUMNS, FixedStep, SlotCache
from .sampling import likeliest

LEAST = 64
PIECES = (16, 64, 256)
NARROWEST = 128  # a pass is recorded for so many columns or more

Forward = Callable[[Tensor, FixedStep], Tensor]  # ids [B, n] -> logits [B, n or 1, V]
Run = Callable[[], Any]


class Recorded:
    """``forward``: the model's. ``kernel``: attention's in a decode pass; None: the model's own attention, and then a pass cannot
    compute more rows than the cache has. ``recorder``: gives a function that makes of a pass one that runs faster; called again
    whenever all passes are forgotten. See ``graphs``."""

    def __init__(
        self,
        cache: SlotCache,
        device: torch.device,
        forward: Forward,
        kernel: Optional[str],
        recorder: Callable[[], Callable[[Run], Run]],
    ) -> None:
        self._cache, self._device, self._forward, self._kernel = cache, device, forward, kernel or ""
        self._least, self._recorder, self._record = LEAST if kernel else 1, recorder, recorder()
        self.before_recording: Run = lambda: None  # it takes a second, perhaps
        self._logits: Dict[int, Tensor] = {}  # for each B one place that all passes of B rows write to
        self._runs: Dict[Tuple[int, ...], Tuple[Tensor, Run, Run]] = {}

    def decode(self, tokens: List[int], lengths: List[int]) -> Tuple[Tensor, Tensor]:
        """As Engine.decode, and Engine.best."""
        active, width = _power(len(tokens)), max(NARROWEST, _power(max(lengths) + 1))
        self.room(active, width)
        batch = max(self._least, active)
        pads = batch - len(tokens)
        given = tokens + [0] * pads + lengths + [self._cache.size[1] - 1] * pads
        logits, best = self._run((active, width), given, self._decode_pass)
        return logits[: len(tokens), 0], best

    def prefill(self, row: int, ids: List[int], start: int) -> Tuple[Tensor, Tensor]:
        """As Engine.prefill, logits behind the last token only, and Engine.best; at most PIECES[-1] tokens."""
        count = next(piece for piece in PIECES if piece >= len(ids))
        width = max(NARROWEST, _power(start + count))
        self.room(row + 1, width)
        given = ids + [0] * (count - len(ids)) + [row, start, len(ids) - 1]
        logits, best = self._run((0, width, count), given, self._prefill_pass)
        return logits[0], best

    def room(self, rows: int, columns: int) -> None:
        """Make the cache large enough; then the addresses have changed."""
        have_rows, have_columns = self._cache.size
        if have_rows < rows or have_columns <= columns:
            self.forget()
            self._cache.reserve(*needed(rows, columns))

    def forget(self) -> None:
        self._runs.clear()
        self._logits.clear()
        self._record = self._recorder()

    def _run(self, key: Tuple[int, ...], given: List[int], make: Callable[[Tensor, Tuple[int, ...]], Run]) -> Any:
        if key not in self._runs:
            self.before_recording()
            numbers = torch.tensor(given, device=self._device)
            plain = self._placed(make(numbers, key))
            self._runs[key] = numbers, self._record(plain), plain  # the last one owns tensors whose addresses were recorded
        numbers, run, _ = self._runs[key]
        numbers.copy_(torch.tensor(given))
        return run()

    def _placed(self, run: Run) -> Run:
        """A pass that keeps a result of its own would keep rows x vocabulary for every shape. The usual choice is part of it:
        a dozen kernels that need not be launched one by one."""

        def placed() -> Tuple[Tensor, Tensor]:
            logits = run()
            if len(logits) not in self._logits:
                self._logits[len(logits)] = torch.empty_like(logits)
            return self._logits[len(logits)].copy_(logits), likeliest(logits[:, 0])

        return placed

    def _decode_pass(self, numbers: Tensor, key: Tuple[int, ...]) -> Run:
        active, width = key
        tokens, columns = numbers.chunk(2)
        rows = torch.arange(active, device=self._device)
        return lambda: self._forward(tokens[:, None], FixedStep(rows, columns, 1, True, width, active, kernel=self._kernel))

    def _prefill_pass(self, numbers: Tensor, key: Tuple[int, ...]) -> Run:
        _, width, count = key
        rows, start, last = numbers[count : count + 1].expand(count), numbers[count + 1 : count + 2], numbers[count + 2 :]
        return lambda: self._forward(numbers[None, :count], FixedStep(rows, start, count, False, width, 1, last))


def graphs() -> Callable[[Run], Run]:
    """Recording as CUDA graphs that share one pool of memory, which goes with the last of them: the result of one lasts until any
    of them runs again."""
    pool = torch.cuda.graph_pool_handle()

    def record(run: Run) -> Run:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # libraries make themselves ready in a first run, which must not be recorded
            run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            result = run()

        def again() -> Any:
            graph.replay()
            return result

        return again

    return record


def needed(rows: int, columns: int) -> Tuple[int, int]:
    """Rows and columns of a cache for so many, so that no pass is recorded again while they grow into it: a short prompt is padded
    to a whole piece."""
    return _power(rows), max(PIECES[-1], _power(columns)) + COLUMNS


def most_needed(rows: int, tokens: int) -> int:
    """Rows x columns that ``needed`` never goes beyond for up to so many rows, and rows x columns of up to so many tokens.

    Short rows: all of the narrowest. Others, r of them with c > PIECES[-1]: less than 2 r x (2 c + COLUMNS), 4.5 r c."""
    short = needed(rows, 1)
    return max(5 * tokens, short[0] * short[1])


def _power(number: int) -> int:
    """The next power of two."""
    return 1 << (number - 1).bit_length()
