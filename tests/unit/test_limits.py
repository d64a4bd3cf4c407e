"""``serve.limits``: what is known to work is accepted, what cannot work is refused with what to change; shards by version."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from export import targets
from pipeline_train import families
from pipeline_train.errors import UserError
from pipeline_train.families import FAMILIES
from serve.limits import Question, engines, judge, split
from serve.limits.sizes import sizes_of
from tests.limits import (
    BARE_BLOOM,
    BLOOM_7B,
    LLAMA_7B,
    LLAMA_13B,
    LLAMA_30B,
    LLAMA_70B,
    NEW_LLAMA,
    OLD_LLAMA,
    PREFIXED_BLOOM,
    QWEN2_7B,
    accepted,
    ask,
    bloom,
    llama,
    note,
    refused,
)  # fmt: skip
from tests.models import VARIANTS, tiny_config
from tests.real_configs import BLOOM_176B, LLAMA_31, LLAMA_2023, SMOLLM2, VICUNA_16K

# What is known to work -----------------------------------------------------------------------------------------------------


def test_08_on_8_t4_with_driver_515():
    verdict = accepted(LLAMA_7B, "tgi", "0.8", 8, "t4", gpus=8, driver="515.65.01", files=OLD_LLAMA)
    assert (verdict.version, verdict.image) == ("0.8.2", "ghcr.io/huggingface/text-generation-inference:0.8.2")
    assert verdict.digest is None and verdict.shards == 8 and verdict.gpu == "t4" and not verdict.writable
    assert verdict.flags == []  # --disable-custom-kernels is bloom's alone
    assert "515.65.01" in note(verdict, "minor-version compatibility")


@pytest.mark.parametrize("version", ["0.8", "3.3"])
def test_a_7b_on_one_t4(version):
    verdict = accepted(LLAMA_7B, "tgi", version, 1, "t4", files=OLD_LLAMA)
    assert 12 < verdict.capacity["weights_gib_per_gpu"] < 13 and verdict.capacity["max_context"] >= 1024


def test_bloom_7b_on_one_t4():
    """13.2 GiB of 14.8: a short context is left in 0.8; 3.3 holds the embedding twice, so that it does not fit."""
    verdict = accepted(BLOOM_7B, "tgi", "0.8", 1, "t4", files=BARE_BLOOM)
    assert 256 < verdict.capacity["max_context"] < 1512
    assert "use --num-shard 2" in refused(BLOOM_7B, "tgi", "3.3", 1, "t4", files=BARE_BLOOM)


@pytest.mark.parametrize("version, files", [("0.8", BARE_BLOOM), ("3.3", BARE_BLOOM), ("0.8", PREFIXED_BLOOM)])
def test_bloom_7b_on_8_t4(version, files):
    verdict = accepted(BLOOM_7B, "tgi", version, 8, "t4", gpus=8, files=files)
    assert ("--disable-custom-kernels" in verdict.flags) is (version == "0.8")


@pytest.mark.parametrize("version", ["0.8", "3.3"])
def test_an_unsharded_llama_on_v100_with_its_slow_path_named(version):
    files = NEW_LLAMA  # no .bin, no tokenizer.model: those are flash attention's
    verdict = accepted(LLAMA_7B, "tgi", version, 1, "v100", files=files)
    assert "slow" in note(verdict, "no flash attention on a v100-32g")
    for config in (BLOOM_7B, QWEN2_7B):  # one never has it, of the other that is not known
        assert not any("no flash attention" in text for text in accepted(config, "tgi", version, 1, "v100", nbytes=2**33).notes)
    assert any("7.0. --version 0.8 has it" in text for text in verdict.notes) is (version == "3.3")
    assert note(accepted(LLAMA_7B, "vllm", None, 1, "v100"), "compute capability 7.0").endswith("7.0")


def test_the_newest_version_is_meant_when_none_is_named():
    assert ask(LLAMA_7B).version == "3.3.7" and ask(LLAMA_7B, "vllm").version == "0.18.0"


# What cannot work ----------------------------------------------------------------------------------------------------------


def test_llama_30b_on_8_shards():
    reason = refused(LLAMA_30B, "tgi", "0.8", 8, "a100", driver="515.65.01")
    assert reason == "--num-shard 8 does not divide 52 attention heads: use one of 1, 2, 4"
    accepted(LLAMA_30B, "tgi", "0.8", 4, "a100")
    assert refused(LLAMA_30B, "tgi", "3.3", 8, "t4").endswith("use one of 1, 2, 4 (none of which holds it on a t4)")


@pytest.mark.parametrize("version", ["0.8", "3.3"])
def test_a_sharded_llama_on_v100(version):
    reason = refused(LLAMA_7B, "tgi", version, 2, "v100")
    assert "flash attention" in reason and "on a v100-32g" in reason and "use --num-shard 1" in reason
    accepted(BLOOM_7B, "tgi", version, 2, "v100")  # never flash: shards everywhere
    accepted(LLAMA_7B, "tgi", version, 2, "t4")


def test_a_llama_with_grouped_queries_on_08():
    reason = refused(LLAMA_70B, "tgi", "0.8", 8, "a100")
    assert "8 key-value heads for 64 heads, it has no grouped queries" in reason and "--version 3.3 or --engine vllm" in reason
    accepted(LLAMA_70B, "tgi", "3.3", 8, "a100")


def test_a_prefixed_bloom_folder_on_33():
    reason = refused(BLOOM_7B, "tgi", "3.3", 1, "a100", files=PREFIXED_BLOOM, where="exports/my bloom/")
    command = "pipedock to-hf --input 'exports/my bloom' --output 'exports/my bloom-tgi-3' --target tgi-3"
    assert "transformer." in reason and reason.endswith(command)
    accepted(BLOOM_7B, "tgi", "3.3", 1, "a100", files=BARE_BLOOM)


def test_every_reason_is_said_at_once():
    reasons = ask(LLAMA_30B, "tgi", "0.8", 8, "v100", gpus=4, driver="418.40", dtype="bf16", max_input=10, max_total=5).reasons
    words = ("4 GPUs here", "flash attention", "52 attention heads", "418.40", "--dtype bf16", "--max-input-tokens 10")
    assert len(reasons) == len(words) and all(any(word in reason for reason in reasons) for word in words)
    assert not any("\n" in reason for reason in reasons)


# Shard counts, section 5 of the contract -----------------------------------------------------------------------------------


@pytest.mark.parametrize("config, engine, version, shards", [
    (BLOOM_7B, "tgi", "0.8", [1, 2, 4, 8, 16, 32]), (BLOOM_7B, "tgi", "3.3", [1, 2, 4, 8, 16, 32]),
    (BLOOM_7B, "vllm", None, [1, 2, 4, 8, 16, 32]), (BLOOM_176B, "tgi", "3.3", [1, 2, 4, 7, 8, 14, 16, 28, 56]),
    (LLAMA_7B, "tgi", "0.8", [1, 2, 4, 8, 16, 32]), (LLAMA_13B, "tgi", "3.3", [1, 2, 4, 8]), (LLAMA_30B, "tgi", "0.8", [1, 2, 4]),
    (LLAMA_70B, "tgi", "3.3", [1, 2, 4, 8]), (LLAMA_70B, "vllm", None, [1, 2, 4, 8, 16, 32, 64]),  # 3.3 replicates no KV head
    (SMOLLM2, "tgi", "3.3", [1, 3]), (SMOLLM2, "vllm", None, [1, 3]),
    (llama(vocab_size=32003), "tgi", "0.8", [1, 2, 4, 8, 16, 32]),  # llama's vocabulary is replicated where it does not divide
    (bloom(vocab_size=250882), "tgi", "0.8", [1, 2]),  # bloom's is asserted by 0.8
    (bloom(vocab_size=250882), "tgi", "3.3", [1, 2, 4, 8, 16, 32]), (bloom(vocab_size=250882), "vllm", None, [1, 2, 4, 8, 16, 32]),
    (llama(hidden=4100, heads=40, head_dim=128), "tgi", "0.8", [1, 2, 4]),  # 0.8 asserts the hidden size
    (llama(hidden=4100, heads=40, head_dim=128), "tgi", "3.3", [1, 2, 4, 8]),
    (QWEN2_7B, "tgi", "3.3", [1, 2, 4, 7, 14, 28]),  # by its heads alone
])  # fmt: skip
def test_the_counts_that_a_server_splits_into(config, engine, version, shards):
    assert split.valid(engines.find(engine, version), sizes_of(config)) == shards


def test_what_does_not_divide_is_named():
    assert "11008 of the intermediate size" in ask(LLAMA_7B, "tgi", "3.3", 3).reasons[0]
    assert "8 key-value heads" in refused(LLAMA_70B, "tgi", "3.3", 16) and "use one of 1, 2, 4, 8" in refused(
        LLAMA_70B, "tgi", "3.3", 16
    )
    assert "250882 of the vocabulary" in refused(bloom(vocab_size=250882), "tgi", "0.8", 4)


def test_more_shards_than_gpus_and_none():
    assert refused(LLAMA_7B, "tgi", "3.3", 8, "t4", gpus=4) == "--num-shard 8: there are 4 GPUs here; use one of 1, 2, 4"
    accepted(LLAMA_7B, "tgi", "3.3", 4, "t4", gpus=4)
    assert "--num-shard 0: expected 1 or more" in ask(LLAMA_7B, "tgi", "3.3", 0, "t4").reasons


def test_08_shards_only_types_with_a_class_of_their_own():
    """Its AutoModel refuses; 3.3 shards any type through its own backend, where there is flash attention."""
    assert "TGI 0.8.2 does not shard qwen2" in refused(QWEN2_7B, "tgi", "0.8", 2, "a100")
    accepted(dict(QWEN2_7B, model_type="gpt_neox"), "tgi", "0.8", 2, "v100-32g", nbytes=2**34)
    accepted(QWEN2_7B, "tgi", "3.3", 2, "t4", nbytes=2**34)
    assert "shards qwen2 through flash attention only" in refused(QWEN2_7B, "tgi", "3.3", 2, "v100", nbytes=2**34)


# What 0.8 computes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config, word", [
    (LLAMA_31, "rope_theta is 500000.0"), (llama(head_dim=64), "head_dim is 64, it computes 128"),
    (VICUNA_16K, "rope_scaling"), (llama(attention_bias=True), "attn_bias"), (llama(mlp_bias=True), "mlp_bias"),
    (llama(rope_scaling={"type": "yarn", "factor": 2.0}), "yarn"),  # our own blocks do not know it either
])  # fmt: skip
def test_08_would_compute_these_wrongly(config, word):
    assert any(word in reason and "--version 3.3" in reason for reason in ask(config, "tgi", "0.8").reasons)
    accepted(config, "tgi", "3.3")


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
def test_08_is_judged_as_the_export_for_it_is(variant):
    """export/targets.py refuses to write for 0.8 what it could not compute; both must say the same."""
    config = tiny_config(variant.family, **variant.overrides)
    try:
        targets.check(targets.find("tgi-0.8"), families.dims_of(config))
        refuses = False
    except UserError:
        refuses = True
    assert bool(ask(config, "tgi", "0.8").reasons) is refuses


def test_every_family_is_judged_by_all_its_sizes():
    for family in FAMILIES.values():
        sizes = sizes_of(family.tiny)
        assert sizes.dims is not None and None not in (sizes.heads, sizes.ffn, sizes.hidden, sizes.vocab, sizes.blocks)


# What is not judged --------------------------------------------------------------------------------------------------------


def test_a_type_that_is_not_ours_is_judged_by_what_can_be_known():
    verdict = accepted(QWEN2_7B, "tgi", "3.3", 4, "a10", nbytes=15_231_233_024)
    assert "'qwen2'" in note(verdict, "not judged: whether TGI 3.3.7 knows") and 3 < verdict.capacity["weights_gib_per_gpu"] < 4
    assert "--num-shard 3 does not divide 28 attention heads" in refused(QWEN2_7B, "tgi", "3.3", 3, "a10", nbytes=15_231_233_024)
    verdict = accepted({"model_type": "mamba"}, gpu="t4")
    assert verdict.capacity is None and note(verdict, "not judged: memory") and note(verdict, "names no attention heads")


def test_keys_that_our_own_blocks_refuse_do_not_stop_a_server_that_may_know_them():
    verdict = accepted(llama(rope_scaling={"type": "dynamic", "factor": 2.0}), "tgi", "3.3", 2, "t4", nbytes=2**33)
    assert "'dynamic'" in note(verdict, "not judged: what the server makes of a key")


def test_a_quantized_model_is_as_large_as_its_files_and_no_more_is_known():
    verdict = accepted(llama(quantization_config={"quant_method": "gptq"}), "tgi", "3.3", 1, "t4", nbytes=2**32)
    assert verdict.capacity["weights_gib_per_gpu"] == 4.0 and note(verdict, "not judged: the quantization")
    assert not any("quantization" in text for text in accepted(LLAMA_7B, "tgi", "3.3", 1, "t4").notes)


def test_a_config_without_a_model_type_or_with_impossible_sizes():
    assert "model_type: missing" in refused({"num_attention_heads": 4})
    for wrong in (0, -3, 2.5, "32", True, 10**400, float("inf")):
        with pytest.raises(UserError, match="num_attention_heads: expected a positive whole number"):
            ask(llama(num_attention_heads=wrong))


def test_versions_and_engines_that_are_not_known():
    for engine, version, words in (
        ("tgi", "1.4", r"--version 1.4: its limits are not known; known of tgi: 0.8 \(0.8.2\), 3.3 \(3.3.7\)"),
        ("vllm", "0.6", "--version 0.6"),
        ("embedded", None, "--engine embedded: not a server that runs in a container here: tgi, vllm"),
        ("tgi", "3.30", "--version 3.30"), ("tgi", "", "--version"), ("tgi", "3", "--version 3"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=words):
            ask(LLAMA_7B, engine, version)


def test_another_release_of_a_known_line_is_judged_like_it_and_named_by_its_own_tag():
    verdict = accepted(LLAMA_7B, "tgi", "3.3.5", 1, "a100")
    assert verdict.image.endswith(":3.3.5") and verdict.version == "3.3.5" and note(verdict, "judged by what is known of 3.3")
    assert accepted(LLAMA_7B, "vllm", "v0.18.1").image == "vllm/vllm-openai:v0.18.1"
    assert not any("judged by" in text for text in accepted(LLAMA_7B, "tgi", "3.3.7").notes)


def test_every_server_that_is_pinned_has_its_limits():
    for row in engines.table():
        for gpu in ("t4", "h100", "cpu", None):
            verdict = ask(LLAMA_7B, row["engine"], row["version"], 1, gpu, driver="600.1")
            assert verdict.image == "%s:%s" % (row["image"], row["tag"]) and bool(verdict.capacity) is (gpu in ("t4", "h100"))


def test_old_files_are_read_under_their_own_names():
    accepted(LLAMA_2023, "tgi", "0.8", 8, "t4")
    accepted(BLOOM_176B, "tgi", "0.8", 8, "a100")


def test_the_example_of_the_docstring():
    verdict = judge(Question(LLAMA_7B, "tgi", "3.3", shards=2, gpu="t4", files=NEW_LLAMA, nbytes=1, where="exports/my-model"))
    assert verdict.reasons == []


NUMBERS = st.one_of(st.none(), st.integers(-1, 200000), st.integers(), st.floats(), st.text(max_size=3), st.booleans())
KEYS = (
    "num_attention_heads n_head num_key_value_heads hidden_size head_dim intermediate_size num_hidden_layers vocab_size "
    "max_position_embeddings torch_dtype rope_scaling tie_word_embeddings quantization_config model_type"
).split()


@settings(max_examples=150, deadline=None)
@given(
    base=st.sampled_from([LLAMA_7B, BLOOM_7B, QWEN2_7B, {}]), changes=st.dictionaries(st.sampled_from(KEYS), NUMBERS, max_size=3),
    engine=st.sampled_from([("tgi", "0.8"), ("tgi", "3.3"), ("vllm", None)]), shards=st.integers(-1, 9),
    gpu=st.sampled_from([None, "t4", "v100", "h100", "cpu"]), nbytes=st.sampled_from([None, 0, 2**34]),
    total=st.sampled_from([None, 1, 4096, 10**9]),
)  # fmt: skip
def test_any_config_gets_an_answer_or_one_line(base, changes, engine, shards, gpu, nbytes, total):
    try:
        verdict = ask(dict(base, **changes), *engine, shards, gpu, nbytes=nbytes, max_total=total)
    except UserError as error:
        assert "\n" not in str(error)
        return
    assert not any("\n" in text for text in verdict.reasons + verdict.notes)
