"""``pipedock preflight``: can these machines run this, one of them or all together?"""

import argparse
from typing import Any, Dict, List, Optional

from .progress import say

HELP = "check this machine or a cluster before a run: versions, GPUs, limits, network, ports, same files, bandwidth"
MARKS = {"ok": "ok", "note": "-", "warning": "warn", "failure": "FAIL"}
STYLES = {"ok": "green", "note": "dim", "warning": "yellow", "failure": "bold red"}
WAIT_S = 300.0


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", metavar="FILE", help="run.yaml: also whether its files, memory and disk are there")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=C", help="override a key of run.yaml; may be repeated")
    several = parser.add_argument_group("several nodes: this command on each of them")
    several.add_argument("--nodes", type=int, metavar="N", help="how many there are")
    several.add_argument("--node-rank", type=int, metavar="R", help="the number of this one, 0 to N - 1")
    several.add_argument("--master-addr", metavar="A", help="the address of node 0 that all nodes reach")
    several.add_argument(
        "--master-port", type=int, metavar="P", help="a free port there, the next one is used too (default: 29500)"
    )
    several.add_argument(
        "--wait", type=float, default=WAIT_S, metavar="S", help="seconds to wait for the others (default: %.0f)" % WAIT_S
    )
    parser.add_argument(
        "--no-bandwidth", action="store_true", help="leave out the part that starts ranks; seconds instead of a minute"
    )


def run(args: argparse.Namespace) -> Optional[Dict[str, Any]]:
    from pipeline_train import preflight
    from pipeline_train.control import Channel

    task = _task(args)
    nodes, node = args.nodes or 1, args.node_rank or 0
    channel: Optional[Channel] = None
    error: Optional[BaseException] = None
    try:
        channel = preflight.meet(task, node, nodes, args.wait, say)
        document = preflight.preflight(channel, task, say, measure_bandwidth=not args.no_bandwidth)
    except preflight.NotReady as failed:  # every node has found the same
        if not args.json:
            args.answer.write(_shown(failed.document, args.answer) + "\n")
        raise
    except BaseException as other:
        error = other
        raise
    finally:
        if channel is not None:
            channel.close(error)
    if args.json:
        return document
    args.answer.write(_shown(document, args.answer) + "\n")
    return None


def _task(args: argparse.Namespace) -> Any:
    from pipeline_train import config, preflight
    from pipeline_train.errors import UserError

    given = {"--nodes": args.nodes, "--node-rank": args.node_rank, "--master-addr": args.master_addr}
    missing = [name for name, value in given.items() if value is None]
    if 0 < len(missing) < len(given):
        raise UserError("%s: goes with %s" % (", ".join(n for n in given if n not in missing), ", ".join(missing)))
    if missing and args.master_port is not None:
        raise UserError("--master-port: goes with --nodes, --node-rank and --master-addr")
    if not missing and not 0 <= args.node_rank < args.nodes:
        raise UserError("--node-rank: must be between 0 and %d (--nodes %d), got %d" % (args.nodes - 1, args.nodes, args.node_rank))
    port = 29500 if args.master_port is None else args.master_port
    if not 1 <= port <= 65534:
        raise UserError("--master-port: must be between 1 and 65534, got %d" % port)
    if args.config is None and args.set:
        raise UserError("--set: overrides keys of run.yaml; name one with --config")
    loaded = config.load(args.config, tuple(args.set)) if args.config is not None else None
    task = preflight.Task(port=port, run=loaded)
    if missing or args.nodes == 1:
        return task
    return preflight.share_of(task._replace(addr=args.master_addr), args.node_rank, args.nodes)


def _shown(document: Dict[str, Any], answer: Any) -> str:
    if not answer.isatty():
        return text(document)
    import io
    import shutil

    from rich.console import Console

    width = shutil.get_terminal_size().columns
    console = Console(file=io.StringIO(), force_terminal=True, width=width)
    for table in _tables(document):
        console.print(table)
    return console.file.getvalue().rstrip("\n")  # type: ignore[attr-defined]


def _tables(document: Dict[str, Any]) -> List[Any]:
    """One for each node, one for what is between them."""
    from rich.table import Table
    from rich.text import Text

    tables = []
    for title, rows in _groups(document):
        table = Table(title=title, title_justify="left", show_header=False, box=None, padding=(0, 1))
        for row in rows:
            said = Text(row["said"])
            if row["fix"]:
                said.append("\nfix: " + row["fix"], style="bold")
            table.add_row(Text(MARKS[row["level"]], style=STYLES[row["level"]]), Text(row["check"], style="cyan"), said)
        tables.append(table)
    return tables


def _groups(document: Dict[str, Any]) -> List[Any]:
    names, rows = document["names"], document["findings"]
    groups = [("node %d (%s)" % (node, name), [row for row in rows if row["node"] == node]) for node, name in enumerate(names)]
    return groups + (
        [("together", [row for row in rows if row["node"] is None])] if any(row["node"] is None for row in rows) else []
    )


def text(document: Dict[str, Any]) -> str:
    lines = []
    for title, rows in _groups(document):
        lines.append(title)
        for row in rows:
            lines.append("  %-4s  %-15s  %s" % (MARKS[row["level"]], row["check"], row["said"]))
            if row["fix"]:
                lines.append("  %-4s  %-15s  fix: %s" % ("", "", row["fix"]))
    return "\n".join(lines + ["ready" if document["ok"] else "not ready"])
