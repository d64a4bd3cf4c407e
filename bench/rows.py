"""Documents -> the rows of a step: packed by pipeline_train's own packing, or one a row and padded, as the field's trainers do it.

Only lengths matter to speed: the tokens are random. B rows of a micro-batch, T tokens of a row.
"""

from typing import Any, Iterator, List, NamedTuple, Sequence, Tuple

import numpy as np
import torch

from pipeline_train.data import packing
from pipeline_train.models.loss import IGNORE

MANY = 4096  # documents to draw rows from


class MicroBatch(NamedTuple):
    """ids, positions, segments and targets, int64 [B,T]; ``targets`` are shifted, -100 where nothing is learnt."""

    ids: torch.Tensor
    positions: torch.Tensor
    segments: torch.Tensor
    targets: torch.Tensor

    @property
    def labels(self) -> torch.Tensor:
        """The targets as transformers' models take them: not shifted."""
        labels = self.targets.roll(1, 1)
        labels[:, 0] = IGNORE
        return labels


class Counts(NamedTuple):
    """Of a step: tokens of documents, of these learnt ones, (query, key) pairs that attention needs, positions with padding."""

    tokens: int
    learnt: int
    pairs: int
    positions: int


class Rows:
    """``documents``: (tokens, learnt of these) of each; longer ones are cut to ``seq``. Empty: every row is one of ``seq``."""

    def __init__(self, documents: Sequence[Tuple[int, int]], seq: int, packed: bool, vocab: int) -> None:
        lengths = np.array([min(seq, tokens) for tokens, _ in documents] or [seq], np.int64)
        learnt = np.array([learnt for _, learnt in documents] or [seq], np.int64)
        self.seq, self.vocab, self.lengths, self.learnt = seq, vocab, lengths, np.minimum(learnt, lengths)
        self.rows: Any = packing.pack(lengths, seq) if packed else packing.OnePerRow(len(lengths))

    def step(self, number: int, rows: int, micro: int) -> Tuple[List[MicroBatch], Counts]:
        """``rows`` rows in micro-batches of ``micro``, another part of the documents for another ``number``."""
        members = list(self._members(number * rows, rows))
        tokens, learnt, pairs = (sum(part) for part in zip(*(self._counted(row) for row in members)))
        counts = Counts(tokens, learnt, pairs, rows * self.seq)
        generator = torch.Generator().manual_seed(number)
        return [self._micro_batch(members[first : first + micro], generator) for first in range(0, rows, micro)], counts

    def _members(self, first: int, rows: int) -> Iterator[List[int]]:
        """The documents of each row; after the last row the first comes again, in another epoch's order."""
        for row in range(first, first + rows):
            epoch, place = divmod(row, self.rows.rows)
            layout = self.rows.some(0, epoch, place, place + 1)
            yield layout.members[layout.starts[0] : layout.starts[1]].tolist()

    def _counted(self, row: List[int]) -> Tuple[int, int, int]:
        lengths = self.lengths[row]
        return int(lengths.sum()), int(self.learnt[row].sum()), int((lengths * (lengths + 1) // 2).sum())

    def _micro_batch(self, rows: List[List[int]], generator: torch.Generator) -> MicroBatch:
        shape = (len(rows), self.seq)
        ids = torch.randint(3, min(self.vocab, 30000), shape, generator=generator)
        positions, segments = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.int64)
        targets = torch.full(shape, IGNORE, dtype=torch.int64)
        following = ids.roll(-1, 1)
        for number, row in enumerate(rows):
            end = 0
            for segment, document in enumerate(row, 1):
                length, learnt = int(self.lengths[document]), int(self.learnt[document])
                place = (number, slice(end, end + length))
                positions[place], segments[place] = torch.arange(length), segment
                tail = (number, slice(end + length - learnt, end + length))
                targets[tail] = following[tail]
                end += length
        return MicroBatch(ids, positions, segments, targets)


def drawn(mean: int, seq: int, count: int = MANY, seed: int = 0) -> List[Tuple[int, int]]:
    """Documents of ``mean`` tokens on average, wholly learnt: lengths uniform from 20 to twice the mean less 20, which is about as
    alpaca's vary. 0: rows of one document."""
    if not mean:
        return []
    generator = np.random.default_rng(seed)
    lengths = generator.integers(min(20, mean), max(21, 2 * mean - 20), count)
    return [(min(seq, int(length)), min(seq, int(length))) for length in lengths]


def of_run(folder: Any) -> List[Tuple[int, int]]:
    """The documents of a run's encoded training data (pipeline_train.data.feed says what the files hold)."""
    from pipeline_train.data import arrays

    offsets, learn = arrays.load(folder / "train.offsets.npy"), arrays.load(folder / "train.learn.npy")
    found = []
    for start, length, _ in offsets.tolist():
        found.append((length, int(np.count_nonzero(learn[start + 1 : start + 1 + length]))))
    return found
