"""``pipedock preflight``: can these machines run this, one of them or all together?"""

import argparse
import contextlib
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional

from . import together
from .progress import say

HELP = "check this machine or a cluster before a run: versions, GPUs, limits, network, ports, same files, bandwidth"
MARKS = {"ok": "ok", "note": "-", "warning": "warn", "failure": "FAIL"}
STYLES = {"ok": "green", "note": "dim", "warning": "yellow", "failure": "bold red"}
WAIT_S = 300.0


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", metavar="FILE", help="run.yaml: also whether its files, memory and disk are there")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=C", help="override a key of run.yaml; may be repeated")
    together.add(parser)
    parser.add_argument("--wait", type=float, default=WAIT_S, metavar="S",
                        help="seconds to wait for the other machines (default: %.0f)" % WAIT_S)  # fmt: skip
    parser.add_argument("--no-bandwidth", action="store_true", help="start no ranks that measure it")


def run(args: argparse.Namespace) -> Optional[Dict[str, Any]]:
    from pipeline_train import config, preflight
    from pipeline_train.errors import UserError

    if args.config is None and args.set:
        raise UserError("--set: overrides keys of run.yaml; name one with --config")
    loaded = config.load(args.config, tuple(args.set)) if args.config is not None else None
    try:
        document = _checked(args, loaded)
    except preflight.NotReady as failed:  # every node has found the same
        if not args.json:
            args.answer.write(_shown(failed.document, args.answer) + "\n")
        raise
    if args.json:
        return document
    args.answer.write(_shown(document, args.answer) + "\n")
    return None


def _checked(args: argparse.Namespace, loaded: Any) -> Dict[str, Any]:
    """On this machine, or with the others that the command line names; those of a hostfile are started."""
    from pipeline_train import preflight

    hosts = together.hosts_of(args)
    request = together.request_of(args, hosts)
    task = preflight.Task(run=loaded)
    if request is None:
        task = task._replace(ranks=hosts[0].slots if hosts is not None and loaded is None else None)
        return preflight.preflight(preflight.alone(), task, say, not args.no_bandwidth)
    task = task._replace(addr=request.addr, port=request.port)
    with _folder_for_logs(request.hosts) as logs, together.elsewhere(request, _same_everywhere(args), logs) as check:
        channel = preflight.meet(task, request, args.wait, say, check, _command(args))
        try:
            document = preflight.preflight(channel, preflight.allotted(channel, task, request.hosts), say, not args.no_bandwidth)
        except preflight.NotReady:
            channel.close()
            raise
        except BaseException as error:
            channel.close(error)
            raise
        channel.close()
    return document


def _same_everywhere(args: argparse.Namespace) -> List[str]:
    """The command that every node gets."""
    found = ["preflight", "--wait", str(args.wait)] + (["--no-bandwidth"] if args.no_bandwidth else [])
    if args.config is not None:
        found += ["--config", str(args.config)]
    return found + [word for pair in args.set for word in ("--set", pair)]


def _command(args: argparse.Namespace) -> str:
    """What must be the same on all nodes."""
    return "pipedock preflight" + " --config RUN" * (args.config is not None) + " --no-bandwidth" * args.no_bandwidth


@contextlib.contextmanager
def _folder_for_logs(hosts: Any) -> Iterator[Path]:
    """For what a hostfile's other hosts say; kept when something went wrong."""
    import shutil
    import tempfile

    folder = Path(tempfile.mkdtemp(prefix="pipedock-preflight-")) if hosts is not None else Path()
    yield folder
    if hosts is not None:
        shutil.rmtree(str(folder), ignore_errors=True)


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
