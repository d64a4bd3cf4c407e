"""The network interface of this node, and whether every node reaches every other, at the master port and at free ones."""

import contextlib
import os
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Dict, List, Optional, Sequence, Tuple

from .. import network
from ..control import Channel
from ..errors import UserError
from ..identity import nodes
from .finding import FAILURE, NOTE, OK, WARNING, Facts, Finding

KNOCK_S = 3.0
LEAVE_S = 1.0  # for a guest to close
GREETING = b"pipedock preflight %d\n"
MOST_KNOCKS = 32  # at once


def measure(addr: Optional[str]) -> Facts:
    """``addr``: node 0's, None where there is one node only. {"interface", "source": this node's address towards it, "set": what
    preflight sets, "kept": what the user has set, "names": the interfaces here, "error": why there is none}."""
    found: Facts = {"interface": None, "source": None, "set": {}, "kept": {}, "error": "", "addr": addr}
    found["names"] = sorted({one.interface for one in network.carried()})
    found["kept"] = {name: os.environ[name] for name in network.VARIABLES if os.environ.get(name)}
    if addr is None:
        return found
    try:
        found["source"] = network.route(addr)[1]
        found["set"] = network.collective_environment(addr)
        if not found["kept"]:
            found["interface"] = network.interface_to(addr)
    except UserError as error:
        found["error"] = str(error)
    return found


def check_interface(facts: Facts) -> List[Finding]:
    net = facts["network"]
    if net["addr"] is None:
        return []
    if net["error"]:
        said, _, fix = net["error"].partition(". Name ")
        return [Finding("network", FAILURE, said, "name " + fix if fix else "sudo ip link set DEVICE up; ip route")]
    for name, value in net["kept"].items():
        words = [word.lstrip("=") for word in value.lstrip("^").split(",") if word]
        known = any(one == word or (name.startswith("NCCL") and one.startswith(word)) for word in words for one in net["names"])
        if not value.startswith("^") and net["names"] and not known:
            return [Finding("network", FAILURE, "%s=%s names no interface of this node (it has %s)"
                            % (name, value, ", ".join(net["names"])), "unset %s" % name)]  # fmt: skip
        inner = [word for word in words if word == "lo" or network.INTERNAL.fullmatch(word)]
        if inner and not value.startswith("^") and not str(net["source"]).startswith(("127.", "::1")):
            return [Finding("network", WARNING, "%s=%s does not lead to other machines" % (name, value), "unset %s" % name)]
    told = ["%s=%s" % pair for pair in sorted(net["set"].items())]
    told += ["%s=%s (yours)" % pair for pair in sorted(net["kept"].items())]
    if not told:
        return [Finding("network", NOTE, "this system does not tell which interface leads to %s" % net["addr"],
                        "set NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME")]  # fmt: skip
    return [
        Finding(
            "network", OK, "%s from %s to %s: %s" % (net["interface"] or "address", net["source"], net["addr"], ", ".join(told))
        )
    ]


class Door:
    """A listening socket that greets whoever knocks with this node's number."""

    def __init__(self, host: str, port: int, node: int) -> None:
        """Raises OSError."""
        self.sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
        self.node = node
        try:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self.sock.bind((host, port))
            self.sock.listen(256)
        except OSError:
            self.sock.close()
            raise
        self.port = int(self.sock.getsockname()[1])
        self.thread = threading.Thread(target=self._greet, daemon=True)
        self.thread.start()

    def _greet(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                guest, _ = self.sock.accept()
                with guest, contextlib.suppress(OSError):
                    guest.settimeout(LEAVE_S)
                    guest.sendall(GREETING % self.node)
                    guest.recv(1)  # until the guest has closed: its end keeps the port busy for a minute, not ours

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)
        self.sock.close()


def knock(host: str, port: int, node: int) -> str:
    """ "" when ``node`` greets there, else why not."""
    try:
        with socket.create_connection((host, port), timeout=KNOCK_S) as sock:
            sock.settimeout(KNOCK_S)
            heard = b""
            while not heard.endswith(b"\n") and len(heard) < 100:
                part = sock.recv(100)
                if not part:
                    break
                heard += part
    except socket.timeout:
        return "no answer within %.0f s" % KNOCK_S
    except OSError as error:
        return error.strerror or str(error)
    return "" if heard == GREETING % node else "another program answers there"


def reach(channel: Channel, addr: str, port: int, source: Optional[str]) -> List[Dict[str, Any]]:
    """All nodes call it. Of every node {"source", "port" of its door, "busy": why node 0 cannot listen at ``port``, "master": why
    it cannot be reached there, "peers": {node: why that one cannot be reached}}; "" where all is well."""
    row: Dict[str, Any] = {"source": source, "port": None, "busy": "", "master": "", "peers": {}}
    doors: List[Door] = []
    try:
        if source is not None:
            doors.append(Door(source, 0, channel.node))
            row["port"] = doors[0].port
        if channel.node == 0 and source is not None:
            try:
                doors.append(Door("::" if ":" in source else "", port, 0))  # on all interfaces, as the store
            except OSError as error:
                row["busy"] = error.strerror or str(error)
        rows = channel.exchange(row)
        if rows[0]["port"] is not None and not rows[0]["busy"] and channel.node:
            row["master"] = knock(addr, port, 0)
        others = [(node, other) for node, other in enumerate(rows) if node != channel.node and other["port"] is not None]
        with ThreadPoolExecutor(max(1, min(MOST_KNOCKS, len(others)))) as pool:
            answers = list(pool.map(lambda pair: knock(pair[1]["source"], pair[1]["port"], pair[0]), others))
        row["peers"] = {str(node): answer for (node, _), answer in zip(others, answers)}
        return channel.exchange(row)
    finally:
        for door in doors:
            door.close()


def check_reach(rows: Sequence[Dict[str, Any]], names: Sequence[str], addr: str, port: int) -> List[Finding]:
    """Who cannot be reached by whom, one finding for each that cannot."""
    found = []
    if rows[0]["busy"]:
        found.append(Finding("ports", FAILURE, "port %d cannot be used: %s" % (port, rows[0]["busy"]),
                             "end what uses it (sudo ss -ltnp 'sport = :%d'), or change --master-port" % port, 0))  # fmt: skip
    shut = [(node, row["master"]) for node, row in enumerate(rows) if row["master"]]
    if shut:
        found.append(_shut(0, shut, names, "%s:%d (--master-port)" % (addr, port), rows))
    for target, row in enumerate(rows):
        shut = [(node, other["peers"][str(target)]) for node, other in enumerate(rows) if other["peers"].get(str(target))]
        if shut:
            found.append(_shut(target, shut, names, "%s, a free port such as %s" % (row["source"], row["port"]), rows))
    pairs = sum(len(row["peers"]) for row in rows)
    return found or [Finding("ports", OK, "%s:%d and a free port of each node, %d connections tried" % (addr, port, pairs))]


def _shut(target: int, callers: List[Tuple[int, str]], names: Sequence[str], where: str, rows: Sequence[Dict[str, Any]]) -> Finding:
    reasons = sorted({reason for _, reason in callers})
    said = "%s cannot be reached from %s: %s" % (where, nodes([node for node, _ in callers], names), "; ".join(reasons))
    source = rows[callers[0][0]]["source"]
    fix = "let the nodes reach all ports of each other: sudo ufw allow from %s (or sudo iptables -I INPUT -s %s -j ACCEPT)" % (
        source,
        source,
    )
    return Finding("ports", FAILURE, said, fix, target)
