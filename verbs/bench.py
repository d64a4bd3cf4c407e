"""``pipedock bench``: how fast, measured here, with peers side by side."""

import argparse
from typing import Any, Dict, List, Tuple

from . import flags
from .progress import say

HELP = "measure on this machine, with peers side by side: train, serve, convert"
OPTIONS = {  # run.yaml's keys in what is refused -> ours
    "model.dtype: ": "--dtype ", "model.dtype": "--dtype", "run.fp8": "--fp8", "run.compile": "--compile",
    "parallel.pipe": "--pipe", "parallel.data": "--data", "parallel.recompute: ": "--recompute ", "batch.micro": "--micro",
    "data.seq_len": "--seq-len",
}  # fmt: skip


def add(parser: argparse.ArgumentParser) -> None:
    what = parser.add_subparsers(dest="what", metavar="WHAT", required=True)
    train = what.add_parser("train", help="a step of training through the real engine: tokens/s, MFU, memory")
    train.add_argument("--model", metavar="NAME", help="llama-7b, bloom-7b, ..., a config.json or a model folder "
                       "(default: eight blocks of llama-7b on a GPU, llama-tiny on a CPU)")  # fmt: skip
    train.add_argument("--blocks", type=int, metavar="N", help="transformer blocks, in place of the model's: a stage of it")
    train.add_argument("--config", metavar="RUN", help="run.yaml: measure that run, its own data included")
    train.add_argument("--set", action="append", default=[], metavar="A.B=C", help="override a key of run.yaml; may be repeated")
    train.add_argument("--seq-len", type=int, default=1024, metavar="T", help="default 1024")
    train.add_argument("--micro", type=int, default=4, metavar="B", help="rows of a micro-batch; default 4")
    train.add_argument("--micro-batches", type=int, default=16, metavar="M", help="of a step and replica; default 16")
    train.add_argument("--documents", type=int, default=212, metavar="N",
                       help="tokens of a document on average (alpaca: 212, the default); 0: full rows")  # fmt: skip
    train.add_argument("--pipe", type=int, default=1, metavar="P", help="stages; default 1")
    train.add_argument("--data", type=int, default=1, metavar="D", help="replicas; default 1")
    train.add_argument("--dtype", choices=["bf16", "fp16", "fp32"], help="default: bf16 on a GPU, fp32 on a CPU")
    train.add_argument("--recompute", choices=flags.RECOMPUTE, default="none")
    train.add_argument("--optim", choices=["adamw", "lion"], default="adamw")
    train.add_argument("--compile", action="store_true", help="run.compile")
    train.add_argument("--fp8", action="store_true", help="run.fp8")
    train.add_argument("--steps", type=int, default=3, metavar="N", help="that are timed; default 3")
    train.add_argument(
        "--peers", action="store_true", help="also the ancestor's way and transformers alone, or ZeRO-3 and FSDP2 (and compiled)"
    )
    convert = what.add_parser("convert", help="from-hf and to-hf of a synthetic model against cp of the same files")
    convert.add_argument("--model", default="llama-tiny", metavar="NAME", help="as for train; default llama-tiny")
    convert.add_argument("--blocks", type=int, metavar="N")
    convert.add_argument("--dir", metavar="DIR", help="where to work: four times the model's size (default: the temporary folder)")
    convert.add_argument("--verify", action="store_true", help="also the proof, layer by layer")
    serve = what.add_parser("serve", help="the embedded server with few streams and many, beside transformers' generate")
    serve.add_argument("--model", default="llama-tiny", metavar="NAME", help="a model folder, or as for train with random weights")
    serve.add_argument("--blocks", type=int, metavar="N")
    serve.add_argument("--streams", default="1,16", metavar="LIST", help="default 1,16")
    serve.add_argument("--new-tokens", type=int, default=128, metavar="N", help="of the longest answer; default 128")
    serve.add_argument("--seconds", type=float, default=10.0, metavar="S", help="for each number of streams; default 10")
    serve.add_argument("--dtype", metavar="D", help="of the server: float32, bfloat16, float16 (default: its own choice)")
    serve.add_argument("--peers", action="store_true", help="also generate: one prompt at a time, and static batches")
    for one in (train, serve, convert):
        one.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)


def run(args: argparse.Namespace) -> Dict[str, Any]:
    if args.what == "convert":
        from bench.convert import bench as convert
        from bench.shapes import model_of

        return {"what": "convert", "rows": convert(model_of(args.model, args.blocks), args.dir, args.verify, say)}
    return _serve(args) if args.what == "serve" else _train(args)


