"""The launcher flags of text-generation-inference (3.3's and 0.8's) and their environment names, for a server of one process.

A flag is read from the command line, else from the variable named like it in capitals, else its default. Flags that only tune the
original's own machinery are accepted and said to have no effect; those that would change answers and are not done here are refused.
"""

import argparse
import ipaddress
import os
from dataclasses import dataclass
from typing import Any, List, Mapping, NoReturn, Optional, Sequence, Tuple

from pipeline_train.errors import UserError

from ..state import GRACE_S

DTYPES = ("float32", "float16", "bfloat16")

VALUES: Tuple[Tuple[str, type, Any, str], ...] = (  # flag, type, default, help
    ("model-id", str, None, "model folder, or hub name where the network allows"),
    ("revision", str, None, "revision of a hub model"),
    ("dtype", str, None, "float32, float16 or bfloat16; by default float32 on a CPU, what the weights are on a GPU"),
    ("num-shard", int, 1, "this engine has one; a larger number is said to have no effect"),
    ("max-concurrent-requests", int, 128, "more at once are answered with 429"),
    ("max-best-of", int, 2, "largest best_of"),
    ("max-stop-sequences", int, 4, "most stop sequences of a request"),
    ("max-top-n-tokens", int, 5, "largest top_n_tokens"),
    ("max-input-tokens", int, None, "longest prompt; by default one less than max-total-tokens"),
    ("max-input-length", int, None, "the older name of max-input-tokens"),
    ("max-total-tokens", int, None, "longest prompt and answer together; by default what the model was made for"),
    (
        "max-batch-size",
        int,
        None,
        "requests generated at the same time; by default 64, and above that their company may show in an answer on a GPU",
    ),
    ("max-batch-total-tokens", int, None, "tokens all running requests may hold; by default from the free memory"),
    ("max-client-batch-size", int, 4, "most prompts of one completion request"),
    ("validation-workers", int, 2, "threads that tokenize"),
    ("hostname", str, "127.0.0.1", "address to listen on"),
    ("port", int, 3000, "port to listen on"),
    ("api-key", str, None, "required as a bearer token on the generating routes"),
    ("payload-limit", int, 2000000, "largest request body in bytes"),
    ("tokenizer-config-path", str, None, "take the chat template from this file"),
    ("graceful-termination-timeout", int, GRACE_S, "seconds for running requests after SIGTERM"),
)
SWITCHES = {
    "trust-remote-code": None,
    "json-output": None,
    "no-proof": "serve an export that is not proved, or changed since; says so loudly",
}
PROOF_CHECKED = "proof-checked"  # said by pipedock serve, which has compared the proof with the files already
IGNORED = (
    "sharded", "kv-cache-dtype", "max-batch-prefill-tokens", "waiting-served-ratio", "max-waiting-tokens", "prometheus-port",
    "shard-uds-path", "master-addr", "master-port", "huggingface-hub-cache", "weights-cache-override", "cuda-graphs",
    "cuda-memory-fraction", "speculate", "otlp-endpoint", "otlp-service-name", "watermark-gamma", "watermark-delta", "usage-stats",
)  # fmt: skip
IGNORED_SWITCHES = (
    "disable-custom-kernels",
    "disable-grammar-support",
    "enable-prefill-logprobs",
    "disable-usage-stats",
    "enable-cuda-graphs",
)
REFUSED = ("quantize", "rope-scaling", "rope-factor", "lora-adapters")


@dataclass(frozen=True)
class Options:
    """The settings that mean something here. None: decided when the model is known."""

    model_id: str
    revision: Optional[str]
    dtype: Optional[str]
    max_concurrent_requests: int
    max_best_of: int
    max_stop_sequences: int
    max_top_n_tokens: int
    max_input_tokens: Optional[int]
    max_total_tokens: Optional[int]
    max_batch_size: Optional[int]
    max_batch_total_tokens: Optional[int]
    max_client_batch_size: int
    validation_workers: int
    hostname: str
    port: int
    api_key: Optional[str]
    payload_limit: int
    tokenizer_config_path: Optional[str]
    graceful_termination_timeout: int
    trust_remote_code: bool
    json_output: bool
    no_proof: bool
    proof_checked: bool
    cors_allow_origin: Tuple[str, ...]
    notes: Tuple[str, ...]


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError("%s. See --help" % message)


