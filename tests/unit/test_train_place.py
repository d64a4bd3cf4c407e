"""Where the ranks run: told by the launcher, read by the ranks."""

import pytest

from pipeline_train.place import PLACE, Node, Place

TWO = Place(1, (Node("a", (0, 1, 2)), Node("b", (3,))), shared=False)


def test_what_the_launcher_says_is_what_a_rank_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in TWO.environment().items():
        monkeypatch.setenv(name, value)
    assert Place.inherited() == TWO


def test_the_ranks_of_a_node(monkeypatch: pytest.MonkeyPatch) -> None:
    assert TWO.ranks == (3,) and TWO.world == 4
    assert [TWO.node_of(rank) for rank in range(4)] == [0, 0, 0, 1]


def test_without_a_launcher_all_ranks_are_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(PLACE, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "3")
    place = Place.inherited()
    assert place.shared and place.node == 0 and place.ranks == (0, 1, 2)
