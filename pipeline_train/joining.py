"""How the launchers of several nodes find each other: node 0 listens, the others knock until it answers. Standard library only."""

import contextlib
import errno
import os
import socket
import threading
import time
from typing import Any, Callable, Dict, List, NamedTuple, Tuple

from .errors import RunFailed, UserError
from .link import Document, Link, part, read_frame, write_frame

Say = Callable[[str], None]  # takes a line for the user
PROTOCOL = 3
HELLO_S = 5.0  # for a connection to say which node it is
KNOCK_S = 0.5  # between two attempts
FIRST_S = 3.0  # before the first line about who is missing; nobody starts two nodes in the same second
AGAIN_S = 30.0  # between two such lines
GREETED = 64  # connections that may be silent at once
Joined = Tuple[Dict[int, Link], List[str]]  # links by node; names


class Meeting(NamedTuple):
    """This launcher is ``node`` of ``nodes`` and calls itself ``name``; all meet at ``addr``:``port`` within ``wait_s`` seconds.
    ``command``: what of its command line must be the same on all nodes."""

    node: int
    nodes: int
    addr: str
    port: int
    name: str
    wait_s: float
    say: Say
    changed: threading.Condition
    check: Callable[[], None]
    command: str

    @property
    def where(self) -> str:
        return "%s:%d" % (self.addr, self.port)


class Patience:
    """Until when to wait, and when to say so again."""

    def __init__(self, meeting: Meeting) -> None:
        self.meeting, now = meeting, time.monotonic()
        self.until, self.next = now + meeting.wait_s, now + FIRST_S

    def over(self, line: str) -> bool:
        """Whether the time is up; says ``line`` now and then meanwhile."""
        self.meeting.check()
        now = time.monotonic()
        if now >= self.next and now < self.until:
            self.meeting.say(line)
            self.next = now + AGAIN_S
        return now >= self.until


def join(meeting: Meeting) -> Joined:
    """See control.Channel.open."""
    if meeting.node:
        return _enter(meeting)
    with _listen(meeting.addr, meeting.port) as door:
        door.settimeout(KNOCK_S)
        hall = _Hall(meeting)
        try:
            hall.fill(door)
        except BaseException as error:
            hall.send_home(str(error) or "interrupted")
            raise
        finally:
            hall.closed = True
    return hall.links, hall.names


class _Hall:
    """Node 0's: whoever has come so far. Every connection is greeted by a thread of its own: one that says nothing keeps nobody
    out."""

    def __init__(self, meeting: Meeting) -> None:
        self.meeting, self.links, self.strangers = meeting, {}, 0  # type: Meeting, Dict[int, Link], int
        self.lock, self.room = threading.Lock(), threading.Semaphore(GREETED)
        self.closed = False  # nobody comes in any more

    @property
    def names(self) -> List[str]:
        return [self.meeting.name] + [self.links[node].name for node in sorted(self.links)]

    def fill(self, door: socket.socket) -> None:
        patience = Patience(self.meeting)
        while len(self.links) < self.meeting.nodes - 1:
            missing = ", ".join("node %d" % node for node in range(1, self.meeting.nodes) if node not in self.links)
            if patience.over("waiting at %s for %s" % (self.meeting.where, missing)):
                raise RunFailed("%s has not come to %s within %d s. Start pipedock train there with --node-rank and --master-addr, "
                                "and let the port through" % (missing, self.meeting.where, self.meeting.wait_s))  # fmt: skip
            with contextlib.suppress(socket.timeout):
                self._meet(*door.accept())
            for link in [link for link in self.links.values() if link.over]:
                self.meeting.say("%s has gone again" % link)
                self.links.pop(link.node).close()
        for link in self.links.values():
            with contextlib.suppress(OSError):  # its reader finds out
                link.write("welcome", {"names": self.names})

    def send_home(self, line: str) -> None:
        for link in self.links.values():
            link.end({"line": "node 0 (%s): %s" % (self.meeting.name, line)})

    def _meet(self, sock: socket.socket, peer: Any) -> None:
        if not self.room.acquire(blocking=False):
            sock.close()
            return
        threading.Thread(target=self._greet, args=(sock, peer), daemon=True).start()

    def _greet(self, sock: socket.socket, peer: Any) -> None:
        try:
            self._hello(sock, peer)
        finally:
            self.room.release()

    def _hello(self, sock: socket.socket, peer: Any) -> None:
        end = time.monotonic() + HELLO_S

        def hear() -> None:
            if time.monotonic() > end:  # one that says a byte now and then
                raise socket.timeout

        try:
            sock.settimeout(HELLO_S)
            hello = read_frame(sock, hear)[0]
            node, name = hello["node"], plain(hello["name"], 64)
            if type(node) is not int:
                raise TypeError(node)
            with self.lock:
                refusal = self._refusal(hello, node, name)
                if not refusal and not self.closed:
                    self.links[node] = Link(sock, node, name, self.meeting.changed)
                    self.links[node].start()
                    return
            if refusal:
                self.meeting.say(refusal)
                write_frame(sock, {"kind": "refused", "line": refusal})
            part(sock)
        except (OSError, EOFError, ValueError, KeyError, TypeError):
            with self.lock:
                self.strangers += 1
                first = self.strangers == 1  # a port scanner comes back
            if first and not self.closed:
                self.meeting.say("a connection from %s was no pipedock train; ignored" % peer[0])
            sock.close()

    def _refusal(self, hello: Document, node: int, name: str) -> str:
        if hello.get("protocol") != PROTOCOL:
            return "node %d (%s) has another version of pipedock than node 0 (%s)" % (node, name, self.meeting.name)
        if hello["command"] != self.meeting.command:
            return "node %d (%s) runs %s, node 0 (%s) %s; give all nodes the same command" % (
                node, name, plain(hello["command"], 200), self.meeting.name, self.meeting.command)  # fmt: skip
        if hello["nodes"] != self.meeting.nodes:
            return "node %d (%s) was started with --nodes %s, node 0 (%s) with --nodes %d" % (
                node, name, hello["nodes"], self.meeting.name, self.meeting.nodes)  # fmt: skip
        if not 0 <= node < self.meeting.nodes:
            most = self.meeting.nodes
            return "node %d (%s): with --nodes %d, --node-rank is 0 to %d" % (node, name, most, most - 1)
        if node == 0 or node in self.links:
            other = self.links[node].name if node in self.links else self.meeting.name
            return "two launchers are node %d: %s and %s; give each its own --node-rank" % (node, other, name)
        return ""


