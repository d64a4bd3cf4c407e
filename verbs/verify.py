"""``pipedock verify``: the proof that an export is the trained model."""

import argparse
from typing import Any, Dict, List

HELP = "prove an export equal to its checkpoint, against plain transformers; writes proof.json"


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", required=True, metavar="C", help="a run, a checkpoint, a from-hf folder or an HF folder")
    parser.add_argument("--export", required=True, metavar="DIR", help="what `pipedock to-hf` wrote")
    parser.add_argument(
        "--tolerance", type=float, default=1e-5, help="relative to the largest logit or hidden state (default: 1e-5)"
    )
    parser.add_argument(
        "--no-whole-model", action="store_true", help="layer by layer only, in bounded memory, even if the model fits"
    )


def run(args: argparse.Namespace) -> Dict[str, Any]:
    from export.measure import print_progress
    from export.verify import verify

    whole = False if args.no_whole_model else None
    return verify(args.checkpoint, args.export, tolerance=args.tolerance, progress=print_progress("verify"), whole=whole)


def text(document: Dict[str, Any]) -> str:
    worst = max(document["layers"], key=lambda row: row["relative"])
    lines = ["%(export)s is the model of %(checkpoint)s" % document]
    lines.append("  %d tensors bit-equal (%s)" % (document["tensors"]["compared"], document["dtype"]))
    lines.append("  logits differ by %.2g of the largest, hidden states by at most %.2g (layer %d), allowed %g"
                 % (document["logits"]["relative"], worst["relative"], worst["layer"], document["tolerance"]))  # fmt: skip
    lines += _more(document)
    lines.append("%.1f s, peak memory %.2f GiB; proof.json written" % (document["seconds"], document["peak_gib"]))
    return "\n".join(lines)


def _more(document: Dict[str, Any]) -> List[str]:
    """The export's own dtype, the whole model, and what all of it was computed on."""
    logits, prompts, lines = document["logits"], document["prompts"], []
    narrow = logits.get("narrow")
    if narrow is not None:
        lines.append("  in %s: the same likeliest token %.1f %% of the time, KL %.2g; mean difference %.2g, rounding alone %.2g"
                     % (document["dtype"], 100 * narrow["top1"], narrow["kl"], narrow["mean"], narrow["rounding"]))  # fmt: skip
    elif not document["export_dtype"]["compared"]:
        lines.append("  not computed in %s, which this torch cannot" % document["dtype"])
    whole = document["whole_model"]
    by = "layer by layer" + (
        " and as a whole model" if whole["compared"] else "; the whole model takes %.2f GiB" % whole["needs_gib"]
    )
    return lines + ["  %s; %d prompts, %d tokens, %d of the prompts from the run's data"
                    % (by, prompts["rows"], prompts["tokens"], prompts["of_the_run"])]  # fmt: skip