def parser() -> argparse.ArgumentParser:
    made = Parser(prog="python -m serve.embedded", description=__doc__.split("\n")[0], allow_abbrev=False)
    for name, kind, default, text in VALUES:
        short = ["-p"] if name == "port" else ["-g"] if name == "graceful-termination-timeout" else []
        shown = "" if default is None else " [%s]" % default
        made.add_argument("--" + name, *short, type=kind, default=None, help=text + shown)
    for name in SWITCHES:
        made.add_argument("--" + name, action="store_true", default=None, help=SWITCHES[name])
    made.add_argument("--" + PROOF_CHECKED, action="store_true", help=argparse.SUPPRESS)
    made.add_argument(
        "--cors-allow-origin", action="append", default=None, help="let browsers on this origin call; may be repeated"
    )
    for name in IGNORED + REFUSED:
        made.add_argument("--" + name, default=None, help=argparse.SUPPRESS)
    for name in IGNORED_SWITCHES:
        made.add_argument("--" + name, action="store_true", default=None, help=argparse.SUPPRESS)
    return made


def read(argv: Sequence[str], environment: Mapping[str, str] = os.environ) -> Options:
    """-> Options; UserError for everything that cannot be meant."""
    given = vars(parser().parse_args(list(argv)))
    notes: List[str] = []
    values = {_key(name): _value(name, kind, default, given, environment) for name, kind, default, _ in VALUES}
    for name in SWITCHES:
        values[_key(name)] = bool(given[_key(name)]) or environment.get(_variable(name)) == "true"
    values[_key(PROOF_CHECKED)] = given[_key(PROOF_CHECKED)]
    for name in REFUSED:
        if given[_key(name)] is not None or environment.get(_variable(name)):
            raise UserError("--%s would change the model's answers and is not done by the embedded engine; leave it out" % name)
    ignored = [name for name in IGNORED + IGNORED_SWITCHES if given[_key(name)] is not None]
    if ignored:
        notes.append("without effect here: " + " ".join("--" + name for name in ignored))
    if values.pop("num_shard") != 1:
        notes.append("one process and one device: --num-shard has no effect")
    older = values.pop("max_input_length")
    if older is not None and values["max_input_tokens"] is not None:
        raise UserError("--max-input-tokens and --max-input-length are the same setting: give one of them")
    values["max_input_tokens"] = values["max_input_tokens"] if older is None else older
    values["hostname"] = _hostname(given["hostname"], environment, notes)
    origins = given["cors_allow_origin"] or [one for one in environment.get("CORS_ALLOW_ORIGIN", "").split(",") if one]
    _check(values)
    return Options(cors_allow_origin=tuple(origins), notes=tuple(notes), **values)


def _value(name: str, kind: type, default: Any, given: Mapping[str, Any], environment: Mapping[str, str]) -> Any:
    if given[_key(name)] is not None:
        return given[_key(name)]
    text = environment.get(_variable(name), "")
    if not text or name == "hostname":
        return default
    try:
        return kind(text)
    except ValueError:
        raise UserError("the environment's %s: expected a number, got %r" % (_variable(name), text)) from None


def _hostname(given: Optional[str], environment: Mapping[str, str], notes: List[str]) -> str:
    """Docker sets HOSTNAME to the container's name: only an address (or localhost) in it is meant as one."""
    if given is not None:
        return given
    text = environment.get("HOSTNAME", "")
    try:
        return text if text == "localhost" or ipaddress.ip_address(text) else ""
    except ValueError:
        if text:
            notes.append("the environment's HOSTNAME is no address, listening on 127.0.0.1; --hostname changes that")
        return "127.0.0.1"


def _check(values: Mapping[str, Any]) -> None:
    if not values["model_id"]:
        raise UserError("--model-id DIR (or MODEL_ID in the environment) is missing")
    if values["dtype"] not in (None,) + DTYPES:
        raise UserError("--dtype %s: expected one of %s" % (values["dtype"], ", ".join(DTYPES)))
    for name, value in values.items():
        if (
            isinstance(value, int)
            and not isinstance(value, bool)
            and value < (0 if name in ("port", "max_top_n_tokens", "max_stop_sequences") else 1)
        ):
            raise UserError("--%s %d: too small" % (name.replace("_", "-"), value))
    if values["port"] > 65535:
        raise UserError("--port %d: there are 65535" % values["port"])
    longest, total = values["max_input_tokens"], values["max_total_tokens"]
    if longest is not None and total is not None and longest >= total:
        raise UserError("--max-input-tokens %d: must be less than --max-total-tokens %d" % (longest, total))


def _key(name: str) -> str:
    return name.replace("-", "_")


def _variable(name: str) -> str:
    return _key(name).upper()
