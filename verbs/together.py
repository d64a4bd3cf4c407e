"""``pipedock train`` on several nodes: the command line's part, and what only one of them does."""

import argparse
import contextlib
import os
import signal
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple

from .progress import say


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--hostfile", metavar="FILE", type=Path,
                        help='the machines as DeepSpeed names them, "node1 slots=8" a line; started from the first')  # fmt: skip
    parser.add_argument("--nodes", metavar="N", type=int, help="how many machines take part; start this command on each")
    parser.add_argument("--node-rank", metavar="R", type=int, help="which of them this one is, 0 to N-1")
    parser.add_argument("--master-addr", metavar="A", help="address of node 0, as every node reaches it")
    parser.add_argument("--master-port", metavar="P", type=int,
                        help="port of node 0 that the ranks meet at, P+1 for the launchers (default 29500)")  # fmt: skip


class Calm:
    """Before and after the ranks' lifetime there is nothing to save: SIGUSR1 is ignored, by the ranks too until they listen, and
    SIGTERM ends the command with a line of its own. Trouble on another node does, too."""

    def __init__(self) -> None:
        self.party: Any = None
        self.reason: Optional[Exception] = None  # why a signal has ended the command

    @contextlib.contextmanager
    def kept(self) -> Iterator["Calm"]:
        handlers = ((signal.SIGUSR1, signal.SIG_IGN), (signal.SIGTERM, self._ended))
        before = [(number, signal.signal(number, handler)) for number, handler in handlers]
        try:
            yield self
        finally:
            for number, handler in before:
                signal.signal(number, handler)

    def watch(self, party: Any) -> None:
        """From now on trouble on another node interrupts whatever this one does."""
        self.party = party
        party.channel.on_trouble = lambda: os.kill(os.getpid(), signal.SIGTERM)

    def _ended(self, number: int, frame: Any) -> None:
        from pipeline_train.errors import Stopped

        trouble = self.party.channel.trouble if self.party is not None else None
        self.reason = trouble or Stopped("stopped by SIGTERM")
        raise self.reason


def hosts_of(args: argparse.Namespace) -> Any:
    """The hostfile's hosts, or None. Raises UserError when the nodes are named in both ways."""
    from pipeline_train import hostfile
    from pipeline_train.errors import UserError

    if args.hostfile is None:
        return None
    if args.nodes is not None:
        raise UserError("--hostfile: starts the other nodes itself; leave out --nodes, or start every node yourself without it")
    return hostfile.read(args.hostfile)


def request_of(args: argparse.Namespace, hosts: Any) -> Any:
    """Who is who, by the hostfile or the command line; None on one machine. What .deepspeed_env says holds from here on, as it does
    on every node. Raises UserError."""
    from pipeline_train import nodes, remote
    from pipeline_train.errors import UserError

    if hosts is None:
        return nodes.request(args.nodes, args.node_rank, args.master_addr, args.master_port)
    if args.node_rank is not None or args.master_addr is not None:
        raise UserError("--hostfile: says which nodes there are; leave out --node-rank and --master-addr")
    if len(hosts) == 1:
        return None
    os.environ.update(remote.variables())
    remote.check_first(hosts[0])
    return nodes.Request(0, len(hosts), hosts[0].name, args.master_port or nodes.PORT, hosts)


@contextlib.contextmanager
def elsewhere(request: Any, arguments: List[str], logs: Path) -> Iterator[Callable[[], None]]:
    """The launchers of a hostfile's other hosts, with these arguments of pipedock, what they say in ``logs``; none when every node
    is started by its user. -> what to call while waiting for them: it raises why one cannot come."""
    from pipeline_train import remote

    if request.hosts is None:
        yield lambda: None
        return
    remotes = remote.Remotes(request.hosts, arguments, request.port, logs, say)
    try:
        remotes.start()
        yield remotes.check
    except BaseException as error:
        _add_last_words(error, remotes)
        raise
    finally:
        remotes.end()


@contextlib.contextmanager
def joined(args: argparse.Namespace, config: Any, hosts: Any, calm: Calm) -> Iterator[Any]:
    """The party of all nodes, left at the end; None on one machine. Whatever ends this node is told to the others."""
    from pipeline_train import nodes, run_folder

    request = request_of(args, hosts)
    if request is None:
        yield None
        return
    out = Path(config.run.out)
    if request.hosts is not None:  # before anything is started elsewhere
        nodes.counts(config.world, request.nodes, request.hosts)
        run_folder.take(out, Path(args.config).name, say)
    elif request.node == 0:  # before the others are waited for
        nodes.counts(config.world, request.nodes, None)
    with elsewhere(request, ["train"] + _same_everywhere(args), out / "logs") as check:
        party = nodes.Party.join(request, config, say, check)
        calm.watch(party)
        try:
            yield party
        except BaseException as error:
            # What a signal's handler raises inside a library's import or look at a file may come out as something else.
            party.channel.close(calm.reason or error)
            if calm.reason is not None and calm.reason is not error:
                raise calm.reason from None
            raise
        party.channel.close()


def _add_last_words(error: BaseException, remotes: Any) -> None:
    """A host that is gone may have said why."""
    from pipeline_train.control import NodeGone

    if isinstance(error, NodeGone):
        error.args = (str(error) + "." + remotes.last_words(error.node),)


def _same_everywhere(args: argparse.Namespace) -> List[str]:
    found = ["--config", str(args.config)]
    for pair in args.set:
        found += ["--set", pair]
    if args.resume is not None:
        found += ["--resume", "auto"] if args.resume == "auto" else ["--resume"]
    return found + (["--allow-changed-data"] if args.allow_changed_data else [])


def check(party: Any, config: Any, prepared: Any = None) -> None:
    """The preflight of a run on several nodes: of the machines, and again once it is prepared; nothing on one machine. Raises
    NotReady."""
    if party is None:
        return
    from pipeline_train.preflight import Task, check_nodes, check_run

    place, request = party.place, party.request
    task = Task(request.addr, request.port, len(place.ranks), place.ranks[0], config, world=place.world)
    if prepared is None:
        check_nodes(party.channel, task, say)
        return
    resumed = prepared.resume is not None
    check_run(party.channel, task._replace(prepared=not place.shared, shared=place.shared, resumed=resumed), say)


def team(party: Any) -> Tuple[Any, Optional[Dict[str, str]]]:
    """For launch; waits until every node has come so far."""
    if party is None:
        return None, None
    from pipeline_train.team import Team

    addresses = party.addresses()
    party.share()
    return Team(party.place, party.channel), addresses


def bring(party: Any, prepared: Any, wanted: bool) -> None:
    """Before node 0 exports: all files of the checkpoint that it has not, when nodes share no disk. Afterwards the other nodes are
    not needed any more. ``wanted``: node 0's, whether anything is exported."""
    if party is None:
        return
    told: Dict[str, Any] = party.share({"wanted": wanted})
    if told["wanted"] and not party.place.shared:
        from pipeline_train import gather

        gather.bring(party.channel, prepared.out, say, optimizer=False)
    party.channel.close()
