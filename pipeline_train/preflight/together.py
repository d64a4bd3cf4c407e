"""All checks of one node or of all of them: measured on every node, exchanged, judged from the same facts everywhere."""

import os
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence

from .. import config, families, identity, manifest, network
from ..config_schema import RunConfig
from ..control import Channel
from ..errors import RunFailed, UserError
from ..hostfile import Host
from ..nodes import Request, counts
from . import bandwidth, clocks, gpus, machine, wires
from .finding import FAILURE, NOTE, OK, WARNING, Facts, Finding, NotReady, at, lines
from .need import need

Say = Callable[[str], None]  # takes a line for the user


class Task(NamedTuple):
    """What the nodes are going to do. ``addr``: node 0's, None where there is one node only; ``port``: of the ranks there.

    ``ranks``: processes on this node, the first of them ``first``; None: as many as it has GPUs. ``run``: None where only the
    machines are looked at. ``prepared``: its data is encoded, in run.out. ``shared``: run.out is one folder that all nodes see.
    ``resumed``: the weights are a checkpoint's. ``world``: all processes, where ``run`` does not say it."""

    addr: Optional[str] = None
    port: int = 29500
    ranks: Optional[int] = None
    first: int = 0
    run: Optional[RunConfig] = None
    prepared: bool = False
    shared: bool = False
    resumed: bool = False
    world: Optional[int] = None


def check_nodes(channel: Channel, task: Task, say: Say) -> None:
    """The first thing of a run on several nodes; all of them call it. The machines and what is between them, in seconds: neither
    bandwidth nor ``task.run``. Warnings go to ``say``, at node 0 those of all nodes. Raises NotReady, a UserError with all failures
    in its line, on every node."""
    _tell(preflight(channel, task._replace(run=None), say, measure_bandwidth=False), channel.node, say)


def check_run(channel: Channel, task: Task, say: Say) -> None:
    """When ``task.run`` is prepared; all nodes call it. Is it the same everywhere, and is there room for it? Otherwise like
    ``check_nodes``."""
    rows = channel.exchange({"facts": measure(task), "identity": _identity(task, say)})
    everyone = [row["facts"] for row in rows]
    findings = [finding for node, row in enumerate(everyone) for finding in at(node, machine.check_run(row) + gpus.check(row))]
    findings += check_identity([row["identity"] for row in rows], channel.names)
    _tell(judged(findings, channel.names, everyone), channel.node, say)


def _tell(document: Dict[str, Any], node: int, say: Say) -> None:
    findings = [Finding(**row) for row in document["findings"]]
    for line in lines([one for one in findings if node in (0, one.node)], WARNING, document["names"]):
        say("preflight: %s" % line)
    say("preflight: passed: %s" % ", ".join(dict.fromkeys(one.check for one in findings if one.level in (OK, NOTE))))


def preflight(channel: Channel, task: Task, say: Say, measure_bandwidth: bool = True) -> Dict[str, Any]:
    """{"ok", "names": of the nodes, "findings": [Finding as a dict], "facts": by node, "bandwidth"}; all nodes call it, and get the
    same. Raises NotReady with this document when a check has failed."""
    facts = measure(task)
    sought = _identity(task, say) if channel.nodes > 1 else {}
    nodes = channel.exchange({"facts": facts, "identity": sought})
    everyone = [row["facts"] for row in nodes]
    findings = [finding for node, row in enumerate(everyone) for finding in at(node, here(row))]
    measured = None
    if channel.nodes > 1:
        findings += gpus.check_same(everyone) + check_identity([row["identity"] for row in nodes], channel.names)
        findings += _between(channel, task, facts)
    healthy = not any(finding.level == FAILURE for finding in findings)
    if measure_bandwidth and healthy:
        port = task.port if channel.nodes > 1 else network.free_port()
        measured = bandwidth.measure(channel, task.addr or "127.0.0.1", port, facts)
        findings += bandwidth.check(measured)
    return judged(findings, channel.names, everyone, measured)


def _between(channel: Channel, task: Task, facts: Facts) -> List[Finding]:
    """What only nodes together can measure; node 0 has the clocks."""
    assert task.addr is not None, "several nodes meet at an address"
    samples = clocks.measure(channel)
    rows = wires.reach(channel, task.addr, task.port, facts["network"]["source"])
    told = channel.exchange({"clocks": samples})
    return clocks.check(told[0]["clocks"]) + wires.check_reach(rows, channel.names, task.addr, task.port)


def judged(
    findings: Sequence[Finding], names: Sequence[str], facts: Sequence[Facts], measured: Optional[Dict[str, Any]] = None
) -> Dict[str, Any]:
    """The document. Raises NotReady."""
    failed = any(finding.level == FAILURE for finding in findings)
    document = {
        "ok": not failed, "names": list(names), "findings": [finding.document() for finding in findings], "facts": list(facts),
        "bandwidth": measured,
    }  # fmt: skip
    if failed:
        raise NotReady(document)
    return document


