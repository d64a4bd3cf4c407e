"""Several launchers become one run: who is who, whether they share a disk, whether they are about to train the same.

Every node runs ``pipedock train`` with the same run.yaml. Their launchers meet (control.Channel, one port above the ranks'),
compare code, versions and configuration, find out whether run.out is one folder, and agree on the checkpoint to go on from.
"""

import os
import re
import time
import uuid
from datetime import datetime
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Optional

from . import identity, network, run_folder, scattered
from .config_schema import RunConfig
from .control import Channel, Refusal
from .errors import RunFailed, UserError
from .hostfile import Host
from .place import Node, Place

Say = Callable[[str], None]  # takes a line for the user

PORT = 29500  # where torch's store listens on node 0; torchrun's too
JOIN_S = 600.0  # images are pulled, machines boot
WAIT = "PIPEDOCK_JOIN_S"  # replaces JOIN_S
TOKEN = ".same-folder-"


class Request(NamedTuple):
    """What the user has asked for: this is ``node`` of ``nodes``; all meet at ``addr``, the ranks at ``port``. ``hosts``: those of
    a hostfile, on node 0."""

    node: int
    nodes: int
    addr: str
    port: int = PORT
    hosts: Optional[List[Host]] = None


def request(nodes: Optional[int], node: Optional[int], addr: Optional[str], port: Optional[int]) -> Optional[Request]:
    """Of the command line; None: one machine. Raises UserError for what is left out or cannot be."""
    if nodes is None:
        given = [("--node-rank", node), ("--master-addr", addr), ("--master-port", port)]
        named = [name for name, value in given if value is not None]
        if named:
            raise UserError("%s: goes with --nodes, the number of machines" % named[0])
        return None
    if nodes < 1:
        raise UserError("--nodes %d: must be at least 1" % nodes)
    if node is None or addr is None:
        raise UserError("--nodes %d: needs --node-rank (0 to %d, another one on every node) and --master-addr (node 0's address)"
                        % (nodes, nodes - 1))  # fmt: skip
    if not 0 <= node < nodes:
        raise UserError("--node-rank %d: with --nodes %d it is one of 0 to %d" % (node, nodes, nodes - 1))
    if port is not None and not 0 < port < 65535:
        raise UserError("--master-port %d: must be one of 1 to 65534; the one above it is used too" % port)
    return None if nodes == 1 else Request(node, nodes, addr, port or PORT)


def counts(world: int, nodes: int, hosts: Optional[List[Host]]) -> List[int]:
    """How many ranks each node gets: a hostfile's slots if they are as many as the run needs, else the same number. Raises
    UserError."""
    if hosts is not None and sum(host.slots for host in hosts) == world:
        return [host.slots for host in hosts]
    if world % nodes:
        raise UserError("parallel: pipe x data needs %d processes, which %d nodes cannot share equally. Change --nodes or "
                        "parallel, or give a hostfile with %d slots in all" % (world, nodes, world))  # fmt: skip
    each = world // nodes
    few = next((host for host in hosts or [] if host.slots < each), None)
    if few is not None:
        raise UserError("%s: %s has slots=%d, but parallel: pipe x data needs %d processes, %d on each of %d nodes. Raise the "
                        "slots or lower the run." % (few.where, few.name, few.slots, world, each, nodes))  # fmt: skip
    return [each] * nodes


