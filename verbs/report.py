"""``pipedock report``: the page of a run, from its folder."""

import argparse
from pathlib import Path
from typing import Any, Dict

HELP = "write a run's report.html again, from what its folder holds"


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--run", required=True, metavar="OUT", help="the run.out of a training")
    parser.add_argument("--output", metavar="FILE", help="where to write it (default: OUT/report.html)")


def run(args: argparse.Namespace) -> Dict[str, Any]:
    from pipeline_train import report

    path = report.write(Path(args.run), Path(args.output) if args.output else None)
    return {"report": str(path), "bytes": path.stat().st_size}


def text(document: Dict[str, Any]) -> str:
    return "%(report)s: %(bytes)d bytes" % document
