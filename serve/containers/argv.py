"""The flags and the environment that each version of each engine is started with.

Flags of text-generation-inference by the release that brought them (its launcher's source, v0.8.2 to v3.3.7); of vLLM 0.18 from its
documentation. Inside the container every server listens on port 80.
"""

import json
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple

from pipeline_train.errors import UserError

from ..limits.room import OLD_BATCH, OLD_INPUT, OLD_TOTAL, PREFILL
from ..settings import Settings

PORT = 80
HALF = ("float16", "bfloat16")
BLOOM_PREFILL = "--max-batch-prefill-tokens"


def version_of(text: str) -> Tuple[int, ...]:
    return tuple(int(part) for part in text.split("."))


def argv(
    settings: Settings, version: str, model_id: str, name: str, config: Mapping[str, Any], needed: Sequence[str] = ()
) -> List[str]:
    """The container's arguments. ``version``: the whole one; ``model_id``: the folder as it is seen inside; ``name``: what clients
    may call the model (vLLM); ``config``: config.json; ``needed``: flags that this model or card needs, unless wished otherwise.
    UserError for a wish that the version cannot grant."""
    check_tokens(settings)
    if settings.engine == "vllm":
        flags = _vllm(settings, model_id, name)
    else:
        flags = _tgi(settings, version_of(version), model_id, config)
    own, needs, last = _groups(flags), _groups(needed), _groups(settings.flags)
    if BLOOM_PREFILL in needs:  # the judge knows the card
        own.pop(BLOOM_PREFILL, None)
    kept = [own[name] for name in own if name not in last] + [needs[name] for name in needs if name not in {**own, **last}]
    return [part for group in kept + list(last.values()) for part in group]


def _groups(flags: Sequence[str]) -> Dict[str, List[str]]:
    """["--a", "1", "--b"] -> each flag with its values: no launcher takes a flag twice. A model named without a flag is ""."""
    found: Dict[str, List[str]] = {}
    name = ""
    for part in flags:
        name = part.partition("=")[0] if part.startswith("--") else name
        found.setdefault(name, []).append(part)
    return found


def check_tokens(settings: Settings) -> None:
    longest, total = settings.max_input_tokens, settings.max_total_tokens
    if longest is not None and total is not None and longest >= total:
        raise UserError("--max-input-tokens %d: must be less than --max-total-tokens %d" % (longest, total))


def _tgi(settings: Settings, version: Tuple[int, ...], model_id: str, config: Mapping[str, Any]) -> List[str]:
    # Without --num-shard some versions take one GPU and some take all.
    flags = ["--model-id", model_id, "--num-shard", str(settings.shards), "--port", str(PORT)]
    if version >= (0, 9, 1):  # Docker sets HOSTNAME to the container's name, and from here on TGI reads it as this flag
        flags += ["--hostname", "0.0.0.0"]
    if settings.dtype is not None:
        flags += _tgi_dtype(settings.dtype, version)
    if settings.max_concurrent_requests is not None:
        flags += ["--max-concurrent-requests", str(settings.max_concurrent_requests)]
    if settings.cors_allow_origin is not None:
        flags += ["--cors-allow-origin", settings.cors_allow_origin]
    flags += _tgi_tokens(settings.max_input_tokens, settings.max_total_tokens, version, config)
    if version >= (2, 4, 1):
        flags += ["--usage-stats", "off"]
    elif version >= (2, 2, 0):
        flags += ["--disable-usage-stats"]
    if version >= (3, 2, 2) and config.get("model_type") != "bloom":  # bloom is not a flash model and always has them
        flags += ["--enable-prefill-logprobs"]  # pipedock prove compares them
    return flags


def _tgi_dtype(dtype: str, version: Tuple[int, ...]) -> List[str]:
    if version < (0, 9, 0):
        if dtype != "float16":
            raise UserError("--dtype %s: TGI before 0.9 computes in float16 only; leave --dtype out, or use --version 3.3" % dtype)
        return []
    if dtype not in HALF:
        raise UserError("--dtype %s: TGI computes in %s" % (dtype, " or ".join(HALF)))
    return ["--dtype", dtype]


