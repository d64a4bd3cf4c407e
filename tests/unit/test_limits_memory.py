"""``serve.limits``: weights, cache and what is left of a card; lengths; the flags that keep a server within it."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline_train.families import FAMILIES, dims_of
from serve.limits import engines, gpus, memory
from serve.limits.sizes import sizes_of
from tests.limits import BLOOM_7B, LLAMA_7B, LLAMA_13B, LLAMA_30B, LLAMA_70B, QWEN2_7B, accepted, ask, bloom, llama, note, refused
from tests.real_configs import BLOOM_176B, LLAMA_31, SMOLLM2

GIB = 2**30


def load(config, engine="tgi", version="3.3", shards=1, padded=False, dtype="fp16", nbytes=None):
    return memory.Load(engines.find(engine, version), sizes_of(config), shards, padded, dtype, nbytes)


def parameters(config):
    dims = dims_of(config)
    return sum(FAMILIES[dims.family].layer_params(dims, layer) for layer in range(dims.layers))


# Weights -------------------------------------------------------------------------------------------------------------------


def test_two_bytes_of_every_parameter_on_one_gpu():
    for version in ("0.8", "3.3"):
        assert memory.weights(load(LLAMA_7B, version=version)) == pytest.approx(2 * parameters(LLAMA_7B) / GIB, rel=1e-6)
    assert memory.weights(load(LLAMA_7B, "vllm", None, dtype="fp32")) == pytest.approx(4 * parameters(LLAMA_7B) / GIB, rel=1e-6)


def test_a_tied_head_is_held_twice_where_the_server_loads_it_apart():
    head = 250880 * 4096 * 2 / GIB
    once = memory.weights(load(BLOOM_7B, version="0.8", padded=True))
    assert memory.weights(load(BLOOM_7B, "vllm", None)) == once
    assert memory.weights(load(BLOOM_7B, padded=True)) == pytest.approx(once + head)
    tied, head = llama(tie_word_embeddings=True), 32000 * 4096 * 2 / GIB
    once = memory.weights(load(tied, "vllm", None))
    assert memory.weights(load(tied)) == memory.weights(load(tied, version="0.8")) == pytest.approx(once + head)
    assert (
        memory.weights(load(tied, padded=True)) == memory.weights(load(tied, version="0.8", padded=True)) == once
    )  # transformers ties


def test_shards_split_all_but_vectors_and_a_vocabulary_that_does_not_divide():
    one, four = memory.weights(load(LLAMA_7B)), memory.weights(load(LLAMA_7B, shards=4))
    assert one / 4 < four < one / 4 * 1.001
    odd = llama(vocab_size=32003)
    whole = 2 * 32003 * 4096 * 2 * 3 / 4 / GIB  # embedding and head, three quarters more of each
    assert memory.weights(load(odd, shards=4)) == pytest.approx(memory.weights(load(odd)) / 4 + whole, rel=1e-3)


def test_unknown_models_are_as_large_as_their_files():
    assert memory.weights(load(QWEN2_7B, nbytes=4 * GIB, shards=2)) == 2.0
    assert memory.weights(load(dict(QWEN2_7B, torch_dtype="float32"), nbytes=4 * GIB)) == 2.0  # served in two bytes
    assert memory.weights(load(dict(QWEN2_7B, torch_dtype="float32", quantization_config={"bits": 4}), nbytes=4 * GIB)) == 4.0
    assert memory.weights(load(dict(LLAMA_7B, quantization_config={"bits": 4}), nbytes=4 * GIB)) == 4.0
    assert memory.weights(load(QWEN2_7B)) is None


# Cache ---------------------------------------------------------------------------------------------------------------------


def test_the_cache_of_a_token():
    assert memory.cache(load(LLAMA_7B)) * GIB == 2 * 32 * 32 * 128 * 2
    assert memory.cache(load(LLAMA_7B, shards=4)) * GIB == 2 * 32 * 8 * 128 * 2
    assert memory.cache(load(LLAMA_70B, "vllm", None, shards=16)) * GIB == 2 * 80 * 1 * 128 * 2  # KV heads are replicated
    assert memory.cache(load(QWEN2_7B)) * GIB == 2 * 28 * 4 * 128 * 2
    assert memory.cache(load({"model_type": "mamba"})) is None
    for missing in ("num_attention_heads", "hidden_size", "num_hidden_layers"):
        assert (
            memory.cache(load({key: value for key, value in QWEN2_7B.items() if key not in (missing, "num_key_value_heads")}))
            is None
        )
    assert memory.cache(load(dict(QWEN2_7B, hidden_size=20))) is None  # fewer than heads


@settings(max_examples=40, deadline=None)
@given(
    config=st.sampled_from([LLAMA_7B, BLOOM_7B, LLAMA_31, SMOLLM2]),
    engine=st.sampled_from([("tgi", "0.8"), ("tgi", "3.3"), ("vllm", None)]),
    gpu=st.sampled_from(["t4", "a10", "a100", "h200"]),
    padded=st.booleans(),
)
def test_what_is_said_to_fit_does_and_a_token_more_does_not(config, engine, gpu, padded):
    one = load(config, *engine, padded=padded)
    found = memory.capacity(one, gpus.card_named(gpu))
    context, free = found["max_context"], found["free_gib"]
    assert found["usable_gib"] - found["weights_gib_per_gpu"] == pytest.approx(free)
    if free < 0:
        assert (context, found["max_batch_tokens"]) == (0, 0)
        return
    cut = engine[0] == "vllm" or (engine[1] == "3.3" and not padded)

    def taken(tokens):
        return found["kv_gib_per_token"] * tokens + memory.prompt(one, min(tokens, memory.CHUNK) if cut else tokens)

    assert taken(context) <= free and found["max_batch_tokens"] >= context
    assert taken(context + 1) > free or context == one.sizes.positions


def test_more_of_a_card_and_more_cards_hold_more():
    def context(gpu, shards, **more):
        return memory.capacity(load(bloom(), shards=shards, padded=True, **more), gpus.card_named(gpu))["max_context"]

    assert context("t4", 1) == 0 < context("a10", 1) < context("a100-40g", 1) < context("a100", 1)
    assert context("t4", 2) < context("t4", 4) < context("t4", 8)
    assert context("t4", 2, version="0.8") != context("t4", 2)


def test_08s_llama_copies_its_cache_when_a_request_joins_so_that_half_can_be_used():
    for config, padded, copies in ((LLAMA_7B, False, 2), (LLAMA_7B, True, 1), (BLOOM_7B, True, 1)):
        one = load(config, version="0.8", padded=padded)
        found = memory.capacity(one, gpus.card_named("a100"))
        left = found["free_gib"] - memory.prompt(one, 1000)
        assert found["max_batch_tokens"] == int(left / found["kv_gib_per_token"] / copies)


def test_the_memory_of_a_prompt():
    assert memory.prompt(load(LLAMA_7B), 1000) * GIB == 1000 * 2 * (6 * 4096 + 3 * (11008 + 4096))
    assert memory.prompt(load(LLAMA_7B, shards=2), 1000) * GIB == 1000 * 2 * (6 * 4096 + 3 * (11008 + 4096) // 2)
    scores = (2 + 4) * 32 * 1000 * 1000
    bloom_each = 2 * (6 * 4096 + 3 * (4 * 4096 + 4096))
    assert memory.prompt(load(BLOOM_7B, padded=True), 1000) * GIB == 1000 * (bloom_each + 2 * 250880) + scores
    assert memory.prompt(load(BLOOM_7B, version="0.8", padded=True), 1000) * GIB == 1000 * (bloom_each + 2 * 2 * 250880) + scores


def test_padded_prompts_take_the_square_of_their_length_and_all_their_logits():
    padded, flash = load(BLOOM_7B, padded=True), load(LLAMA_7B)
    assert memory.prompt(padded, 2000) > 2 * memory.prompt(padded, 1000)
    assert memory.prompt(flash, 2000) == pytest.approx(2 * memory.prompt(flash, 1000))
    assert memory.prompt(load(LLAMA_7B, version="0.8"), 1000) > memory.prompt(flash, 1000) + 2 * 1000 * 32000 * 2 / GIB * 0.99


# Verdicts ------------------------------------------------------------------------------------------------------------------


def test_weights_that_do_not_fit_name_the_shards_that_hold_them():
    assert refused(LLAMA_13B, "tgi", "3.3", 1, "t4") == (
        "24.2 GiB of weights (fp16) on each of 1 GPU: a t4 has room for 13.5 GiB: use --num-shard 2"
    )
    assert "on each of 8 GPUs: an a100-40g has room for 36.4 GiB" in refused(BLOOM_176B, "tgi", "3.3", 8, "a100-40g", gpus=8)
    assert "GiB of weights (bf16) on each" in refused(LLAMA_70B, "vllm", None, 1, "a100", dtype="bf16")
    assert "GiB of weights (bf16) on each" in refused(dict(LLAMA_70B, torch_dtype="bfloat16"), "vllm", None, 1, "a100")
    assert "GiB of weights (fp16) on each" in refused(dict(LLAMA_70B, torch_dtype="bfloat16"), "tgi", "3.3", 1, "a100")
    assert refused(BLOOM_176B, "tgi", "3.3", 8, "a100-40g", gpus=8).endswith(": use a card with more memory")
    assert refused(LLAMA_30B, "tgi", "0.8", 1, "v100").endswith(": use a card with more memory")  # shards need flash attention
    verdict = ask(LLAMA_13B, "tgi", "3.3", 1, "t4")
    assert (verdict.capacity["max_context"], verdict.capacity["max_batch_tokens"]) == (0, 0) and verdict.flags == []
    accepted(LLAMA_13B, "tgi", "3.3", 2, "t4")


def test_a_length_that_does_not_fit():
    reason = refused(BLOOM_7B, "tgi", "3.3", 2, "t4", max_total=8000)
    assert "--max-total-tokens 8000: beside the weights a t4 holds one request of about" in reason and "or --num-shard 8" in reason
    accepted(BLOOM_7B, "tgi", "3.3", 8, "t4", max_total=8000)
    fits = int(reason.split("about ")[1].split()[0])
    accepted(BLOOM_7B, "tgi", "3.3", 2, "t4", max_total=fits)
    reason = refused(LLAMA_7B, "tgi", "3.3", 1, "t4", max_total=4096)  # beyond its 2048 positions, too
    assert "about 1554 tokens" in reason and reason.endswith(", or --num-shard 2")
    assert refused(BLOOM_7B, "tgi", "3.3", 2, "t4", max_total=fits + 1)


def test_a_length_beyond_the_models_positions():
    reason = refused(LLAMA_7B, "vllm", None, 1, "a100", max_total=4096)
    assert "the model has 2048 positions, and vLLM 0.18.0 refuses more: use at most 2048" in reason
    assert "made for 2048 positions" in note(accepted(LLAMA_7B, "tgi", "3.3", 1, "a100", max_total=4096), "--max-total-tokens 4096")
    accepted(LLAMA_7B, "vllm", None, 1, "a100", max_total=2048)
    assert accepted(bloom(), "vllm", None, 1, "a100", max_total=4096).env == {"VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1"}  # ALiBi
    assert accepted(bloom(), "vllm", None, 1, "a100", max_total=2048).env == {}


def test_an_input_as_long_as_the_total():
    for engine, version in (("tgi", "0.8"), ("tgi", "3.3")):
        assert "--max-input-tokens 512 must be less than" in refused(
            LLAMA_7B, engine, version, 1, "a100", max_input=512, max_total=512
        )
        accepted(LLAMA_7B, engine, version, 1, "a100", max_input=511, max_total=512)


def flag(verdict, name):
    return int(verdict.flags[verdict.flags.index(name) + 1])


def test_08_is_told_what_a_batch_may_hold():
    """By itself it takes 32000 tokens for granted, and a request above the budget waits for ever."""
    verdict = accepted(LLAMA_7B, "tgi", "0.8", 1, "t4")
    assert flag(verdict, "--max-batch-total-tokens") == verdict.capacity["max_batch_tokens"] >= 1512
    verdict = accepted(BLOOM_7B, "tgi", "0.8", 1, "t4")  # not even its default request fits
    total, longest = flag(verdict, "--max-total-tokens"), flag(verdict, "--max-input-length")
    assert longest < total == verdict.capacity["max_context"] < 1512
    verdict = accepted(LLAMA_7B, "tgi", "0.8", 1, "t4", max_total=2000)
    assert flag(verdict, "--max-batch-total-tokens") >= 2000 and "--max-total-tokens" not in verdict.flags  # the user's own
    verdict = accepted(BLOOM_7B, "tgi", "0.8", 1, "t4", max_input=500)
    assert flag(verdict, "--max-batch-total-tokens") >= 1512 and "--max-total-tokens" not in verdict.flags
    assert accepted(LLAMA_7B, "tgi", "0.8", 8, "t4").flags == []


def test_a_prompt_that_does_not_fit():
    fits = accepted(BLOOM_7B, "tgi", "0.8", 1, "t4").capacity["max_context"]
    reason = refused(BLOOM_7B, "tgi", "0.8", 1, "t4", max_input=fits)
    assert reason.startswith("--max-input-tokens %d: beside the weights a t4 holds one request of about %d" % (fits, fits))
    assert reason.endswith("use less, or --num-shard 2")
    accepted(BLOOM_7B, "tgi", "0.8", 1, "t4", max_input=fits - 1)


def test_a_prompt_that_the_model_has_no_positions_for():
    reason = refused(LLAMA_7B, "tgi", "3.3", 1, "a100", max_input=LLAMA_7B["max_position_embeddings"])
    assert reason == "--max-input-tokens %d: the model has positions for %d tokens, prompt and answer: use less" % (
        (LLAMA_7B["max_position_embeddings"],) * 2)  # fmt: skip


def test_33_is_told_what_it_may_try_of_a_bloom():
    verdict = accepted(BLOOM_7B, "tgi", "3.3", 2, "t4")
    assert flag(verdict, "--max-batch-prefill-tokens") == verdict.capacity["max_context"] < 4096
    assert "--max-batch-total-tokens" not in verdict.flags  # its 16000 fit
    verdict = accepted(BLOOM_7B, "tgi", "3.3", 1, "a10")
    assert flag(verdict, "--max-batch-prefill-tokens") < flag(verdict, "--max-batch-total-tokens") < 16000
    verdict = accepted(BLOOM_7B, "tgi", "3.3", 2, "t4", max_input=1000, max_total=1500)  # its 4096 would not fit beside them
    assert flag(verdict, "--max-batch-prefill-tokens") == verdict.capacity["max_context"] < 4096
    verdict = accepted(BLOOM_7B, "tgi", "3.3", 1, "a100", max_input=5000, max_total=6000)
    assert "--max-batch-prefill-tokens" not in verdict.flags  # serve names the prompt's length
    assert accepted(BLOOM_7B, "tgi", "3.3", 1, "a100").flags == []
    assert accepted(LLAMA_7B, "tgi", "3.3", 1, "t4").flags == []  # flash attention finds its own size


def test_what_a_server_takes_of_itself_is_said_where_nobody_names_a_length():
    said = "prompts of 1000 tokens and requests of 1512"
    assert said in note(accepted(LLAMA_7B, "tgi", "0.8", 8, "t4"), "without --max")
    assert "requests of 4096 tokens" in note(accepted(BLOOM_7B, "tgi", "3.3", 1, "a100"), "without --max")
    assert "requests of 3469 tokens" in note(accepted(BLOOM_7B, "tgi", "3.3", 2, "t4"), "without --max")
    for config, version in ((LLAMA_7B, "0.8"), (BLOOM_7B, "3.3")):
        assert not any("without --max" in text for text in accepted(config, "tgi", version, 8, "t4", max_total=2000).notes)
    assert not any("without --max" in text for text in accepted(LLAMA_7B, "tgi", "3.3", 8, "t4").notes)


def test_vllm_is_told_a_length_that_its_cache_can_hold():
    assert "--max-model-len" not in accepted(LLAMA_31, "vllm", None, 1, "a100").flags
    verdict = accepted(LLAMA_31, "vllm", None, 1, "a10")
    assert verdict.flags == ["--max-model-len", str(verdict.capacity["max_batch_tokens"] // 16 * 16)]
    assert 16000 < flag(verdict, "--max-model-len") < 131072
    assert "--max-model-len" not in accepted(LLAMA_31, "vllm", None, 1, "a10", max_total=4096).flags
    verdict = accepted(LLAMA_7B, "vllm", None, 1, "t4")
    assert verdict.flags[:2] == ["--gpu-memory-utilization", "0.95"] and flag(verdict, "--max-model-len") > 1000
