"""Which node each rank runs on, and whether all nodes write into one folder. Standard library only.

A node is one machine or one container with a launcher of its own; node 0's is the one that the others join.
"""

import json
import os
from typing import Dict, NamedTuple, Tuple

PLACE = "PIPEDOCK_PLACE"  # in the ranks' environment, one JSON object


class Node(NamedTuple):
    """``name``: what its owner calls it. ``ranks``: those that run there, ascending."""

    name: str
    ranks: Tuple[int, ...]


class Place(NamedTuple):
    """``node``: the number of this one. ``shared``: run.out is one folder that all nodes see."""

    node: int
    nodes: Tuple[Node, ...]
    shared: bool

    @classmethod
    def alone(cls, world: int) -> "Place":
        """One machine, all ranks on it."""
        return cls(0, (Node(os.uname().nodename, tuple(range(world))),), True)

    @classmethod
    def inherited(cls) -> "Place":
        """The launcher's."""
        if PLACE not in os.environ:
            return cls.alone(int(os.environ.get("WORLD_SIZE", "1")))
        raw = json.loads(os.environ[PLACE])
        return cls(raw["node"], tuple(Node(name, tuple(ranks)) for name, ranks in raw["nodes"]), raw["shared"])

    def environment(self) -> Dict[str, str]:
        """For the ranks of this node."""
        return {PLACE: json.dumps({"node": self.node, "nodes": [list(node) for node in self.nodes], "shared": self.shared})}

    @property
    def ranks(self) -> Tuple[int, ...]:
        """Those on this node."""
        return self.nodes[self.node].ranks

    @property
    def world(self) -> int:
        return sum(len(node.ranks) for node in self.nodes)

    def node_of(self, rank: int) -> int:
        return next(number for number, node in enumerate(self.nodes) if rank in node.ranks)
