"""``pipedock to-hf``: pipeline weights -> a Hugging Face folder."""

import argparse
import sys
from typing import Any, Dict

HELP = "a run, checkpoint, from-hf folder or HF model -> a Hugging Face folder"


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--input", required=True, metavar="RUN_OR_CHECKPOINT_OR_HF", help="a run means its newest complete checkpoint"
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="where to write; must not exist or be empty")
    parser.add_argument("--target", default="hf", help="whom it is for: hf, tgi-0.8, tgi-3 or vllm (default: hf)")
    parser.add_argument("--dtype", help="fp32, bf16 or fp16 (default: the run's, else the input's)")
    parser.add_argument("--shard-size", default="5GB", metavar="SIZE", help="at most this much per file (default: 5GB)")
    parser.add_argument("--overwrite", action="store_true", help="replace --output if it is an earlier export of pipedock")


def run(args: argparse.Namespace) -> Dict[str, Any]:
    from export.measure import print_progress
    from export.to_hf import to_hf

    document = to_hf(args.input, args.output, target=args.target, dtype=args.dtype, shard_size=args.shard_size,
                     overwrite=args.overwrite, progress=print_progress("to-hf"))  # fmt: skip
    for note in document["notes"]:
        sys.stderr.write("note: %s\n" % note)
    return document


def text(document: Dict[str, Any]) -> str:
    from export.measure import text_of

    step = "" if document["step"] is None else ", step %d" % document["step"]
    about = "wrote %(output)s: %(family)s for %(target)s, %(dtype)s, %(shards)d shard(s)" % document
    return "%s%s%s\n%s" % (about, step, ", tied head" if document["tied"] else "", text_of(document))
