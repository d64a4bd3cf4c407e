"""Sample lengths -> rows of T positions. Which samples stand in row r of an epoch is a pure function of (seed, epoch, r), answered
at once for any row: nothing is computed for, or kept of, the epochs and rows before it.

Once for the data:      the samples, in a fixed shuffled order, are packed first-fit-decreasing within windows. What is kept of that
                        is only the *lengths* that stand in each row, so every epoch has the same number of rows.
For a row of an epoch:  the rows are permuted, and of each length the samples that have it, by permutations that are computed for
                        one place at a time. So rows come in another order and, where lengths are shared, in other company.
"""

from typing import Any, NamedTuple

import numpy as np

VERSION = 2  # of the rows made of the same lengths; part of the data hash
WINDOW = 1024  # samples packed together: more fills rows better, and costs WINDOW / 2 comparisons per sample at worst
GROUP = 1 << 20  # elements of one table of open rows, which bounds the memory of packing many windows at once
ROUNDS = 12  # the least that is even for n = 4 over 40 000 epochs
ROWS, MEMBERS = 1, 2  # streams of the permutations
FIXED_KEY = 0x70697065646F636B  # of the order in which samples are packed


class Layout(NamedTuple):
    """``members`` [S]: sample numbers in row order. ``starts`` [R + 1]: row r holds members[starts[r] : starts[r + 1]]."""

    members: np.ndarray
    starts: np.ndarray

    @property
    def rows(self) -> int:
        return len(self.starts) - 1


class Packing(NamedTuple):
    """What rows are made of; arrays that may be mapped files. Slot numbers and ``by_length`` are of the same sorted order.

    ``by_length`` int32 [S]: sample numbers, shortest first. ``classes`` int64 [T + 2]: those of length n are
    by_length[classes[n] : classes[n + 1]]. ``slots`` int32 [S]: which of them a place in a row takes before any permutation, in row
    order. ``starts`` int32 [R + 1]: row r has the places starts[r] up to starts[r + 1].
    """

    by_length: np.ndarray
    classes: np.ndarray
    slots: np.ndarray
    starts: np.ndarray

    @property
    def rows(self) -> int:
        return len(self.starts) - 1

    def some(self, seed: int, epoch: int, first: int, last: int) -> Layout:
        """Rows ``first`` up to ``last`` of an epoch."""
        row = permuted(self.rows, _key(seed, epoch, ROWS), np.arange(first, last))
        begin, end = self.starts[row].astype(np.int64), self.starts[row + 1].astype(np.int64)
        starts = np.concatenate([[0], np.cumsum(end - begin)])
        places = np.arange(starts[-1]) + np.repeat(begin - starts[:-1], end - begin)
        slots = self.slots[places].astype(np.int64)
        length = np.searchsorted(self.classes, slots, side="right") - 1
        key = _splitmix64(_key(seed, epoch, MEMBERS) ^ length.astype(np.uint64))
        base = self.classes[length]
        taken = base + permuted(self.classes[length + 1] - base, key, slots - base)
        return Layout(self.by_length[taken].astype(np.int64), starts)


class OnePerRow(NamedTuple):
    """Each sample in a row of its own, shuffled each epoch."""

    rows: int

    def some(self, seed: int, epoch: int, first: int, last: int) -> Layout:
        return Layout(permuted(self.rows, _key(seed, epoch, ROWS), np.arange(first, last)), np.arange(last - first + 1))


