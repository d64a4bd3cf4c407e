"""The control channel: the launcher of every node has one connection to that of node 0. Standard library only.

Whoever can reach the port can join, as with torch's own store: it belongs into the cluster's network. Every second both ends
show that they live (see link.SILENT_S). A node that dies is told to all others by node 0, so that nobody waits for it.
"""

import contextlib
import threading
import time
from typing import Callable, Dict, List, Optional, Tuple

from . import joining
from .errors import RunFailed, UserError
from .link import Document, Link

Say = Callable[[str], None]  # takes a line for the user
AGAIN_S = 60.0  # between two lines about who is waited for


class NodeGone(RunFailed):
    """``node`` has died, or the network between it and node 0."""

    def __init__(self, node: int, message: str) -> None:
        super().__init__(message)
        self.node = node


class Verdict(RunFailed):
    """A line that says itself where what it tells of was: the same on every node."""

    everywhere = True


class Refusal(UserError):
    """What every node finds by itself, in the same words."""

    everywhere = True


class Channel:
    """``node``: this one, of ``nodes``; ``names``: what every node calls itself.

    ``trouble``: the first reason why the nodes cannot go on together: NodeGone, or the UserError or RunFailed that another node
    ended with. Every call that waits raises it. ``on_trouble`` is called once, from another thread: for a launcher that is busy."""

    def __init__(self, node: int, nodes: int, name: str, say: Say = lambda line: None) -> None:
        self.node, self.nodes, self.say = node, nodes, say
        self.names = [name if number == node else "?" for number in range(nodes)]
        self.changed = threading.Condition()
        self.links: Dict[int, Link] = {}  # node 0: to every other one; elsewhere: to node 0
        self.trouble: Optional[Exception] = None
        self.on_trouble: Callable[[], None] = lambda: None
        self.closed = False
        self.settled = False  # all nodes know how this ends: nobody has to be told

    @classmethod
    def open(
        cls, node: int, nodes: int, addr: str, port: int, name: str, wait_s: float, say: Say,
        check: Callable[[], None] = lambda: None, command: str = "pipedock train",
    ) -> "Channel":  # fmt: skip
        """Join all ``nodes``: node 0 listens at ``addr``:``port``, the others connect to it. Patient: whoever comes first waits up
        to ``wait_s`` seconds, ``say`` tells for whom, and ``check`` may raise what makes waiting useless.
        ``command``: what of the command line must be the same on all nodes.

        Raises RunFailed naming who is missing, UserError for launchers that do not belong together."""
        channel = cls(node, nodes, name, say)
        if nodes > 1:
            meeting = joining.Meeting(node, nodes, addr, port, name, wait_s, say, channel.changed, check, command)
            channel.links, channel.names = joining.join(meeting)
        for link in channel.links.values():
            link.on_over = channel._over
            if link.over:  # in the meantime
                channel._over(link)
        return channel

    def named(self, node: int) -> str:
        """ "node 1 (b)"."""
        return "node %d (%s)" % (node, self.names[node])

    def rename(self, names: List[str]) -> None:
        """From now on the nodes are called so: a hostfile's names instead of what each calls itself."""
        self.names = list(names)
        for node, link in self.links.items():
            link.name = names[node]

    def send(self, node: int, document: Document, payload: bytes = b"") -> None:
        """To node 0, or from it to another. ``payload``: at most 64 MiB. Waits while the other end has four messages that it has
        not received. Raises ``trouble``."""
        link = self.links[node]
        while not link.room.acquire(timeout=0.2):
            self.check()
            if link.over:
                raise RunFailed("%s has ended already" % link)
        self._write(link, "message", {"document": document}, payload)

    def receive(self, node: int) -> Tuple[Document, bytes]:
        """The next message of node 0, or at node 0 of another, however long it takes as long as that node lives; says after a
        minute who is waited for. Raises ``trouble``, RunFailed for a node that has ended without a message."""
        link, said = self.links[node], time.monotonic()
        with self.changed:
            while not link.messages:
                self.check()
                if link.over:
                    raise RunFailed("%s has ended already" % link)
                self.changed.wait(0.5)
                if time.monotonic() - said > AGAIN_S:
                    self.say("waiting for %s" % link)
                    said = time.monotonic()
            message = link.messages.popleft()
        self._write(link, "taken", {})
        return message

    def exchange(self, document: Document) -> List[Document]:
        """Every node's document, by node, on every node. All nodes must call it. Raises ``trouble``."""
        if self.nodes == 1:
            return [document]
        if self.node:
            self.send(0, document)
            return list(self.receive(0)[0]["all"])
        documents = [document] + [self.receive(node)[0] for node in range(1, self.nodes)]
        for node in range(1, self.nodes):
            self.send(node, {"all": documents})
        return documents

    def post(self, document: Document) -> None:
        """Show the other end (at node 0: all others) this state in place of the last one; never waits for them to look."""
        for link in self.links.values():
            if not link.over:
                self._write(link, "post", document)

    def posted(self, node: int) -> Optional[Document]:
        """The newest state that ``node`` has shown."""
        return self.links[node].posted

    def silent_for(self, node: int) -> float:
        """Seconds since anything came from it."""
        return time.monotonic() - self.links[node].heard

    def check(self) -> None:
        """Raises ``trouble``."""
        if self.trouble is not None:
            raise self.trouble

    def close(self, error: Optional[BaseException] = None) -> None:
        """Leave the others; with ``error`` they end too, with this line. May be called twice."""
        if self.closed:
            return
        self.closed = True
        words: Document = {}
        if self.settled:
            error = None
        elif self.trouble is not None:
            words = self._told(self.trouble)
        if error is not None and not words:
            line = str(error) or ("interrupted" if isinstance(error, KeyboardInterrupt) else type(error).__name__)
            line = line if getattr(error, "everywhere", False) else "%s: %s" % (self.named(self.node), line)
            words = {"line": line, "user": isinstance(error, UserError)}
        for link in self.links.values():
            link.close() if link.over else link.end(words)

    def _write(self, link: Link, kind: str, document: Document, payload: bytes = b"") -> None:
        try:
            link.write(kind, document, payload)
        except OSError:
            with self.changed:  # the reader knows why
                self.changed.wait_for(lambda: link.over, timeout=1.0)
            self.check()
            if kind == "message":
                raise NodeGone(link.node, "%s cannot be reached" % link) from None

    def _over(self, link: Link) -> None:
        """From a link's thread: the other end has gone, with words or without."""
        words = link.ended or {}
        if self.closed or (link.ended is not None and "line" not in words):
            return
        if "line" not in words:
            error: Exception = NodeGone(link.node, "%s %s" % (link, link.lost))
        elif "node" in words:
            error = NodeGone(words["node"], words["line"])
        else:
            error = UserError(words["line"]) if words.get("user") else RunFailed(words["line"])
        with self.changed:
            if self.trouble is not None:
                return
            self.trouble = error
            self.changed.notify_all()
        for other in self.links.values():  # node 0 has several
            if other is not link and not other.over:
                with contextlib.suppress(OSError):
                    other.write("end", self._told(error))
        self.on_trouble()

    def _told(self, trouble: Exception) -> Document:
        words = {"line": str(trouble), "user": isinstance(trouble, UserError)}
        return dict(words, node=trouble.node) if isinstance(trouble, NodeGone) else words
