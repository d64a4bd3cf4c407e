"""``pipedock verify``: the proof that an export is the trained model."""

import argparse
from typing import Any, Dict

HELP = "prove an export equal to its checkpoint, against plain transformers; writes proof.json"


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", required=True, metavar="C", help="a run, a checkpoint, a from-hf folder or an HF folder")
    parser.add_argument("--export", required=True, metavar="DIR", help="what `pipedock to-hf` wrote")
    parser.add_argument(
        "--tolerance", type=float, default=1e-5, help="relative to the largest logit or hidden state (default: 1e-5)"
    )


def run(args: argparse.Namespace) -> Dict[str, Any]:
    from export.measure import print_progress
    from export.verify import verify

    return verify(args.checkpoint, args.export, tolerance=args.tolerance, progress=print_progress("verify"))


def text(document: Dict[str, Any]) -> str:
    worst = max(document["layers"], key=lambda row: row["relative"])
    lines = ["%(export)s is the model of %(checkpoint)s" % document]
    lines.append("  %d tensors bit-equal (%s)" % (document["tensors"]["compared"], document["dtype"]))
    lines.append("  logits differ by %.2g of the largest, hidden states by at most %.2g (layer %d), allowed %g"
                 % (document["logits"]["relative"], worst["relative"], worst["layer"], document["tolerance"]))  # fmt: skip
    lines.append("  %d prompts, %d tokens" % (document["prompts"]["rows"], document["prompts"]["tokens"]))
    lines.append("%.1f s, peak memory %.2f GiB; proof.json written" % (document["seconds"], document["peak_gib"]))
    return "\n".join(lines)
