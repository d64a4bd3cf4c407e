"""Encoded files -> the rows of any step, the same on every process; resuming is arithmetic, not replay.

    <which>.ids.npy      int32 [N]     the ids of all samples
    <which>.learn.npy    bool  [N]     whether an id is to be predicted
    <which>.offsets.npy  int64 [S, 3]  of each sample: first id, positions n, line in the data file
    <which>.by_length.npy, .classes.npy, .slots.npy, .starts.npy: what rows are made of (see packing.Packing)
    <which>.json                       statistics and the data hash

All of them are mapped, and so shared by the processes of a machine; nothing is held for a step, an epoch or a sample.

Position t of a sample holds ids[first + t] and has the target ids[first + t + 1] where that is learnt, so a sample of n positions
reads n + 1 ids, and a long pretrain text cut into samples loses no target between them.
"""

import json
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Tuple, Union

import numpy as np

from ..errors import UserError
from . import arrays, packing
from .encode import IGNORED
from .store import prepare

__all__ = ["Feed", "StepRows", "prepare"]


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
        self._rows: Union[packing.Packing, packing.OnePerRow] = (
            packing.Packing(*(arrays.load(folder / ("%s.%s.npy" % (which, name))) for name in packing.Packing._fields))
            if pack
            else packing.OnePerRow(len(self._offsets))
        )

    @classmethod
    def open(
        cls, folder: Union[str, Path], which: str, *, seq_len: int, rows_per_step: int, seed: int, pack: bool, pad_id: int
    ) -> "Feed":
        """``which``: "train" or "eval", as written by ``prepare``. Raises UserError when it was prepared differently."""
        return cls(Path(folder), which, seq_len, rows_per_step, seed, pack, pad_id)

    @property
    def rows(self) -> int:
        """Of an epoch; every epoch has as many."""
        return self._rows.rows

    def efficiency(self) -> float:
        """Positions that hold a token, as a part of all positions of an epoch's rows."""
        return packing.efficiency(self.statistics["tokens"], self.rows, self.seq_len)

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.rows // self.rows_per_step)

    def epoch_of(self, step: int) -> int:
        return self._place(step)[0]

    def at(self, step: int) -> StepRows:
        """The rows of one step, for any step and in any order."""
        epoch, local = self._place(step)
        first = local * self.rows_per_step
        last = min(first + self.rows_per_step, self.rows)
        layout = self._rows.some(self.seed, epoch, first, last)
        shape = (self.rows_per_step, self.seq_len)
        ids = np.full(shape, self.pad_id, np.int64)
        targets = np.full(shape, IGNORED, np.int64)
        positions, segments = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        tokens = learnt = 0
        for row in range(last - first):
            end = 0
            for segment, sample in enumerate(layout.members[layout.starts[row] : layout.starts[row + 1]], 1):
                start, length = int(self._offsets[sample, 0]), int(self._offsets[sample, 1])
                place = (row, slice(end, end + length))
                ids[place] = self._ids[start : start + length]
                positions[place] = np.arange(length)
                segments[place] = segment
                learn = self._learn[start + 1 : start + 1 + length]
                targets[place] = np.where(learn, self._ids[start + 1 : start + 1 + length], IGNORED)
                learnt += int(np.count_nonzero(learn))
                end += length
            tokens += end
        return StepRows(ids, positions, segments, targets, tokens, learnt, epoch, layout.members.tolist())

    def where(self, sample: int) -> str:
        """The data file and line of a sample."""
        return "%s:%d" % (self.statistics["file"], self._offsets[sample, 2])

    def _place(self, step: int) -> Tuple[int, int]:
        """(epoch, step within it)."""
        assert step >= 0, step
        return divmod(step, self.steps_per_epoch)


def _statistics(path: Path) -> Dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise UserError("%s: no encoded data here; the run's data folder is incomplete" % path) from None
