"""``pipedock plan``: GPUs needed, memory per stage, balance, bubble and speed, from a config.json alone."""

import argparse
from typing import Any, Dict, List, Optional, Tuple

from . import flags

MODEL_ONLY = {  # options that --config goes without -> run.yaml's keys
    "gpus": "parallel.pipe", "data": "parallel.data", "parts": "parallel.parts", "seq_len": "data.seq_len", "micro": "batch.micro",
    "micro_batches": "batch.global", "optim": "optim.type", "dtype": "model.dtype", "recompute": "parallel.recompute",
    "offload": "parallel.offload", "compile": "run.compile", "fp8": "run.fp8",
}  # fmt: skip
HELP = "what a training run needs: GPUs, memory per stage, balance, bubble, tokens per second"
DEFAULT_GPU = "h100-80g"
COLUMNS = ("weights", "grads", "optimizer", "activations", "buffers", "total")


def add(parser: argparse.ArgumentParser) -> None:
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--config", metavar="FILE", help="run.yaml")
    what.add_argument(
        "--model", metavar="NAME", help="a model folder, a config.json, a hub name, or llama-7b, bloom-7b and what else bench knows"
    )
    parser.add_argument("--set", action="append", default=[], metavar="A.B=C", help="override a key of run.yaml; may be repeated")
    parser.add_argument(
        "--gpu", metavar="NAME", help="v100-32g, t4, a100-80g, h100... (default: what is here, or %s)" % DEFAULT_GPU
    )
    parser.add_argument(
        "--link",
        metavar="NAME",
        help="between stages: nvlink, pcie3 to 5, eth10 to 400, ib100, ib400 (default: the card's usual)",
    )
    parser.add_argument("--mfu", type=float, metavar="F", help="share of the card's peak that arithmetic reaches (default: tabled)")
    model = parser.add_argument_group("with --model")
    model.add_argument("--gpus", type=int, metavar="N", help="stages x replicas (default: as few as hold the model)")
    model.add_argument("--data", type=int, metavar="D", help="replicas of the pipeline (default: 1)")
    model.add_argument("--parts", metavar="LIST", help="layers per stage, such as 1,5,5,5,5,5,5,1 (default: auto)")
    model.add_argument("--seq-len", type=int, metavar="T", help="tokens of a row (default: 2048, or the model's if that is less)")
    model.add_argument("--micro", type=int, metavar="B", help="rows of a micro-batch (default: 1)")
    model.add_argument("--micro-batches", type=int, metavar="M", help="per replica and step (default: 8, or the stages if more)")
    model.add_argument("--optim", choices=["adamw", "lion"], help="default: adamw")
    model.add_argument("--dtype", choices=["bf16", "fp16", "fp32"], help="default: bf16 where the card has it, else fp16")
    model.add_argument("--recompute", choices=flags.RECOMPUTE, help="default: none")
    model.add_argument("--compile", action="store_true", help="blocks through torch.compile (run.compile)")
    model.add_argument("--fp8", action="store_true", help="two of three products of the blocks in fp8 (run.fp8)")
    model.add_argument("--offload", action="store_true", help="optimizer in host memory")


def run(args: argparse.Namespace) -> Dict[str, Any]:
    from pipeline_train.plan import plan

    gpu, note = _gpu(args.gpu)
    model, wish = _from_config(args) if args.config else _from_options(args)
    document = plan(model, gpu=gpu, link=args.link, mfu=args.mfu, **wish)
    document["notes"][:0] = note
    return document


def _gpu(named: Optional[str]) -> Tuple[str, List[str]]:
    """-> (the card to plan for, a note when nobody chose it)."""
    if named is not None:
        return named, []
    from pipeline_train.plan import card_here

    here = card_here()
    return (here, []) if here else (DEFAULT_GPU, ["no known GPU here: planned for %s; name yours with --gpu" % DEFAULT_GPU])


def _from_config(args: argparse.Namespace) -> Tuple[Any, Dict[str, Any]]:
    """run.yaml -> (Dims, arguments of plan)."""
    from pathlib import Path

    from pipeline_train import config, families
    from pipeline_train.data.store import default_seq_len
    from pipeline_train.errors import UserError

    given = [option for option in MODEL_ONLY if getattr(args, option)]
    if given:
        option, key = given[0].replace("_", "-"), MODEL_ONLY[given[0]]
        raise UserError("--%s: run.yaml says it; change it there, or with --set %s=..." % (option, key))
    loaded, where = config.load(args.config, tuple(args.set)), Path(args.config).name
    raw = config_json(loaded.model.path)
    dims = families.dims_of(raw)
    config.check_against_model(loaded, dims.layers, dims.max_positions, where)
    parallel, seq_len = loaded.parallel, loaded.data.seq_len or default_seq_len(raw, dims)
    return dims, {
        "gpus": loaded.world, "parts": parallel.parts, "seq_len": seq_len, "micro": loaded.batch.micro, "data": parallel.data,
        "micro_batches": loaded.micro_batches, "dtype": None if loaded.model.dtype == "auto" else loaded.model.dtype,
        "optim": loaded.optim.type, "recompute": parallel.recompute, "offload": parallel.offload,
        "compile": loaded.run.compile, "fp8": loaded.run.fp8, "from_file": True,
    }  # fmt: skip


