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
    from pipeline_train.errors import UserError

    output = Path(args.output) if args.output else None
    try:
        if output is not None and output.exists() and not output.is_file():
            raise UserError("--output: %s: is no file" % output)  # a device or a folder would be replaced by one
        path = report.write(Path(args.run), output)
        return {"report": str(path), "bytes": path.stat().st_size}
    except OSError as error:
        raise UserError("%.200s: %s" % (error.filename or args.run, error.strerror)) from None


def text(document: Dict[str, Any]) -> str:
    return "%(report)s: %(bytes)d bytes" % document
