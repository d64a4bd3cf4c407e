"""What the launchers of several nodes show each other while their ranks run.

Every node but 0 posts about once a second what its ranks have shown (see pulse) and which of them have failed; node 0 judges all,
and its verdict ends the run everywhere. On one machine there is nobody to tell.
"""

import time
from typing import Any, Dict, List, NamedTuple, Optional

from .control import Channel, Verdict
from .errors import RunFailed
from .place import Place
from .processes import Failure
from .pulse import Board, Sign

POST_S = 0.5
Summary = Dict[str, Any]


class Elsewhere(NamedTuple):
    """How the ranks of other nodes are, all nodes together: what has failed, how many run, how many of these have not failed, by
    which signal all are to stop, how many saves are wished for."""

    failures: List[Failure] = []
    running: int = 0
    left: int = 0
    signal: Optional[str] = None
    saves: int = 0


class Team:
    """``channel``: None on one machine. Node 0 calls ``look`` and ``tell``, the others ``post`` and ``verdict``."""

    def __init__(self, place: Place, channel: Optional[Channel] = None) -> None:
        self.place, self.channel = place, channel
        self.posted, self.last = 0.0, {}  # type: float, Dict[str, Any]
        self.saves: Dict[int, int] = {}  # node -> wishes seen so far

    @property
    def leads(self) -> bool:
        return self.place.node == 0

    @property
    def others(self) -> List[int]:
        """The numbers of all nodes but this one; none on one machine."""
        return [number for number in range(len(self.place.nodes)) if number != self.place.node]

    def named(self, rank: int) -> str:
        if not self.others:
            return "rank %d" % rank
        node = self.place.node_of(rank)
        return "rank %d on node %d (%s)" % (rank, node, self.place.nodes[node].name)

    def file(self, rank: int, path: str) -> str:
        """A file of the rank's node."""
        if not self.others or self.place.shared:
            return path
        return "%s:%s" % (self.place.nodes[self.place.node_of(rank)].name, path)  # the line is shown on every node

    def check(self) -> None:
        """Raises what makes going on together impossible: a node that is gone, or has ended."""
        if self.channel is not None:
            self.channel.check()

    def troubled(self) -> bool:
        return self.channel is not None and self.channel.trouble is not None

    def silent(self, longer_s: float) -> bool:
        """Is there a node that has shown nothing for so long?"""
        return self.channel is not None and any(self.channel.silent_for(node) > longer_s for node in self.channel.links)

    def post(self, board: Board, here: Elsewhere) -> None:
        """Show node 0 how this node is: at once when that has changed, else now and then."""
        assert self.channel is not None
        state = dict(here._asdict(), failures=[list(one) for one in here.failures])
        now = time.monotonic()
        if state != self.last or now - self.posted >= POST_S:
            self.last, self.posted = state, now
            self.channel.post(dict(state, signs={str(rank): list(board.sign(rank)) for rank in self.place.ranks}))

    def verdict(self) -> Optional[Summary]:
        """Node 0's summary of a run that has come to its end."""
        assert self.channel is not None
        return (self.channel.posted(0) or {}).get("summary")

    def tell(self, summary: Summary) -> None:
        """The run has come to its end on all nodes."""
        if self.channel is not None:
            self.channel.post({"summary": summary})

    def settle(self) -> None:
        """All nodes are about to end in the same way."""
        if self.channel is not None:
            self.channel.settled = True

    def look(self, board: Board) -> Elsewhere:
        """Node 0: how the others are; ranks that were not heard of yet count as running. Their signs go onto ``board``, their
        wishes to save too."""
        found = Elsewhere()
        for node in self.others:
            assert self.channel is not None
            state = self.channel.posted(node)
            if state is None:
                number = len(self.place.nodes[node].ranks)
                found = found._replace(running=found.running + number, left=found.left + number)
                continue
            for rank, sign in state["signs"].items():
                board.put(int(rank), Sign(*sign))
            for _ in range(state["saves"] - self.saves.get(node, 0)):
                board.wish_save()
            self.saves[node] = state["saves"]
            found = Elsewhere(
                found.failures + [Failure(*one) for one in state["failures"]],
                found.running + state["running"],
                found.left + state["left"],
                "%s on %s" % (state["signal"], self.channel.named(node)) if state["signal"] else found.signal,
            )
        return found

    def line(self, failure: Failure, stacks: str) -> str:
        line = failure.line.rstrip(".")
        return "%s: %s. Log: %s%s" % (self.named(failure.rank), line, self.file(failure.rank, failure.log), stacks)

    def failed(self, line: str) -> RunFailed:
        return Verdict(line) if self.others else RunFailed(line)
