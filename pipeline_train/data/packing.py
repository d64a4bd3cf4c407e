"""Sample lengths -> rows of T positions: a pure function of (seed, epoch), the same on every machine and numpy version.

Samples are shuffled, taken in windows, packed first-fit-decreasing within each window, and the rows shuffled again.
"""

from typing import NamedTuple

import numpy as np

WINDOW = 1024  # samples packed together: more fills rows better, and costs WINDOW / 2 comparisons per sample at worst
GROUP = 1 << 21  # elements of one table of open rows, which bounds the memory of packing many windows at once


class Layout(NamedTuple):
    """``members`` [S]: sample numbers in row order. ``starts`` [R + 1]: row r holds members[starts[r] : starts[r + 1]]."""

    members: np.ndarray
    starts: np.ndarray

    @property
    def rows(self) -> int:
        return len(self.starts) - 1


def efficiency(layout: Layout, lengths: np.ndarray, seq_len: int) -> float:
    """Positions that hold a token, as a part of all positions."""
    return float(lengths[layout.members].sum()) / (layout.rows * seq_len) if layout.rows else 0.0


def pack(lengths: np.ndarray, seq_len: int, seed: int, epoch: int) -> Layout:
    """``lengths`` [S] in 1..seq_len. Every sample is in exactly one row, none is cut."""
    order = shuffled(len(lengths), seed, epoch, 0)
    row_of = first_fit_decreasing(lengths[order], seq_len)
    return _by_row(order, row_of, seed, epoch)


def one_per_row(samples: int, seed: int, epoch: int) -> Layout:
    """Each sample in a row of its own, shuffled."""
    return Layout(shuffled(samples, seed, epoch, 0), np.arange(samples + 1))


def in_order(samples: int) -> Layout:
    """Each sample in a row of its own, as in the file."""
    return Layout(np.arange(samples), np.arange(samples + 1))


def shuffled(n: int, seed: int, epoch: int, stream: int) -> np.ndarray:
    """A permutation of range(n): the order of splitmix64 (Steele, Lea, Flood 2014) hashes of seed, epoch, stream and index.

    numpy's own generators do not promise the same permutation in every version; a resumed run needs it.
    """
    key = np.zeros(1, np.uint64)
    for word in (seed, epoch, stream):
        key = _splitmix64(key ^ np.uint64(word % (1 << 64)))
    return np.argsort(_splitmix64(np.arange(n, dtype=np.uint64) ^ key[0]), kind="stable")


def first_fit_decreasing(lengths: np.ndarray, seq_len: int) -> np.ndarray:
    """[S] row number of each sample: each window of WINDOW samples, longest first, each into the first row with room.

    The windows are independent, so step i places the i-th longest sample of many windows at once.
    """
    samples = len(lengths)
    row_of = np.zeros(samples, np.int64)
    per_group = max(1, GROUP // WINDOW) * WINDOW
    rows = 0
    for begin in range(0, samples, per_group):
        part = lengths[begin : begin + per_group]
        placed, used = _fit_windows(part, seq_len)
        row_of[begin : begin + per_group] = placed + rows
        rows += used
    return row_of


def _fit_windows(lengths: np.ndarray, seq_len: int) -> "tuple[np.ndarray, int]":
    """(row number of each sample, rows used) for some windows; rows of a window are numbered after those of the one before."""
    samples = len(lengths)
    windows = -(-samples // WINDOW)
    width = WINDOW if windows > 1 else samples
    table = np.zeros((windows, width), np.int64)
    table.reshape(-1)[:samples] = lengths
    longest = np.argsort(-table, axis=1, kind="stable")
    size = np.take_along_axis(table, longest, axis=1)
    room = np.full((windows, width), seq_len, np.int32)
    here = np.arange(windows)
    placed = np.zeros((windows, width), np.int64)
    opened = 1
    for i in range(width):
        fits = room[:, :opened] >= size[:, i : i + 1]
        row = fits.argmax(axis=1)
        room[here, row] -= size[:, i].astype(np.int32)
        placed[:, i] = row
        opened = min(width, max(opened, int(row.max()) + 2))  # one empty row always stays in sight
    out = np.zeros((windows, width), np.int64)
    np.put_along_axis(out, longest, placed, axis=1)
    used = (room < seq_len).sum(axis=1)
    out += (np.cumsum(used) - used)[:, None]
    return out.reshape(-1)[:samples], int(used.sum())


def _by_row(order: np.ndarray, row_of: np.ndarray, seed: int, epoch: int) -> Layout:
    """Samples ``order`` with their row numbers -> a layout with its rows shuffled."""
    rows = int(row_of.max()) + 1 if len(row_of) else 0
    place = np.empty(rows, np.int64)
    place[shuffled(rows, seed, epoch, 1)] = np.arange(rows)
    row_of = place[row_of]
    sort = np.argsort(row_of, kind="stable")
    starts = np.searchsorted(row_of[sort], np.arange(rows + 1))
    return Layout(order[sort], starts)


def _splitmix64(x: np.ndarray) -> np.ndarray:
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
