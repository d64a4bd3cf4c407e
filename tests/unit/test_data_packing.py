"""Packing: every sample once, none cut, any row of any epoch by itself, the same on every machine, as first-fit-decreasing says."""

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline_train.data import packing


def naive(lengths, seq_len):
    """First-fit-decreasing over each window, one sample at a time."""
    row_of, rows = np.zeros(len(lengths), np.int64), 0
    for begin in range(0, len(lengths), packing.WINDOW):
        part = lengths[begin : begin + packing.WINDOW]
        room = []
        for i in np.argsort(-part, kind="stable"):
            row = next((r for r, left in enumerate(room) if left >= part[i]), len(room))
            if row == len(room):
                room.append(seq_len)
            room[row] -= part[i]
            row_of[begin + i] = rows + row
        rows += len(room)
    return row_of


LENGTHS = st.integers(1, 40).flatmap(lambda t: st.tuples(st.just(t), st.lists(st.integers(1, t), min_size=1, max_size=80)))


@settings(max_examples=200, deadline=None)
@given(LENGTHS, st.integers(0, 2**64 - 1), st.integers(0, 2**40))
def test_every_sample_is_in_one_row_and_no_row_is_over_full(case, seed, epoch):
    seq_len, lengths = case[0], np.array(case[1])
    for packed in (packing.pack(lengths, seq_len), packing.OnePerRow(len(lengths))):
        layout = packed.some(seed, epoch, 0, packed.rows)
        assert sorted(layout.members.tolist()) == list(range(len(lengths)))
        assert layout.rows == packed.rows and layout.starts[0] == 0 and layout.starts[-1] == len(lengths)
        assert (np.diff(layout.starts) > 0).all()
        assert max(np.add.reduceat(lengths[layout.members], layout.starts[:-1])) <= seq_len
        for row in range(packed.rows):  # alone as among the others
            one = packed.some(seed, epoch, row, row + 1)
            assert one.members.tolist() == layout.members[layout.starts[row] : layout.starts[row + 1]].tolist()
        assert 0 < packing.efficiency(int(lengths.sum()), packed.rows, seq_len) <= 1


@pytest.mark.parametrize("window, group", [(7, 7), (16, 40), (64, 1 << 20)])
def test_rows_are_those_of_first_fit_decreasing_in_windows(monkeypatch, window, group):
    """Of the lengths in the fixed order, taken one by one; whatever number of windows is placed at once."""
    monkeypatch.setattr(packing, "WINDOW", window)
    monkeypatch.setattr(packing, "GROUP", group)
    random = np.random.default_rng(3)
    for samples in (1, window - 1, window, window + 1, 500):
        order = packing.permuted(samples, np.full(1, packing.FIXED_KEY, np.uint64), np.arange(samples))
        for largest in (5, 33, 100):
            lengths = random.integers(1, largest + 1, samples)
            expected = naive(lengths[order], 100)
            assert packing.first_fit_decreasing(lengths, 100)[0].tolist() == naive(lengths, 100).tolist()
            packed = packing.pack(lengths, 100)
            of_slots = lengths[packed.by_length[packed.slots]]
            rows = [of_slots[a:b] for a, b in zip(packed.starts, packed.starts[1:])]
            assert [row.tolist() for row in rows] == [lengths[order][expected == r].tolist() for r in range(expected.max() + 1)]


def test_a_row_keeps_its_lengths_and_changes_its_company():
    lengths = np.random.default_rng(1).integers(1, 30, 3000)
    packed = packing.pack(lengths, 128)
    company = []
    for epoch in range(3):
        layout = packed.some(7, epoch, 0, packed.rows)
        rows = [layout.members[a:b] for a, b in zip(layout.starts, layout.starts[1:])]
        assert sorted(lengths[row].tolist() for row in rows) == sorted(
            lengths[packed.by_length[packed.slots[a:b]]].tolist() for a, b in zip(packed.starts, packed.starts[1:])
        )
        company.append({(int(a), int(b)) for row in rows for a in row for b in row if a < b})
    pairs = len(company[0])
    assert pairs > 10_000 and all(len(a & b) < pairs / 5 for a, b in zip(company, company[1:]))