def pack(lengths: np.ndarray, seq_len: int) -> Packing:
    """``lengths`` [S] in 1..seq_len. Every sample is in exactly one row, none is cut."""
    samples = len(lengths)
    assert samples < 1 << 31, samples
    by_length = np.argsort(lengths, kind="stable").astype(np.int32)
    classes = np.zeros(seq_len + 2, np.int64)
    np.cumsum(np.bincount(lengths, minlength=seq_len + 1), out=classes[1:])
    slots = np.empty(samples, np.int32)
    starts = [np.zeros(1, np.int32)]
    free = classes[:-1].copy()  # the next slot of each length
    per_group = max(1, GROUP // WINDOW) * WINDOW
    for begin in range(0, samples, per_group):
        stop = min(begin + per_group, samples)
        order = permuted(samples, np.full(1, FIXED_KEY, np.uint64), np.arange(begin, stop))
        part = np.asarray(lengths[order], np.int64)
        row_of, used = first_fit_decreasing(part, seq_len)
        part = part[np.argsort(row_of, kind="stable")]  # in row order
        slots[begin:stop] = _take(free, part)
        ends = begin + np.cumsum(np.bincount(row_of, minlength=used))
        starts.append(ends.astype(np.int32))
    return Packing(by_length, classes, slots, np.concatenate(starts))


def efficiency(tokens: int, rows: int, seq_len: int) -> float:
    """Positions that hold a token, as a part of all positions."""
    return tokens / (rows * seq_len) if rows else 0.0


def permuted(n: Any, key: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Where a permutation of range(n) puts each of ``places``; ``n`` and ``key`` are one for all, or one for each.

    A Feistel network on Z_a x Z_b (a * b a little over n) with splitmix64 (Steele, Lea, Flood 2014) for its rounds; what falls
    outside range(n) goes through it again (Black and Rogaway 2002). The same on every machine: all but one exact square root is
    done in integers.
    """
    shape = places.shape
    n, key, x = (np.array(np.broadcast_to(v, shape), np.uint64) for v in (n, key, places))
    a = np.sqrt(n.astype(np.float64)).astype(np.uint64) + np.uint64(1)
    b = (n + a - np.uint64(1)) // a
    todo = np.arange(len(x))
    while len(todo):
        x[todo] = moved = _feistel(a[todo], b[todo], key[todo], x[todo])
        todo = todo[moved >= n[todo]]
    return x.astype(np.int64)


def _feistel(a: np.ndarray, b: np.ndarray, key: np.ndarray, x: np.ndarray) -> np.ndarray:
    left, right = x // b, x % b
    for number in range(ROUNDS):
        if number % 2:
            right = (right + _splitmix64(key ^ left) % b) % b
        else:
            left = (left + _splitmix64(key ^ right) % a) % a
        key = _splitmix64(key)
    return left * b + right


def _key(seed: int, epoch: int, stream: int) -> np.ndarray:
    key = np.zeros(1, np.uint64)
    for word in (seed, epoch, stream):
        key = _splitmix64(key ^ np.uint64(word % (1 << 64)))
    return key


def _splitmix64(x: np.ndarray) -> np.ndarray:
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _take(free: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The next free slot for each of ``lengths``, in their order; counts ``free`` [T + 1] up."""
    order = np.argsort(lengths, kind="stable")
    counts = np.bincount(lengths, minlength=len(free))
    first = np.cumsum(counts) - counts
    ordered = lengths[order]
    taken = np.empty(len(lengths), np.int64)
    taken[order] = free[ordered] + np.arange(len(lengths)) - first[ordered]
    free += counts
    return taken


def first_fit_decreasing(lengths: np.ndarray, seq_len: int) -> "tuple[np.ndarray, int]":
    """(row number of each sample, rows used): each window of WINDOW samples, longest first, each into the first row with room; rows
    of a window are numbered after those of the one before.

    The windows are independent, so step i places the i-th longest sample of all windows at once.
    """
    samples = len(lengths)
    windows = -(-samples // WINDOW)
    width = WINDOW if windows > 1 else samples
    table = np.zeros((windows, width), np.int32)
    table.reshape(-1)[:samples] = lengths
    longest = np.argsort(-table, axis=1, kind="stable")
    size = np.take_along_axis(table, longest, axis=1)
    room = np.full((windows, width), seq_len, np.int32)
    here = np.arange(windows)
    placed = np.zeros((windows, width), np.int32)
    opened = 1
    for i in range(width):
        fits = room[:, :opened] >= size[:, i : i + 1]
        row = fits.argmax(axis=1)
        room[here, row] -= size[:, i]
        placed[:, i] = row
        opened = min(width, max(opened, int(row.max()) + 2))  # one empty row always stays in sight
    out = np.zeros((windows, width), np.int64)
    np.put_along_axis(out, longest, placed.astype(np.int64), axis=1)
    used = (room < seq_len).sum(axis=1)
    out += (np.cumsum(used) - used)[:, None]
    return out.reshape(-1)[:samples], int(used.sum())