class Party:
    """This launcher among the others. ``place``: where the ranks are; whether the disk is shared is known after ``open_folder``.
    ``now``: one time for all of them."""

    def __init__(self, request: Request, channel: Channel, place: Place, now: str, say: Say) -> None:
        self.request, self.channel, self.place, self.now, self.say = request, channel, place, now, say

    @classmethod
    def join(cls, request: Request, run: RunConfig, say: Say, check: Callable[[], None] = lambda: None) -> "Party":
        """Wait for the other launchers and compare what they are about to do. ``check`` may raise what makes waiting useless.

        Raises UserError with a line for each difference, RunFailed for a node that does not come; the channel is closed then."""
        channel = Channel.open(
            request.node, request.nodes, request.addr, request.port + 1, os.uname().nodename, _patience(), say, check
        )
        try:
            mine: Dict[str, Any] = {"identity": identity.identity(run, say, data=False)}
            if request.node == 0:
                names = [host.name for host in request.hosts] if request.hosts else channel.names
                mine.update(ranks=counts(run.world, request.nodes, request.hosts), names=names)
                mine.update(now=datetime.now().replace(microsecond=0).isoformat())
            everyone = channel.exchange(mine)
            first = everyone[0]
            channel.rename(first["names"])
            refuse(identity.differences([document["identity"] for document in everyone], channel.names))
            place = Place(request.node, _numbered(channel.names, first["ranks"]), shared=True)
        except BaseException as error:
            channel.close(error)
            raise
        say("%s of %d: %s" % (channel.named(request.node), request.nodes, _told(place)))
        return cls(request, channel, place, first["now"], say)

    def open_folder(self, out: Path, where: str) -> None:
        """Take run.out: one folder that all nodes see, which is node 0's to lock, or each its own. Raises UserError."""
        token = TOKEN + uuid.uuid4().hex
        leads = self.place.node == 0
        if leads:
            run_folder.take(out, where, self.say)
            _touch(out / token, where)
        seen = self.channel.exchange({"token": token})[0]["token"]
        sees = [document["sees"] for document in self.channel.exchange({"sees": os.path.exists(str(out / seen))})]
        if leads:
            os.unlink(str(out / token))
        if len(set(sees[1:])) > 1:
            raise Refusal("run.out: %s: %s sees the folder of node 0, %s does not; let all of them see it, or none"
                            % (out, self.channel.named(sees.index(True, 1)), self.channel.named(sees.index(False)))
                            )  # fmt: skip
        self.place = self.place._replace(shared=all(sees))
        if not self.place.shared and not leads:
            run_folder.take(out, where, self.say)
        self.say("run.out: %s: %s" % (out, "one folder for all nodes" if self.place.shared else "every node has its own"))

    @property
    def follows(self) -> bool:
        """Does node 0 prepare the run for this node too?"""
        return self.place.shared and self.place.node > 0

    def find(self, out: Path, resume: Optional[str]) -> Optional[Path]:
        """See run_folder.find."""
        if self.place.shared:
            return run_folder.find(out, resume, self.say)
        return scattered.find_together(self.channel.exchange, self.place, out, resume, self.say)

    def check_device(self, gpus: int) -> None:
        """``gpus``: of this machine that take part, 0: it trains on the CPU. Raises UserError when the nodes differ."""
        counts = [document["gpus"] for document in self.channel.exchange({"gpus": gpus})]
        if all(counts) != any(counts):
            with_gpu = next(node for node, number in enumerate(counts) if number)
            raise Refusal("%s trains on GPUs, %s has none that torch can use: is the driver there, and the container given its "
                            "GPUs? DS_ACCELERATOR=cpu on every node trains on the CPUs"
                            % (self.channel.named(with_gpu), self.channel.named(counts.index(0))))  # fmt: skip

    def addresses(self) -> Dict[str, str]:
        """For the ranks' environment: where they meet and by which interface. Raises UserError."""
        found = network.collective_environment(self.request.addr)
        for name, interface in sorted(found.items()):
            self.say("%s=%s, by the route to %s" % (name, interface, self.request.addr))
        return dict(found, MASTER_ADDR=self.request.addr, MASTER_PORT=str(self.request.port))

    def share(self, document: Optional[Dict[str, Any]] = None) -> Dict[str, Any]:
        """Node 0's document, on every node."""
        return self.channel.exchange(document or {})[0]


def refuse(differences: List[str]) -> None:
    if differences:
        raise Refusal("\n".join(differences))


def wait_for(path: Path, sha256: str, hash_of: Callable[[Path], str], patience_s: float = 30.0) -> None:
    """Until this machine sees what node 0 has written into the shared folder: a network's disk may show it later. Raises
    RunFailed."""
    until = time.monotonic() + patience_s
    while True:
        try:
            if hash_of(path) == sha256:
                return
        except OSError:
            pass
        if time.monotonic() > until:
            raise RunFailed("%s: is not what node 0 has written %d s ago; is it really the same folder?" % (path, patience_s))
        time.sleep(0.2)


def _numbered(names: List[str], ranks: List[int]) -> Any:
    starts = [sum(ranks[:node]) for node in range(len(ranks))]
    return tuple(Node(name, tuple(range(start, start + count))) for name, start, count in zip(names, starts, ranks))


def _told(place: Place) -> str:
    return "; ".join("%s has rank%s %s" % (node.name, "s" * (len(node.ranks) > 1), _span(node.ranks)) for node in place.nodes)


def _span(ranks: Any) -> str:
    return str(ranks[0]) if len(ranks) == 1 else "%d to %d" % (ranks[0], ranks[-1])


def _patience() -> float:
    text = os.environ.get(WAIT, "")
    if text and not re.fullmatch(r"\d{1,6}", text):
        raise UserError("%s: must be whole seconds, got %r" % (WAIT, text))
    return float(text or JOIN_S)


def _touch(path: Path, where: str) -> None:
    try:
        path.touch()
    except OSError as error:
        raise UserError("%s: run.out: %s: cannot be written: %s" % (where, path, error.strerror)) from None