def _from_options(args: argparse.Namespace) -> Tuple[Any, Dict[str, Any]]:
    """--model and its options -> (Dims, arguments of plan)."""
    import os

    from bench import shapes
    from pipeline_train import families
    from pipeline_train.errors import UserError

    if args.set:
        raise UserError("--set: overrides keys of run.yaml; with --model use the options")
    known = {} if os.path.exists(args.model) else shapes.SHAPES
    dims = families.dims_of(known[args.model] if args.model in known else config_json(args.model))
    wish = {name: getattr(args, name) for name in ("gpus", "data", "micro", "micro_batches", "optim", "dtype", "recompute")}
    wish = {name: value for name, value in wish.items() if value is not None}
    wish["seq_len"] = min(2048, dims.max_positions or 2048) if args.seq_len is None else args.seq_len
    if args.parts is not None and args.parts != "auto":
        try:
            wish["parts"] = [int(number) for number in args.parts.strip("[]").split(",")]
        except ValueError:
            raise UserError("--parts: expected layers per stage such as 1,5,5,1 or auto, got %r" % args.parts) from None
    return dims, dict(wish, offload=args.offload, compile=args.compile, fp8=args.fp8)


def config_json(model: str) -> Dict[str, Any]:
    """The config.json of a folder, a run or checkpoint, a file, or of a hub name; of the hub only that file is fetched."""
    import os

    from pipeline_train import families, hub, manifest

    if os.path.isdir(model):
        if manifest.is_layer_folder(model) or os.path.isdir(os.path.join(model, "checkpoints")):
            model = str(manifest.find_checkpoint(model))
        return families.read_config(model)
    return families.read_config(model if os.path.exists(model) or model.endswith(".json") else hub.config_of(model))


def text(document: Dict[str, Any]) -> str:
    head = "%(family)s, %(layers)d layers, %%.1f B parameters; %(gpus)d x %(gpu)s: %(pipe)d stages x %(data)d replicas"
    head += ", %(dtype)s, %(optim)s%%s, rows of %(seq_len)d, micro-batch %(micro)d x %(micro_batches)d"
    extras = {"none": "", "selective": ", recompute selective", "blocks": ", recompute"}[document["recompute"]]
    extras += ", offload" if document["offload"] else ""
    extras += (", compiled" if document["compile"] else "") + (", fp8" if document["fp8"] else "")
    lines = [head % document % (document["params"] / 1e9, extras), "", _line("stage", "layers", "params", "FLOPs", *COLUMNS)]
    for number, stage in enumerate(document["stages"]):
        first, last = stage["layers"]
        share, params = "%.1f %%" % (100 * stage["flop_share"]), "%.0f M" % (stage["params"] / 1e6)
        lines.append(_line(number, "%d-%d" % (first, last), params, share, *("%.2f" % stage["gib"][c] for c in COLUMNS)))
    limit = "GiB; a card has %(card_gib).1f: %(limit_gib).1f beside %(context_gib).1f of context and a reserve of %(reserve_gib).1f"
    lines += ["", limit % document, "parts: %s" % document["parts"]]
    least = "no number holds it" if document["min_gpus"] is None else document["min_gpus"]
    lines.append("GPUs needed: %s%s" % (least, "" if document["fits"] else " (this plan does not fit)"))
    rate = "about %(tokens_per_s).0f tokens/s, %(step_s).2f s a step (arithmetic at %(mfu).2f of the peak, %(mfu_source)s)"
    lines.append("bubble %.1f %%; " % (100 * document["bubble"]) + rate % document)
    if document["pipe"] > 1:
        lines.append("between stages: %.1f MiB a micro-batch over %s, %.1f ms"
                     % (document["boundary_mib"], document["link"], 1e3 * document["boundary_s"]))  # fmt: skip
    return "\n".join(lines + ["note: %s" % note for note in document["notes"]])


def _line(*cells: Any) -> str:
    widths = (5, 9, 9, 7) + tuple(max(8, len(name)) for name in COLUMNS)
    return "  ".join(str(cell).rjust(width) for cell, width in zip(cells, widths))
