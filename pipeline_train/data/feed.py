"""Encoded files -> the rows of any step, the same on every process; resuming is arithmetic, not replay.

    <which>.ids.npy      int32 [N]     the ids of all samples
    <which>.learn.npy    bool  [N]     whether an id is to be predicted
    <which>.offsets.npy  int64 [S, 3]  of each sample: first id, positions n, line in the data file
    <which>.json                       statistics and the data hash

Position t of a sample holds ids[first + t] and has the target ids[first + t + 1] where that is learnt, so a sample of n positions
reads n + 1 ids, and a long pretrain text cut into samples loses no target between them.
"""

import json
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Union

import numpy as np

from ..errors import UserError
from . import arrays, packing
from .encode import IGNORED
from .store import prepare

__all__ = ["Feed", "StepRows", "prepare"]

KEPT = 2  # layouts in memory: this epoch's and, at its border, the next one's


class StepRows(NamedTuple):
    """All rows of one optimizer step, int64 [G, T]; the rows of data-parallel rank d and micro-batch m are
    [(d * M + m) * micro : ...][:micro] of them. Rows behind an epoch's last sample are empty.

    ``positions`` restart at 0 with each sample; ``segments``: 0 padding, 1, 2, ... samples of the row; ``targets``: -100 where
    nothing is learnt. ``tokens`` counts the positions that hold a token; ``samples`` are numbers for ``Feed.where``.
    """

    ids: np.ndarray
    positions: np.ndarray
    segments: np.ndarray
    targets: np.ndarray
    tokens: int
    learnt_tokens: int
    epoch: int
    samples: List[int]


class Feed:
    """The rows of every step of a run. Steps count from 0 over all epochs; an epoch's last step may have empty rows."""

    def __init__(self, folder: Path, which: str, seq_len: int, rows_per_step: int, seed: int, pack: bool, pad_id: int) -> None:
        self.seq_len, self.rows_per_step, self.seed, self.pack, self.pad_id = seq_len, rows_per_step, seed, pack, pad_id
        self.statistics: Dict[str, Any] = _statistics(folder / (which + ".json"))
        if self.statistics["seq_len"] != seq_len:
            raise UserError(
                "%s: was encoded for seq_len %d, not %d; encode it again"
                % (folder / (which + ".json"), self.statistics["seq_len"], seq_len)
            )
        self._ids = arrays.load(folder / (which + ".ids.npy"))
        self._learn = arrays.load(folder / (which + ".learn.npy"))
        self._offsets = arrays.load(folder / (which + ".offsets.npy"))
        self._layouts: Dict[int, packing.Layout] = {}
        self._steps: List[int] = []  # steps of each epoch so far known

    @classmethod
    def open(
        cls, folder: Union[str, Path], which: str, *, seq_len: int, rows_per_step: int, seed: int, pack: bool, pad_id: int
    ) -> "Feed":
        """``which``: "train" or "eval", as written by ``prepare``. Raises UserError when it was prepared differently."""
        return cls(Path(folder), which, seq_len, rows_per_step, seed, pack, pad_id)

    def layout(self, epoch: int) -> packing.Layout:
        """Which samples are in which row of an epoch, memoised."""
        if epoch not in self._layouts:
            lengths = np.asarray(self._offsets[:, 1])
            while len(self._layouts) >= KEPT:
                self._layouts.pop(min(self._layouts))
            if self.pack:
                self._layouts[epoch] = packing.pack(lengths, self.seq_len, self.seed, epoch)
            else:
                self._layouts[epoch] = packing.one_per_row(len(lengths), self.seed, epoch)
        return self._layouts[epoch]

    def efficiency(self, epoch: int = 0) -> float:
        """Positions that hold a token, as a part of all positions of the epoch's rows."""
        return packing.efficiency(self.layout(epoch), np.asarray(self._offsets[:, 1]), self.seq_len)

    def steps_in_epoch(self, epoch: int) -> int:
        while len(self._steps) <= epoch:
            self._steps.append(-(-self.layout(len(self._steps)).rows // self.rows_per_step))
        return self._steps[epoch]

    def epoch_of(self, step: int) -> int:
        return self._place(step)[0]

    def at(self, step: int) -> StepRows:
        """The rows of one step, for any step and in any order."""
        epoch, local = self._place(step)
        layout = self.layout(epoch)
        first = local * self.rows_per_step
        last = min(first + self.rows_per_step, layout.rows)
        shape = (self.rows_per_step, self.seq_len)
        ids = np.full(shape, self.pad_id, np.int64)
        targets = np.full(shape, IGNORED, np.int64)
        positions, segments = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        samples = layout.members[layout.starts[first] : layout.starts[last]].tolist()
        tokens = learnt = 0
        for row in range(first, last):
            end = 0
            for segment, sample in enumerate(layout.members[layout.starts[row] : layout.starts[row + 1]], 1):
                start, length = int(self._offsets[sample, 0]), int(self._offsets[sample, 1])
                place = (row - first, slice(end, end + length))
                ids[place] = self._ids[start : start + length]
                positions[place] = np.arange(length)
                segments[place] = segment
                learn = self._learn[start + 1 : start + 1 + length]
                targets[place] = np.where(learn, self._ids[start + 1 : start + 1 + length], IGNORED)
                learnt += int(np.count_nonzero(learn))
                end += length
            tokens += end
        return StepRows(ids, positions, segments, targets, tokens, learnt, epoch, samples)

    def where(self, sample: int) -> str:
        """The data file and line of a sample."""
        return "%s:%d" % (self.statistics["file"], self._offsets[sample, 2])

    def _place(self, step: int) -> "tuple[int, int]":
        """(epoch, step within it)."""
        assert step >= 0, step
        epoch = 0
        while step >= self.steps_in_epoch(epoch):
            step -= self.steps_in_epoch(epoch)
            epoch += 1
        return epoch, step


def _statistics(path: Path) -> Dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise UserError("%s: no encoded data here; the run's data folder is incomplete" % path) from None
