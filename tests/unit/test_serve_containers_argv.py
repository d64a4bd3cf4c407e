"""Flags and variables of each server version, against what its launcher knows (tgi-contract, section 4; vLLM's documentation)."""

import itertools
import json

import pytest

from pipeline_train.errors import UserError
from serve.containers import argv
from serve.limits import Question, judge
from serve.settings import Settings
from tests.models import tiny_config

LLAMA, BLOOM = {"model_type": "llama"}, {"model_type": "bloom"}
SWITCHES = {
    "--disable-custom-kernels",
    "--enable-prefill-logprobs",
    "--trust-remote-code",
    "--json-output",
    "--disable-usage-stats",
}
OLD = """model-id revision sharded num-shard quantize trust-remote-code max-concurrent-requests max-best-of max-stop-sequences
    max-input-length max-total-tokens max-batch-size waiting-served-ratio max-batch-total-tokens max-waiting-tokens port
    shard-uds-path master-addr master-port huggingface-hub-cache weights-cache-override disable-custom-kernels json-output
    otlp-endpoint cors-allow-origin watermark-gamma watermark-delta env"""
NEW = OLD.replace("max-input-length", "max-input-tokens") + """ validation-workers speculate dtype kv-cache-dtype max-top-n-tokens
    max-batch-prefill-tokens cuda-graphs hostname prometheus-port cuda-memory-fraction rope-scaling rope-factor otlp-service-name
    api-key tokenizer-config-path disable-grammar-support max-client-batch-size lora-adapters usage-stats payload-limit
    enable-prefill-logprobs graceful-termination-timeout"""  # fmt: skip
KNOWN = {version: {"--" + name for name in names.split()} for version, names in (("0.8.2", OLD), ("3.3.7", NEW))}


def made(version, config=LLAMA, needed=(), **wishes):
    return argv.argv(Settings("m", "tgi", **wishes), version, "/data/m", "m", config, needed)


def pairs(flags):
    """["--a", "1", "--b"] -> {"--a": "1", "--b": None}"""
    found, rest = {}, list(flags)
    while rest:
        flag = rest.pop(0)
        assert flag.startswith("--") and flag not in found, flags
        found[flag] = None if flag in SWITCHES else rest.pop(0)
    return found


@pytest.mark.parametrize("version", sorted(KNOWN))
@pytest.mark.parametrize("config", [LLAMA, BLOOM], ids=lambda config: config["model_type"])
def test_every_wish_is_spelled_as_the_version_knows_it(version, config):
    """All combinations of what can be wished for: no flag that the launcher does not know, each with a value or none."""
    wishes = {
        "dtype": (None, "float16"), "max_input_tokens": (None, 100, 5000), "max_total_tokens": (None, 6000, 40000),
        "max_concurrent_requests": (None, 9), "cors_allow_origin": (None, "http://a"), "shards": (1, 8),
    }  # fmt: skip
    for values in itertools.product(*wishes.values()):
        found = pairs(made(version, config, ["--disable-custom-kernels"], **dict(zip(wishes, values))))
        assert set(found) <= KNOWN[version], found
        assert "--disable-custom-kernels" in found and found["--num-shard"] in ("1", "8")
        assert found["--model-id"] == "/data/m" and found["--port"] == "80"


def test_hostname_is_said_where_docker_would_set_it():
    """Docker's HOSTNAME is the container's name; 0.8 neither reads it nor knows the flag."""
    assert pairs(made("3.3.7"))["--hostname"] == "0.0.0.0" and pairs(made("0.9.1"))["--hostname"] == "0.0.0.0"
    assert "--hostname" not in made("0.8.2")


@pytest.mark.parametrize(
    "version, flags",
    [
        ("0.8.2", []), ("2.1.1", []), ("2.2.0", ["--disable-usage-stats"]), ("2.4.0", ["--disable-usage-stats"]),
        ("2.4.1", ["--usage-stats", "off"]), ("3.3.7", ["--usage-stats", "off"]),
    ],
)  # fmt: skip
def test_usage_statistics_are_off(version, flags):
    assert [part for part in made(version) if "stats" in part or part == "off"] == flags


def test_the_longest_prompt_by_the_versions_name():
    assert pairs(made("3.3.7", max_input_tokens=7))["--max-input-tokens"] == "7"
    assert pairs(made("1.4.5", max_input_tokens=7))["--max-input-length"] == "7"
    assert pairs(made("0.8.2", max_input_tokens=7))["--max-input-length"] == "7"
    assert "--max-input-tokens" not in made("3.3.7") + made("3.3.7", max_total_tokens=9)