def test_rows_are_well_filled():
    lengths = np.clip(np.random.default_rng(0).lognormal(5.0, 0.8, 20000).astype(int), 1, 2048)
    tokens = int(lengths.sum())
    assert packing.efficiency(tokens, packing.pack(lengths, 2048).rows, 2048) > 0.98
    assert packing.efficiency(tokens, packing.OnePerRow(len(lengths)).rows, 2048) < 0.12
    assert packing.efficiency(0, 0, 2048) == 0


def test_a_million_samples_take_bounded_memory(monkeypatch):
    """The table of open rows is made for some windows at a time."""
    sizes = []
    real = packing.first_fit_decreasing
    monkeypatch.setattr(packing, "first_fit_decreasing", lambda part, t: (sizes.append(len(part)), real(part, t))[1])
    monkeypatch.setattr(packing, "GROUP", 1 << 18)
    packed = packing.pack(np.full(1_000_000, 500, np.int32), 2048)
    assert packed.rows == 250_000  # 1024 and the last window's 576 are multiples of 4
    assert len(sizes) == 4 and max(sizes) <= 1 << 18
    assert sum(array.nbytes for array in packed) < 12_000_000
    assert packed.some(42, 10**9, 249_999, 250_000).rows == 1


def test_epochs_and_seeds_differ_and_repeat():
    lengths = np.random.default_rng(1).integers(1, 100, 3000)
    packed = packing.pack(lengths, 128)
    seen = set()
    for seed in (0, 1):
        for epoch in (0, 1, 2):
            layout = packed.some(seed, epoch, 0, packed.rows)
            again = packing.pack(lengths, 128).some(seed, epoch, 0, packed.rows)
            assert (layout.members == again.members).all() and (layout.starts == again.starts).all()
            seen.add(layout.members.tobytes())
    assert len(seen) == 6


def test_the_order_never_changes_between_versions():
    """A resumed run must find its samples where it left them, whatever numpy is installed then."""
    assert packing.OnePerRow(12).some(42, 0, 0, 12).members.tolist() == GOLDEN
    lengths = np.arange(5000) * 7919 % 500 + 1
    packed = packing.pack(lengths, 1024)
    layout = packed.some(42, 3, 0, packed.rows)
    digest = hashlib.sha256(layout.members.astype("<i8").tobytes() + layout.starts.astype("<i8").tobytes()).hexdigest()
    assert digest[:16] == GOLDEN_PACK, "then packing.VERSION must change too"


@pytest.mark.parametrize("n", [1, 2, 3, 5, 7, 64, 1000, 65537])
def test_a_permutation_takes_each_place_once(n):
    for key in range(5):
        moved = packing.permuted(n, np.full(1, key, np.uint64), np.arange(n))
        assert sorted(moved.tolist()) == list(range(n))
    n_of_each = np.array([n, 1, n + 1])
    mixed = packing.permuted(n_of_each, np.array([3, 4, 5], np.uint64), np.array([n - 1, 0, n]))
    alone = [packing.permuted(int(m), np.full(1, k, np.uint64), np.array([m - 1]))[0] for m, k in zip(n_of_each, (3, 4, 5))]
    assert mixed.tolist() == alone


@pytest.mark.parametrize("n", [3, 4, 9, 30])
def test_the_shuffle_is_even(n):
    """Each place gets each sample equally often, and each two places each pair: chi-squared over 4000 epochs, 1 in 10 000."""
    epochs = 4000
    seen = np.array([packing.OnePerRow(n).some(7, epoch, 0, n).members for epoch in range(epochs)])
    singles = np.array([[(seen[:, i] == j).sum() for j in range(n)] for i in range(n)])
    assert ((singles - epochs / n) ** 2 / (epochs / n)).sum() < _limit((n - 1) ** 2)
    first = np.bincount(seen[:, 0] * n + seen[:, 1], minlength=n * n).reshape(n, n)
    expected = epochs / (n * (n - 1))
    off = ~np.eye(n, dtype=bool)
    assert ((first[off] - expected) ** 2 / expected).sum() < _limit(n * (n - 1) - 1) and first[~off].sum() == 0


def _limit(freedom):
    """Chi-squared that 1 in 10 000 exceeds (Wilson and Hilferty 1931)."""
    return freedom * (1 - 2 / (9 * freedom) + 3.719 * (2 / (9 * freedom)) ** 0.5) ** 3


GOLDEN = [7, 4, 5, 9, 8, 3, 2, 1, 0, 10, 11, 6]
GOLDEN_PACK = "108852f8d84172cf"
