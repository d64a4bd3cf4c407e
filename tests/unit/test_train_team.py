"""What launchers of two nodes show each other while their ranks run; tests/integration/teams_lane.py has real launchers."""

import json

from pipeline_train.place import Node, Place
from pipeline_train.processes import ECHO, KILLED, OWN, Failure
from pipeline_train.pulse import Board, Sign
from pipeline_train.team import Elsewhere, Team

PLACE = Place(0, (Node("a", (0,)), Node("b", (1, 2))), shared=False)


class Posts:
    """A channel in which node 1 has shown ``state``."""

    trouble = None

    def __init__(self, state=None):
        self.state, self.sent = state, []

    def posted(self, node):
        return self.state

    def post(self, document):
        self.sent.append(json.loads(json.dumps(document)))

    def named(self, node):
        return "node %d (%s)" % (node, "ab"[node])


def test_what_one_node_posts_the_other_sees():
    board = Board.make(3)
    board.put(1, Sign(5, 6, 7, "saving", ""))
    board.put(2, Sign(8, 9, 7, "failed", "disk full"))
    posts = Posts()
    failures = [Failure(OWN, 2, "disk full", "/out/logs/rank_2.log")]
    Team(PLACE._replace(node=1), posts).post(board, Elsewhere(failures, 2, 1, "SIGTERM", 1))
    seen, here = Board.make(3), Team(PLACE, Posts(posts.sent[0]))
    assert here.look(seen) == Elsewhere(failures, 2, 1, "SIGTERM on node 1 (b)")
    assert seen.sign(1) == Sign(5, 6, 7, "saving", "") and seen.sign(2) == Sign(8, 9, 7, "failed", "disk full")
    assert seen.wishes() == (0, 1)
    here.look(seen)
    assert seen.wishes() == (0, 1)  # the same wish, seen again
    assert here.line(failures[0], "") == "rank 2 on node 1 (b): disk full. Log: b:/out/logs/rank_2.log"
    board.close()
    seen.close()


def test_a_state_that_stays_is_not_posted_every_time():
    board, posts = Board.make(3), Posts()
    team = Team(PLACE._replace(node=1), posts)
    for running in (2, 2, 2, 1):
        team.post(board, Elsewhere([], running, running, None, 0))
    assert [state["running"] for state in posts.sent] == [2, 1]
    board.close()


def test_ranks_that_nobody_has_heard_of_run():
    board = Board.make(3)
    assert Team(PLACE, Posts()).look(board) == Elsewhere([], 2, 2)
    assert Team(Place.alone(3)).look(board) == Elsewhere([], 0, 0)
    board.close()


def test_the_likeliest_cause_comes_first():
    kinds = [Failure(ECHO, 0, "a", ""), Failure(OWN, 1, "b", ""), Failure(KILLED, 2, "c", "")]
    assert [one.rank for one in sorted(kinds)] == [2, 1, 0]