def _serve(args: argparse.Namespace) -> Dict[str, Any]:
    import tempfile
    from pathlib import Path

    from bench.serve import bench
    from bench.servers import random_model
    from bench.shapes import SHAPES, model_of
    from pipeline_train.errors import UserError
    from serve.settings import DTYPES

    if args.dtype not in (None, *DTYPES, *DTYPES.values()):
        raise UserError("--dtype %s: expected one of %s" % (args.dtype, ", ".join([*DTYPES, *DTYPES.values()])))
    try:
        streams = [int(word) for word in args.streams.split(",")]
    except ValueError:
        streams = []
    if not streams or min(streams) < 1:
        raise UserError("--streams %s: expected numbers of streams, such as 1,16" % args.streams)
    if args.new_tokens < 1 or not args.seconds > 0:
        raise UserError("--new-tokens, --seconds: must be more than 0")
    flags = ["--max-concurrent-requests", str(max(128, 2 * max(streams)))] + (
        ["--dtype", DTYPES.get(args.dtype, args.dtype)] if args.dtype else []
    )
    with tempfile.TemporaryDirectory(prefix="bench-serve-") as scratch:
        folder = Path(args.model)
        if args.model in SHAPES or not folder.is_dir():
            folder = Path(scratch) / "model"
            random_model(folder, model_of(args.model, args.blocks))
        return {"what": "serve", "rows": bench(folder, streams, args.new_tokens, args.seconds, args.peers, say, flags)}


def _train(args: argparse.Namespace) -> Dict[str, Any]:
    from bench.train import bench, checked
    from pipeline_train.errors import UserError

    for name in ("seq_len", "micro", "micro_batches", "pipe", "data", "steps"):
        if getattr(args, name) < 1:
            raise UserError("--%s %d: must be at least 1" % (name.replace("_", "-"), getattr(args, name)))
    for name in ("model", "blocks"):
        if args.config is not None and getattr(args, name) is not None:
            raise UserError("--%s: not with --config, which measures the model of that run; leave one of them out" % name)
    if args.documents < 0:
        raise UserError("--documents %d: must be 0 or more" % args.documents)
    try:
        case, cuda = checked(_case(args), say)
    except UserError as error:
        if args.config is not None:
            raise
        text = str(error)
        for key, option in OPTIONS.items():
            text = text.replace(key, option)
        raise UserError(text) from None
    return {"what": "train", "rows": bench(case, args.peers, cuda, say)}


def _case(args: argparse.Namespace) -> Any:
    from bench.shapes import model_of
    from bench.task import Case

    if args.config is not None:
        from bench.of_run import case_of

        return case_of(args.config, tuple(args.set), args.steps, say)
    from bench.rows import drawn

    model, blocks = args.model, args.blocks
    if model is None:
        from pipeline_train.plan import card_here

        model, blocks = ("llama-7b", blocks or 8) if card_here() else ("llama-tiny", blocks)
    return Case(
        "ours", model_of(model, blocks), args.seq_len, args.micro, args.micro_batches, args.pipe, args.data,
        dtype=args.dtype or "auto", recompute=args.recompute, compile=args.compile, fp8=args.fp8, optim=args.optim,
        steps=args.steps, documents=drawn(args.documents, args.seq_len),
    )  # fmt: skip


def text(document: Dict[str, Any]) -> str:
    rows = document["rows"]
    tables = {"train": _train_table, "serve": _serve_table, "convert": _convert_table}
    return table(*tables[document["what"]](rows))


def _train_table(rows: List[Dict[str, Any]]) -> Tuple[List[str], List[List[str]]]:
    head = ["engine", "micro", "tokens/s", "learnt tokens/s", "with padding", "MFU", "GiB", "step s", "ours is"]
    body = []
    for row in rows:
        if "error" in row:
            body.append([row["engine"], str(row["micro"]), row["error"]])
            continue
        mfu = "-" if row["mfu"] is None else "%.3f" % row["mfu"]
        rates = ["%.0f" % row[key] for key in ("tokens_per_s", "learnt_tokens_per_s", "positions_per_s")]
        body.append([row["engine"], str(row["micro"]), *rates, mfu, "%.2f" % max(row["gib"]), "%.3f" % row["step_s"],
                     "%.2f x" % row["ratio"]])  # fmt: skip
    return head, body


def _serve_table(rows: List[Dict[str, Any]]) -> Tuple[List[str], List[List[str]]]:
    head, body = ["what", "streams", "tokens/s", "first token s", "of generate's one"], []
    for row in rows:
        first, ratio = row["first_token_s"], row.get("ratio")
        body.append([row["what"], str(row["streams"]), "%.1f" % row["tokens_per_s"], "-" if first is None else "%.3f" % first,
                     "-" if ratio is None else "%.2f x" % ratio])  # fmt: skip
    return head, body


def _convert_table(rows: List[Dict[str, Any]]) -> Tuple[List[str], List[List[str]]]:
    head = ["what", "s", "GB/s", "of cp", "GiB beyond imports"]
    return head, [[row["what"], "%.2f" % row["seconds"], "%.3f" % row["gb_per_s"], "%.2f" % row["of_cp"],
                   "%.2f" % row["peak_gib_over_imports"]] for row in rows]  # fmt: skip


def table(head: List[str], body: List[List[str]]) -> str:
    """Columns as wide as their widest cell; short rows end early."""
    widths = [max([len(head[n])] + [len(row[n]) for row in body if len(row) == len(head)]) for n in range(len(head))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in [head] + body)