def measure(task: Task) -> Facts:
    """Of this node alone; JSON."""
    run = task.run
    facts = machine.measure(Path(run.run.out) if run is not None else None)
    facts.update(
        name=os.uname().nodename,
        gpus=gpus.measure(),
        network=wires.measure(task.addr),
        ranks=task.ranks,
        need=None,
        files={},
        weights="",
        world=run.world if run is not None else task.world,
    )
    if run is None:
        return facts
    facts["files"] = _missing(task)
    model = folder_of(run.model.path)
    if model is not None and (model / "config.json").is_file():
        raw = families.read_config(str(model))
        dims = families.dims_of(raw)
        config.check_against_model(run, dims.layers, dims.max_positions)
        if run.model.init == "pretrained" and not task.resumed and facts["versions"].get("torch"):
            facts["weights"] = _wrong_weights(model)
        ranks = run.world if task.ranks is None else task.ranks
        facts["need"] = need(run, dims, raw, gpus.number(facts) > 0, task.first, ranks)
        facts["ranks"] = ranks
    return facts


def here(facts: Facts) -> List[Finding]:
    """All checks of one node's own facts."""
    return machine.check(facts) + gpus.check(facts) + wires.check_interface(facts)


def folder_of(path: str) -> Optional[Path]:
    """model.path's folder, a run's newest checkpoint; None for a hub name, and what is not there."""
    folder = Path(path)
    if not os.path.isdir(path):
        return None
    if manifest.is_layer_folder(folder) or (folder / "checkpoints").is_dir():
        return manifest.find_checkpoint(folder)
    return folder


def _wrong_weights(model: Path) -> str:
    """Why training cannot start from the folder's weights, "" where it can; their headers are read."""
    from .. import weights  # torch

    try:
        weights.open_source(str(model)).check()
    except UserError as error:
        return str(error)
    return ""


def _missing(task: Task) -> Dict[str, str]:
    """{key: path} of run.yaml's files that are not on this node."""
    assert task.run is not None
    data = task.run.data
    named = [("model.path", task.run.model.path)]
    if not task.shared:
        named += [("data.train", data.train)] + ([("data.eval", data.eval)] if data.eval is not None else [])
    return {key: path for key, path in named if not os.path.exists(path)}


def _identity(task: Task, say: Say) -> Dict[str, str]:
    if task.run is None:
        return {**identity.code(), **identity.versions()}
    model = None if task.resumed else folder_of(task.run.model.path)
    out = Path(task.run.run.out) if task.prepared else None
    return identity.identity(task.run, say, model, out, data=not task.shared)


def check_identity(documents: Sequence[Dict[str, str]], names: Sequence[str]) -> List[Finding]:
    """Code, versions, configuration, data and weights."""
    found = []
    for line in identity.differences(documents, names):
        said, _, fix = line.partition("; ")
        found.append(Finding("same everywhere", FAILURE, said, fix))
    told = ["%s %s" % pair for pair in sorted(identity.digests(documents[0]).items())]
    return found or [Finding("same everywhere", OK, ", ".join(told))]


def alone() -> Channel:
    """To nobody."""
    return Channel(0, 1, os.uname().nodename)


def meet(task: Task, request: Request, wait_s: float, say: Say, check: Callable[[], None], command: str) -> Channel:
    """The channel to the other nodes, see control.Channel.open. Raises NotReady, with what is to say of this node alone, when they
    do not come; UserError for launchers that do not belong together."""
    node, nodes, port = request.node, request.nodes, request.port + 1
    try:
        return Channel.open(node, nodes, request.addr, port, os.uname().nodename, wait_s, say, check, command)
    except RunFailed as error:
        facts = measure(task)
        fix = "start pipedock preflight there too; let port %d of node 0 through: sudo ufw allow %d/tcp" % (port, port)
        everyone: List[Facts] = [{}] * nodes
        everyone[node] = facts
        missing = Finding("ports", FAILURE, str(error).partition(". ")[0], fix, node)
        judged(at(node, here(facts)) + [missing], [row.get("name", "?") for row in everyone], everyone)
        raise AssertionError("a failure is judged as one") from error


def allotted(channel: Channel, task: Task, hosts: Optional[List[Host]]) -> Task:
    """With the ranks that this node will get, as train gives them; ``hosts``: node 0's hostfile, whose names the nodes take. All
    nodes call it. Raises UserError."""
    told: Dict[str, Any] = {}
    if channel.node == 0:
        ranks = [host.slots for host in hosts] if hosts is not None else None
        ranks = counts(task.run.world, channel.nodes, hosts) if task.run is not None else ranks
        told = {"ranks": ranks, "names": [host.name for host in hosts] if hosts is not None else channel.names}
    told = channel.exchange(told)[0]
    channel.rename(told["names"])
    if told["ranks"] is None:
        return task
    return task._replace(ranks=told["ranks"][channel.node], first=sum(told["ranks"][: channel.node]))
