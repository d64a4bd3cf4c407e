"""``pipedock migrate``: the ancestor's config becomes a run.yaml."""

import argparse
from pathlib import Path
from typing import Any, Dict

HELP = "gdGPT's ds_config_pp.json or .yml -> run.yaml, saying what could not be carried over"


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", required=True, metavar="FILE", help="the old config, JSON or YAML")
    parser.add_argument(
        "--output", default="run.yaml", metavar="FILE", help="where to write (default: run.yaml); never overwritten"
    )


def run(args: argparse.Namespace) -> Dict[str, Any]:
    from pipeline_train.errors import UserError
    from pipeline_train.migrate import migrate

    source, target = Path(args.config), Path(args.output)
    try:
        text = source.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError("%s: cannot be read: %s" % (source, error)) from None
    new, notes, lost = migrate(text, source.name)
    try:
        with open(target, "x", encoding="utf-8") as file:
            file.write(new)
    except FileExistsError:
        raise UserError("%s: exists already; name another file with --output" % target) from None
    except OSError as error:
        raise UserError("%s: cannot be written: %s" % (target, error.strerror)) from None
    return {"output": str(target), "notes": notes, "not_carried_over": lost}


def text(document: Dict[str, Any]) -> str:
    lines = ["wrote %s" % document["output"]]
    lines += ["  note: %(key)s: %(note)s" % note for note in document["notes"]]
    lines += ["  not carried over: %s" % key for key in document["not_carried_over"]]
    return "\n".join(lines)