def plain(text: Any, most: int) -> str:
    """What another machine says of itself, as far as it can be shown."""
    return "".join(c if c.isprintable() else "?" for c in str(text)[:most])


def _listen(addr: str, port: int) -> socket.socket:
    """On the loopback interface if that is what ``addr`` names, else on all of them: a machine may know itself by a loopback
    address (Debian's 127.0.1.1) where the others know it by another."""
    try:
        family, _, _, _, place = socket.getaddrinfo(addr, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.bind((place[0], 0))
        if addr in ("localhost", "::1") or addr.startswith("127."):
            return socket.create_server(place[:2], family=family)
        if socket.has_dualstack_ipv6():
            return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
        return socket.create_server(("", port))
    except socket.gaierror as error:
        raise UserError("--master-addr %s: cannot be looked up: %s" % (addr, error.strerror)) from None
    except OSError as error:
        if error.errno == errno.EADDRNOTAVAIL:
            line = "--master-addr %s: is no address of this machine, which is node 0; name one that all nodes reach"
            raise UserError(line % addr) from None
        raise UserError("--master-port: port %d of %s cannot be used: %s. Is another pipedock running? Name another port."
                        % (port, addr, os.strerror(error.errno) if error.errno else error)) from None  # fmt: skip


def _enter(meeting: Meeting) -> Joined:
    patience = Patience(meeting)
    link = Link(_knock(meeting, patience), 0, meeting.addr, meeting.changed)
    link.start()
    with meeting.changed:
        while link.welcome is None and not link.over:
            state = "has answered, waiting for the other nodes" if link.answered else "is connected to, and has not answered yet"
            patience.over("%s %s" % (link, state))  # node 0 decides how long
            meeting.changed.wait(KNOCK_S)
    welcome = link.welcome or {}
    if welcome.get("kind") == "welcome":
        link.name = welcome["names"][0]
        return {0: link}, welcome["names"]
    link.close()
    if "line" in welcome:
        raise UserError(welcome["line"])
    raise RunFailed((link.ended or {}).get("line") or "%s %s, before all nodes were there" % (link, link.lost or "has ended"))


def _knock(meeting: Meeting, patience: Patience) -> socket.socket:
    """A connection on which node 0 knows who we are."""
    reason = ""
    while not patience.over("waiting for node 0 at %s (%s)" % (meeting.where, reason)):
        try:
            sock = socket.create_connection((meeting.addr, meeting.port), timeout=HELLO_S)
            write_frame(sock, {"protocol": PROTOCOL, "node": meeting.node, "nodes": meeting.nodes, "name": meeting.name,
                               "command": meeting.command})  # fmt: skip
            return sock
        except OSError as error:
            reason = error.strerror or str(error)
            time.sleep(KNOCK_S)
    raise RunFailed("node 0 does not answer at %s within %d s (%s). Start pipedock train there with --node-rank 0, and let the "
                    "port through" % (meeting.where, meeting.wait_s, reason))  # fmt: skip