@pytest.mark.parametrize(
    "wishes, longest, total, batch",
    [
        ({"max_total_tokens": 512}, "511", "512", None),  # its own longest prompt, 1000, would end it at once
        ({"max_total_tokens": 4000}, "1000", "4000", None),
        ({"max_input_tokens": 3000}, "3000", "3512", None),  # its own 1512 would
        ({"max_input_tokens": 100}, "100", "1512", None),
        ({"max_total_tokens": 40000}, "1000", "40000", "40000"),  # beyond its batch budget a request would wait for ever
    ],
)
def test_one_limit_alone_meets_no_contradicting_default_of_0_8(wishes, longest, total, batch):
    found = pairs(made("0.8.2", **wishes))
    assert (found["--max-input-length"], found["--max-total-tokens"]) == (longest, total)
    assert found.get("--max-batch-total-tokens") == batch


def test_a_prompt_of_bloom_fits_into_one_prefill():
    """It never chunks; TGI 3 ends when the longest prompt does not fit."""
    assert pairs(made("3.3.7", BLOOM, max_input_tokens=5000))["--max-batch-prefill-tokens"] == "5000"
    assert pairs(made("3.3.7", BLOOM, max_total_tokens=6001))["--max-batch-prefill-tokens"] == "6000"
    assert pairs(made("3.3.7", BLOOM, max_input_tokens=100))["--max-batch-prefill-tokens"] == "4096"
    small = made("3.3.7", BLOOM, ["--max-batch-prefill-tokens", "900"], max_input_tokens=100)  # the judge's, for a small card
    assert pairs(small)["--max-batch-prefill-tokens"] == "900" and small.count("--max-batch-prefill-tokens") == 1
    assert "--max-batch-prefill-tokens" not in made("3.3.7", BLOOM) + made("3.3.7", max_input_tokens=5000)


def test_logprobs_of_the_prompt_for_the_proof():
    assert "--enable-prefill-logprobs" in made("3.3.7") and "--enable-prefill-logprobs" in made("3.2.2")
    assert "--enable-prefill-logprobs" not in made("3.3.7", BLOOM) + made("3.2.1") + made("0.8.2")


def test_types():
    assert pairs(made("3.3.7", dtype="bfloat16"))["--dtype"] == "bfloat16"
    assert "--dtype" not in made("0.8.2", dtype="float16")
    with pytest.raises(UserError, match="--dtype bfloat16: TGI before 0.9 computes in float16 only; leave --dtype out"):
        made("0.8.2", dtype="bfloat16")
    with pytest.raises(UserError, match="--dtype float32: TGI computes in float16 or bfloat16"):
        made("3.3.7", dtype="float32")


def test_the_limits_must_fit_together():
    with pytest.raises(UserError, match="--max-input-tokens 8: must be less than --max-total-tokens 8"):
        made("3.3.7", max_input_tokens=8, max_total_tokens=8)


def test_no_flag_is_given_twice():
    """Wishes before needs; more flags of the caller's come last, before both."""
    assert made("3.3.7", needed=["--a"], flags=("--b", "1"))[-3:] == ["--a", "--b", "1"]
    needed = ["--max-total-tokens", "9", "--max-batch-total-tokens", "8"]
    assert made("3.3.7", max_total_tokens=7, needed=needed).count("--max-total-tokens") == 1
    found = pairs(made("3.3.7", max_total_tokens=7, needed=needed))
    assert (found["--max-total-tokens"], found["--max-batch-total-tokens"]) == ("7", "8")
    found = made("3.3.7", max_total_tokens=7, needed=needed, flags=("--max-total-tokens=6", "--cors", "a", "--cors", "b"))
    assert "7" not in found and "9" not in found and found[-5:] == ["--max-total-tokens=6", "--cors", "a", "--cors", "b"]
    assert vllm(flags=("--max-model-len", "5"), max_total_tokens=9)[0] == "/data/m"


def vllm(**wishes):
    return argv.argv(Settings("m", "vllm", **wishes), "0.18.0", "/data/m", "tiny", LLAMA)