def _tgi_tokens(longest: Optional[int], total: Optional[int], version: Tuple[int, ...], config: Mapping[str, Any]) -> List[str]:
    """One limit given without the other must not meet a default that contradicts it: TGI then ends at once, or never answers."""
    flags: List[str] = []
    if version < (0, 9, 0) and (longest is not None or total is not None):
        if total is None:
            total = max(OLD_TOTAL, (longest or 0) + OLD_TOTAL - OLD_INPUT)
        longest = longest or min(OLD_INPUT, total - 1)
        if total > OLD_BATCH:  # a request larger than the batch budget would wait for ever
            flags += ["--max-batch-total-tokens", str(total)]
    if longest is not None:
        flags += ["--max-input-tokens" if version >= (2, 0, 0) else "--max-input-length", str(longest)]
    if total is not None:
        flags += ["--max-total-tokens", str(total)]
    if version >= (0, 9, 0) and config.get("model_type") == "bloom" and (longest or total):
        # Not a flash model: a prompt is computed in one piece, so it must fit into one prefill.
        flags += [BLOOM_PREFILL, str(max(PREFILL, longest or (total or 0) - 1))]
    return flags


def _vllm(settings: Settings, model_id: str, name: str) -> List[str]:
    if settings.max_input_tokens is not None:
        raise UserError("--max-input-tokens: vLLM has no such limit; --max-total-tokens bounds prompt and answer together")
    if settings.max_concurrent_requests is not None:
        raise UserError("--max-concurrent-requests: vLLM lets requests wait instead of refusing them; leave it out")
    # Without --generation-config vllm, generation_config.json changes how every request is sampled.
    flags = [model_id, "--served-model-name", name, "--host", "0.0.0.0", "--port", str(PORT)]
    flags += ["--tensor-parallel-size", str(settings.shards), "--generation-config", "vllm"]
    if settings.dtype is not None:
        flags += ["--dtype", settings.dtype]
    if settings.max_total_tokens is not None:
        flags += ["--max-model-len", str(settings.max_total_tokens)]
    if settings.cors_allow_origin is not None:
        flags += ["--allowed-origins", json.dumps([settings.cors_allow_origin])]
    return flags


def environment(settings: Settings, version: str, mount: str, host: Mapping[str, str]) -> Dict[str, str]:
    """The container's variables. ``mount``: the model's folder inside; ``host``: the caller's environment, of which the hub's token
    and what steers NVIDIA's libraries get in, and nothing else: PORT, DTYPE, API_KEY ... would be settings. UserError for a key
    that the version cannot ask for."""
    found = {name: value for name, value in host.items() if name.startswith("NCCL_") or name == "NVIDIA_DISABLE_REQUIRE"}
    token = host.get("HF_TOKEN") or host.get("HUGGING_FACE_HUB_TOKEN")
    if settings.engine == "vllm":
        found.update(VLLM_NO_USAGE_STATS="1", DO_NOT_TRACK="1")
        old, key_name = False, "VLLM_API_KEY"
    else:
        old, key_name = version_of(version) < (2, 1, 0), "API_KEY"
        if settings.api_key and version_of(version) < (2, 3, 0):
            raise UserError(
                "--api-key-file: TGI %s cannot ask for a key (2.3 and later can); leave it out and keep --host 127.0.0.1, or use "
                "--version 3.3" % version
            )
    if token:
        found["HUGGING_FACE_HUB_TOKEN" if old else "HF_TOKEN"] = token
    if settings.api_key:
        found[key_name] = settings.api_key  # not on the command line, which everybody can read
    # Read by our own drop-in image only: whose user to become, and whether an unproved export may be served.
    found["PIPEDOCK_MOUNT"] = mount
    if not settings.need_proof:
        found["NO_PROOF"] = "true"
    return found
