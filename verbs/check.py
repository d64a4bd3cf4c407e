"""``pipedock check``: every reason why a server cannot load a model, before any container starts."""

import argparse
from typing import Any, Dict, List, Optional, Tuple

HELP = "whether TGI or vLLM can serve this model on these cards: every reason why not, or what it will use"


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", required=True, metavar="DIR", help="a model folder; with --config-only also a run, a config.json or a hub name"
    )
    parser.add_argument("--engine", default="tgi", metavar="ENGINE", help="tgi or vllm (default: tgi)")
    parser.add_argument("--version", metavar="V", help="0.8, 3.3, 3.3.7 ... (default: the newest known)")
    parser.add_argument("--num-shard", type=int, default=1, metavar="N", help="GPUs that the model is split over (default: 1)")
    parser.add_argument("--gpu", metavar="NAME", help="v100-32g, t4, a100-80g, h100 ..., or cpu (default: what is here)")
    parser.add_argument("--gpus", type=int, metavar="N", help="how many there are (default: what is here, if --gpu is not given)")
    parser.add_argument(
        "--driver", metavar="V", help="NVIDIA's, such as 515.65.01 (default: this machine's, if --gpu is not given)"
    )
    parser.add_argument("--dtype", metavar="D", help="fp16, bf16 or fp32 (default: the server's own choice)")
    parser.add_argument("--max-input-tokens", type=int, metavar="N", help="tokens of the longest prompt")
    parser.add_argument("--max-total-tokens", type=int, metavar="N", help="tokens of a prompt and its answer")
    parser.add_argument("--config-only", action="store_true", help="judge from config.json, when the weights are not here yet")


def run(args: argparse.Namespace) -> Dict[str, Any]:
    from pipeline_train.errors import UserError
    from serve.limits import Question, judge

    for name in ("gpus", "max_input_tokens", "max_total_tokens"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError("--%s %d: expected 1 or more" % (name.replace("_", "-"), value))
    config, files, nbytes = _model(args.model, args.config_only)
    gpu, gpus, driver = _machine(args)
    verdict = judge(
        Question(
            config, args.engine, args.version, args.num_shard, gpu, gpus, driver, files, nbytes, args.dtype,
            args.max_input_tokens, args.max_total_tokens, args.model,
        )
    )  # fmt: skip
    document = _document(verdict, driver)
    if verdict.reasons:
        refused = UserError("\n".join(verdict.reasons))
        refused.document = document  # type: ignore[attr-defined]
        raise refused
    return document


def _model(model: str, config_only: bool) -> Tuple[Dict[str, Any], Any, Optional[int]]:
    """-> (config.json, files, bytes); None for what --config-only does not look at."""
    import os

    from pipeline_train.errors import UserError
    from serve.limits import look

    from .plan import config_json

    if config_only:
        return config_json(model), None, None
    if os.path.isfile(model):
        raise UserError("--model %s: a file; name the folder, or judge from config.json alone with --config-only" % model)
    return look(model)


def _machine(args: argparse.Namespace) -> Tuple[Optional[str], Optional[int], Optional[str]]:
    """(card, how many, driver): as named; those of this machine where nobody named a card."""
    from pipeline_train.plan.cards import cards_here

    if args.gpu is not None:
        return args.gpu, args.gpus, args.driver
    here = cards_here()
    if not here:
        return None, args.gpus, args.driver
    return here[0].card, args.gpus or len(here), args.driver or here[0].driver


def _document(verdict: Any, driver: Optional[str]) -> Dict[str, Any]:
    uses = {
        "engine": verdict.engine, "version": verdict.version, "image": verdict.image, "digest": verdict.digest,
        "num_shard": verdict.shards, "gpu": verdict.gpu, "driver": driver, "flags": verdict.flags, "env": verdict.env,
        "writable": verdict.writable, "capacity": verdict.capacity,
    }  # fmt: skip
    return {"accepted": not verdict.reasons, "reasons": verdict.reasons, "notes": verdict.notes, "uses": uses}


def text(document: Dict[str, Any]) -> str:
    uses = document["uses"]
    number = uses["num_shard"]
    where = "%d x %s" % (number, uses["gpu"]) if uses["gpu"] else "%d shard%s" % (number, "" if number == 1 else "s")
    lines = ["%(image)s can serve it" % uses + " on %s" % where]
    if uses["flags"]:
        lines.append("flags: " + " ".join(uses["flags"]))
    if uses["env"]:
        lines.append("environment: " + " ".join("%s=%s" % pair for pair in sorted(uses["env"].items())))
    if uses["writable"]:
        lines.append("the folder must be writable")
    return "\n".join(lines + _capacity(uses["capacity"]) + ["note: %s" % note for note in document["notes"]])


def _capacity(found: Optional[Dict[str, Any]]) -> List[str]:
    if found is None:
        return []
    each = 1024 * found["kv_gib_per_token"]
    return [
        "memory of each GPU, estimated: %.1f GiB of weights in %.1f usable; %.3f MiB a token: one request of at most %d tokens, "
        "all together %d"
        % (found["weights_gib_per_gpu"], found["usable_gib"], each, found["max_context"], found["max_batch_tokens"])
    ]