def test_vllm():
    found = vllm(shards=4, dtype="float16", max_total_tokens=99, cors_allow_origin="http://a")
    assert found[0] == "/data/m"
    assert pairs(found[1:]) == {
        "--served-model-name": "tiny", "--host": "0.0.0.0", "--port": "80", "--tensor-parallel-size": "4",
        "--generation-config": "vllm", "--dtype": "float16", "--max-model-len": "99", "--allowed-origins": '["http://a"]',
    }  # fmt: skip
    assert json.loads(pairs(found[1:])["--allowed-origins"]) == ["http://a"]
    with pytest.raises(UserError, match="--max-input-tokens: vLLM has no such limit; --max-total-tokens bounds"):
        vllm(max_input_tokens=3)
    with pytest.raises(UserError, match="--max-concurrent-requests: vLLM lets requests wait instead of refusing them"):
        vllm(max_concurrent_requests=3)


def variables(version, host=None, engine="tgi", **wishes):
    return argv.environment(Settings("m", engine, **wishes), version, "/data/m", host or {})


def test_the_callers_environment_stays_outside():
    host = {"PORT": "1", "DTYPE": "x", "API_KEY": "no", "REVISION": "r", "HOME": "/root", "NCCL_DEBUG": "INFO"}
    assert variables("3.3.7", host) == {"NCCL_DEBUG": "INFO", "PIPEDOCK_MOUNT": "/data/m"}
    assert variables("3.3.7", {"NVIDIA_DISABLE_REQUIRE": "1"})["NVIDIA_DISABLE_REQUIRE"] == "1"


@pytest.mark.parametrize("version, name", [("0.8.2", "HUGGING_FACE_HUB_TOKEN"), ("2.1.0", "HF_TOKEN"), ("3.3.7", "HF_TOKEN")])
def test_the_hubs_token_by_the_versions_name(version, name):
    for given in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        assert variables(version, {given: "t"}) == {name: "t", "PIPEDOCK_MOUNT": "/data/m"}


def test_the_key_is_a_variable_and_refused_where_there_is_none():
    assert variables("3.3.7", api_key="k")["API_KEY"] == "k" and "k" not in made("3.3.7", api_key="k")
    assert variables("0.18.0", engine="vllm", api_key="k")["VLLM_API_KEY"] == "k" and "k" not in vllm(api_key="k")
    for version in ("0.8.2", "2.2.0"):
        with pytest.raises(
            UserError, match="--api-key-file: TGI %s cannot ask for a key .2.3 and later can.; leave it out" % version
        ):
            variables(version, api_key="k")


def test_vllm_reports_nothing():
    found = variables("0.18.0", engine="vllm")
    assert found["VLLM_NO_USAGE_STATS"] == "1" and found["DO_NOT_TRACK"] == "1"


def test_our_own_image_is_told_what_no_proof_means():
    assert variables("3.3.7", need_proof=False)["NO_PROOF"] == "true" and "NO_PROOF" not in variables("3.3.7")


BIG = {
    "llama": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
              "num_key_value_heads": 32, "max_position_embeddings": 2048, "vocab_size": 32000},
    "bloom": {"hidden_size": 4096, "n_layer": 30, "n_head": 32, "vocab_size": 250880},
}  # fmt: skip


@pytest.mark.parametrize("engine, version", [("tgi", "0.8.2"), ("tgi", "3.3.7"), ("vllm", "0.18.0")])
def test_with_what_the_judge_adds_it_is_still_what_the_launcher_knows(engine, version):
    """On every card, whatever was wished for: no unknown flag, none twice."""
    vllms = {"--" + name for name in "served-model-name host port tensor-parallel-size generation-config dtype max-model-len "
             "gpu-memory-utilization".split()}  # fmt: skip
    accepted = added = 0
    limits = ((None, None), (None, 900), (None, 1800), (1000, None), (500, 1900))
    for family, gpu, shards, (longest, total) in itertools.product(BIG, ("v100", "t4", "l4", "a100"), (1, 2, 8), limits):
        if engine == "vllm" and longest is not None:
            continue
        config = tiny_config(family, architectures=["X"], torch_dtype="float16", **BIG[family])
        verdict = judge(Question(config, engine, version, shards, gpu, driver="580.65.06", max_input=longest, max_total=total))
        if verdict.reasons:
            continue
        settings = Settings("m", engine, shards=shards, max_input_tokens=longest, max_total_tokens=total)
        flags = argv.argv(settings, version, "/data/m", "m", config, verdict.flags)
        found = pairs(flags[engine == "vllm" :])
        assert set(found) <= (vllms if engine == "vllm" else KNOWN[version]), found
        accepted, added = accepted + 1, added + bool(verdict.flags)
    assert accepted > 20 and added > 2, (accepted, added)
