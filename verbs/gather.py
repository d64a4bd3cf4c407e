"""``pipedock gather``: a checkpoint that lies scattered over nodes without a shared disk -> whole in one place."""

import argparse
import os
from pathlib import Path
from typing import Any, Dict

from .progress import say

HELP = "bring the files of a checkpoint that lie on other nodes: to this node over ssh, or to node 0 without"
WAIT_S = 300.0


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--input", required=True, metavar="RUN_OR_CHECKPOINT", help="the same path on every node")
    parser.add_argument("--hostfile", metavar="FILE", type=Path,
                        help="on one node: fetch what is missing from these hosts, by rsync over ssh")  # fmt: skip
    parser.add_argument("--nodes", type=int, metavar="N", help="without ssh: run it on each of the N nodes")
    parser.add_argument("--node-rank", type=int, metavar="R", help="which of them this is, from 0")
    parser.add_argument("--master-addr", metavar="ADDRESS", help="of node 0")
    parser.add_argument("--master-port", type=int, metavar="PORT", help="as for train (29500); the next one is used")
    parser.add_argument("--everywhere", action="store_true", help="make it whole on every node, not only on node 0")
    parser.add_argument("--without-optimizer", action="store_true",
                        help="leave out the optimizer's state: enough for to-hf and verify, not for --resume")  # fmt: skip


def run(args: argparse.Namespace) -> Dict[str, Any]:
    from pipeline_train import nodes
    from pipeline_train.errors import UserError

    joined = [args.nodes, args.node_rank, args.master_addr, args.master_port]
    if args.hostfile is not None and (args.everywhere or any(value is not None for value in joined)):
        raise UserError("--hostfile: fetches over ssh to this node alone; it goes without --nodes and its like")
    if args.hostfile is not None:
        from pipeline_train.gather_ssh import fetch

        return fetch(Path(args.input), args.hostfile, say, not args.without_optimizer)
    if args.nodes == 1:
        raise UserError("--nodes 1: one node has nothing to gather from")
    request = nodes.request(*joined)
    if request is None:
        raise UserError("name the hosts with --hostfile, or run it on every node with --nodes, --node-rank and --master-addr")
    return _join(request, args)


def _join(request: Any, args: argparse.Namespace) -> Dict[str, Any]:
    from pipeline_train.control import Channel
    from pipeline_train.gather import bring

    name = os.uname().nodename
    channel = Channel.open(request.node, request.nodes, request.addr, request.port + 1, name, WAIT_S, say, command=_command(args))
    try:
        document = bring(channel, Path(args.input), say, args.everywhere, not args.without_optimizer)
    except BaseException as error:
        channel.close(error)
        raise
    channel.close()
    return document


def _command(args: argparse.Namespace) -> str:
    """What must be the same on all nodes: they would wait for each other's files for ever. A run lies where its node has it."""
    from pipeline_train.manifest_values import STEP

    name = os.path.basename(args.input.rstrip("/"))
    words = ["pipedock gather", "--input", name if STEP.fullmatch(name) else "RUN"]
    return " ".join(words + ["--everywhere"] * args.everywhere + ["--without-optimizer"] * args.without_optimizer)


def text(document: Dict[str, Any]) -> str:
    from pipeline_train.host import size

    if not document["files"]:
        return "%(checkpoint)s: nothing was missing here" % document
    return "%s: %d files, %s, came in %.1f s" % (
        document["checkpoint"], document["files"], size(document["bytes"]), document["seconds"])  # fmt: skip
