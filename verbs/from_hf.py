"""``pipedock from-hf``: Hugging Face weights -> layer files of the pipeline."""

import argparse
from typing import Any, Dict

HELP = "Hugging Face weights -> pipeline weights, one file per layer, bit-equal"


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--input", required=True, metavar="HUB_OR_DIR", help="an HF folder (safetensors or .bin) or a hub name")
    parser.add_argument("--output", required=True, metavar="DIR", help="where to write; must not exist or be empty")


def run(args: argparse.Namespace) -> Dict[str, Any]:
    from export.from_hf import from_hf
    from export.measure import print_progress

    return from_hf(args.input, args.output, progress=print_progress("from-hf"))


def text(document: Dict[str, Any]) -> str:
    from export.measure import text_of

    about = "wrote %(output)s: %(family)s, %(layers)d layer files, %(dtype)s" % document
    return "%s%s\n%s" % (about, ", tied head" if document["tied"] else "", text_of(document))
