"""``pipedock prove``: a live server compared with training and with transformers."""

import argparse
from typing import Any, Dict

from . import api_key, flags
from .progress import say

HELP = "prove a live server: token ids as trained, log-probabilities as transformers', stops where it should"

SHOWN = 5  # failures of one check
FIGURES = {
    "trained ids": "%(compared)d %(of)s of %(records)d records, as in %(from)s",
    "the folder's token ids": "%(compared)d %(of)s",
    "token ids": "%(compared)d %(of)s of %(prompts)d prompts, %(bos)s; by %(by)s",
    "chat token ids": "%(compared)d %(of)s of %(prompts)d conversations",
    "prompt log-probabilities": "%(compared)d %(of)s, largest difference %(largest).2g, mean %(mean).2g "
    "(allowed: %(allowed).2g, %(allowed_mean).2g)",
    "greedy answers": "%(compared)d %(of)s of %(answers)d answers, %(ties)d ties, largest difference %(largest).2g",
    "end of sequence": "%(compared)d of %(asked)d answers ended, by %(stop_tokens)s",
}


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--url", required=True, type=flags.url, metavar="U", help="the server, as pipedock serve prints it")
    parser.add_argument("--model", required=True, metavar="DIR", help="the model folder that it serves")
    parser.add_argument("--train-config", metavar="FILE", help="run.yaml: ask with the run's own records; else a few fixed ones")
    parser.add_argument("--records", type=int, default=6, metavar="N", help="how many records are asked (default: 6)")
    parser.add_argument("--new-tokens", type=int, default=16, metavar="N", help="length of each greedy answer (default: 16)")
    parser.add_argument(
        "--tolerance",
        type=float,
        metavar="T",
        help="nats that log-probabilities may differ by (default: 0.001, or 0.02 in 16 bits)",
    )
    parser.add_argument("--dtype", metavar="D", help="what the server computes in, if it does not tell: float32, float16, bfloat16")
    parser.add_argument("--no-prompt-logprobs", action="store_true", help="for a server that tells none: leave this comparison out")
    parser.add_argument("--no-weights", action="store_true", help="compare token ids and ends only; the model is not loaded here")
    parser.add_argument("--api-key-file", metavar="F", help="file with the server's API key")
    parser.add_argument(
        "--timeout", type=flags.seconds, default=120.0, metavar="S", help="seconds to wait for the next byte; default 120"
    )
    parser.add_argument("--output", metavar="F", help="write the document (that of --json) to this file; default: to none")


def run(args: argparse.Namespace) -> Dict[str, Any]:
    from pipeline_train.errors import RunFailed
    from serve.prove import Options, prove

    options = Options(
        records=args.records, new_tokens=args.new_tokens, tolerance=args.tolerance, dtype=args.dtype,
        prompt_logprobs=not args.no_prompt_logprobs, weights=not args.no_weights, api_key=api_key.read(args.api_key_file),
        timeout=args.timeout, output=args.output,
    )  # fmt: skip
    try:
        return prove(args.url.rstrip("/"), args.model, args.train_config, options, say=say)
    except RunFailed as error:
        if "checks" in error.document and not args.json:
            args.answer.write(text(error.document) + "\n")
        raise


def text(document: Dict[str, Any]) -> str:
    like = "as trained" if any(check["name"] == "trained ids" for check in document["checks"]) else "as it is"
    says = "serves" if document["holds"] else "does NOT serve"
    lines = ["%s (%s) %s %s %s" % (document["url"], document["server"], says, document["model"], like)]
    for check in document["checks"]:
        said = {True: "ok", False: "WRONG", None: "not shown"}[check["holds"]]
        lines.append("  %-26s %-9s %s" % (check["name"], said, _figures(check)))
        lines += ["    " + failure for failure in check["failures"][:SHOWN]]
        lines += ["    ... and %d more" % (len(check["failures"]) - SHOWN)] if len(check["failures"]) > SHOWN else []
    lines += ["  note: " + note for note in document["notes"]]
    lines.append("%d of %s, %.1f s" % (len(document["records"]), document["records_of"], document["seconds"]))
    return "\n".join(lines)


def _figures(check: Dict[str, Any]) -> str:
    """A check's own figures in a few words."""
    form = FIGURES[check["name"]]
    if check["compared"] == 0 and check.get("why"):
        form = "%(why)s"
    words = {"by": " and ", "stop_tokens": " or "}
    return form % {name: words[name].join(value) if name in words else value for name, value in check.items()}
