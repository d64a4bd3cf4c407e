"""Packing: every sample once, none cut, the same rows on every machine, as first-fit-decreasing says."""

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
@given(LENGTHS, st.integers(0, 2**64 - 1), st.integers(0, 5))
def test_every_sample_is_in_one_row_and_no_row_is_over_full(case, seed, epoch):
    seq_len, lengths = case[0], np.array(case[1])
    for layout in (packing.pack(lengths, seq_len, seed, epoch), packing.one_per_row(len(lengths), seed, epoch)):
        assert sorted(layout.members.tolist()) == list(range(len(lengths)))
        assert layout.starts[0] == 0 and layout.starts[-1] == len(lengths) and (np.diff(layout.starts) > 0).all()
        assert max(np.add.reduceat(lengths[layout.members], layout.starts[:-1])) <= seq_len
        assert 0 < packing.efficiency(layout, lengths, seq_len) <= 1
    assert packing.efficiency(layout, lengths, seq_len) == lengths.sum() / (len(lengths) * seq_len)


@pytest.mark.parametrize("window, group", [(7, 7), (16, 40), (64, 1 << 21)])
def test_windows_at_once_are_first_fit_decreasing_one_by_one(monkeypatch, window, group):
    monkeypatch.setattr(packing, "WINDOW", window)
    monkeypatch.setattr(packing, "GROUP", group)
    random = np.random.default_rng(3)
    for samples in (1, window - 1, window, window + 1, 500):
        for largest in (5, 33, 100):
            lengths = random.integers(1, largest + 1, samples)
            assert packing.first_fit_decreasing(lengths, 100).tolist() == naive(lengths, 100).tolist()


def test_rows_are_well_filled():
    lengths = np.clip(np.random.default_rng(0).lognormal(5.0, 0.8, 20000).astype(int), 1, 2048)
    assert packing.efficiency(packing.pack(lengths, 2048, 42, 0), lengths, 2048) > 0.98
    assert packing.efficiency(packing.one_per_row(len(lengths), 42, 0), lengths, 2048) < 0.12


def test_a_million_samples_take_bounded_memory(monkeypatch):
    """The table of open rows is made for some windows at a time."""
    largest = []
    real = packing._fit_windows
    monkeypatch.setattr(packing, "_fit_windows", lambda part, t: (largest.append(len(part)), real(part, t))[1])
    lengths = np.full(1_000_000, 500)
    assert packing.pack(lengths, 2048, 0, 0).rows == 250_000  # 1024 and the last window's 576 are multiples of 4
    assert len(largest) == 1 and largest[0] <= packing.GROUP
    monkeypatch.setattr(packing, "GROUP", 1 << 18)
    assert packing.pack(lengths, 2048, 0, 0).rows == 250_000 and max(largest[1:]) <= 1 << 18 and len(largest) == 5


def test_epochs_and_seeds_differ_and_repeat():
    lengths = np.random.default_rng(1).integers(1, 100, 3000)
    seen = {}
    for seed in (0, 1):
        for epoch in (0, 1, 2):
            layout = packing.pack(lengths, 128, seed, epoch)
            again = packing.pack(lengths, 128, seed, epoch)
            assert (layout.members == again.members).all() and (layout.starts == again.starts).all()
            seen[layout.members.tobytes()] = layout
    assert len(seen) == 6


def test_the_order_never_changes_between_versions():
    """A resumed run must find its samples where it left them, whatever numpy is installed then."""
    assert packing.shuffled(12, 42, 0, 0).tolist() == GOLDEN
    lengths = np.arange(5000) * 7919 % 500 + 1
    layout = packing.pack(lengths, 1024, 42, 3)
    digest = hashlib.sha256(layout.members.astype("<i8").tobytes() + layout.starts.astype("<i8").tobytes()).hexdigest()
    assert digest[:16] == GOLDEN_PACK


def test_the_shuffle_is_even():
    """Each place gets each sample equally often: chi-squared over 4000 permutations of 5, 16 degrees of freedom."""
    counts = np.zeros((5, 5))
    for epoch in range(4000):
        counts[np.arange(5), packing.shuffled(5, 7, epoch, 0)] += 1
    assert ((counts - 800) ** 2 / 800).sum() < 45  # 1 in 10 000 of fair shuffles


GOLDEN = [9, 8, 7, 2, 3, 6, 1, 10, 5, 0, 4, 11]
GOLDEN_PACK = "6f9754df1bc12b63"
