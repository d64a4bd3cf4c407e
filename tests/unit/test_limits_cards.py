"""``serve.limits``: cards, drivers, dtypes, kernels (section 4.4 of the contract, NVIDIA's compatibility, vLLM's platforms)."""

import pytest

from pipeline_train.errors import UserError
from pipeline_train.plan.cards import GPUS
from serve.limits import gpus
from tests.limits import BLOOM_7B, LLAMA_7B, accepted, ask, bloom, llama, note, refused
from tests.real_configs import BLOOM_560M, LLAMA_31

KERNELS = "--disable-custom-kernels"


def test_every_card_of_the_plan_has_a_compute_capability():
    assert set(gpus.CAPABILITY) == set(GPUS)


# Flash attention, kernels of bloom -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("gpu, old, new", [
    ("v100-16g", False, False), ("t4", True, True), ("a100-40g", True, True), ("a10", True, True), ("l4", True, True),
    ("4090", True, True), ("h100", True, True), ("h200", True, True), ("b200", None, True), ("5090", None, True),
    ("cpu", False, False),
])  # fmt: skip
def test_where_a_llama_can_be_sharded(gpu, old, new):
    """SM 7.5, 8.x, 9.0 in 0.8, whose libraries end there; 7.5 and from 8.0 on in 3.3."""
    for version, works in (("0.8", old), ("3.3", new)):
        reasons = ask(LLAMA_7B, "tgi", version, 2, gpu).reasons
        assert any("flash attention" in reason for reason in reasons) is (not works)
        assert any("holds no code for" in reason and "--version 3.3" in reason for reason in reasons) is (works is None)


@pytest.mark.parametrize(
    "gpu, old", [("v100", True), ("t4", True), ("a100", False), ("l4", False), ("h100", False), ("cpu", True), (None, False)]
)
def test_bloom_without_its_custom_kernel_exactly_where_the_contract_says(gpu, old):
    config = BLOOM_560M
    verdict = accepted(config, "tgi", "0.8", 1, gpu)
    assert verdict.flags.count(KERNELS) == (1 if old else 0)
    assert any(text.startswith(KERNELS) for text in verdict.notes) is old  # and why
    assert (KERNELS in accepted(config, "tgi", "3.3", 1, gpu).flags) is (gpu == "cpu")
    assert KERNELS not in ask(config, "vllm", None, 1, gpu).flags
    assert KERNELS not in accepted(LLAMA_7B, "tgi", "0.8", 1, gpu).flags


def test_blooms_limit_of_4096_tokens_in_08():
    verdict = accepted(BLOOM_7B, "tgi", "0.8", 1, "a100")
    assert verdict.capacity["max_context"] == 4095 and "fewer than 4096 tokens" in note(verdict, "4096")
    verdict = accepted(BLOOM_7B, "tgi", "0.8", 1, "a100", max_total=4096)
    assert KERNELS in verdict.flags and verdict.capacity["max_context"] > 4096
    assert KERNELS not in accepted(BLOOM_7B, "tgi", "0.8", 1, "a100", max_total=4095).flags
    assert KERNELS not in accepted(BLOOM_7B, "tgi", "3.3", 1, "a100", max_total=8000).flags  # it leaves the kernel out by itself


def test_llama_on_a_t4_gets_paged_attention_from_33():
    verdict = accepted(LLAMA_7B, "tgi", "3.3", 2, "t4")
    assert verdict.env == {"ATTENTION": "paged"} and "flashinfer" in note(verdict, "ATTENTION=paged")
    assert not any("no flash attention" in text for text in verdict.notes)  # it is there
    for version, gpu, config in (
        ("0.8", "t4", LLAMA_7B),
        ("3.3", "a100", LLAMA_7B),
        ("3.3", "t4", BLOOM_560M),
        ("3.3", "v100", LLAMA_7B),
    ):
        assert accepted(config, "tgi", version, 1, gpu).env == {}


def test_without_a_gpu():
    for version in ("0.8", "3.3"):
        verdict = accepted(BLOOM_560M, "tgi", version, 1, "cpu")
        assert verdict.capacity is None and verdict.gpu == "cpu"
        assert "padded batches" in note(accepted(LLAMA_7B, "tgi", version, 1, "none"), "without a GPU")
    assert "use --engine embedded" in refused(LLAMA_7B, "vllm", None, 1, "cpu")
    assert accepted(BLOOM_560M, "tgi", "0.8", 1, "cpu", dtype="fp32") and refused(BLOOM_560M, "tgi", "3.3", 1, "a100", dtype="fp32")
    assert "TGI 0.8.2 has no such choice, it computes in fp32" in refused(BLOOM_560M, "tgi", "0.8", 1, "cpu", dtype="fp16")


def test_a_card_that_is_not_named_or_not_known():
    verdict = accepted(LLAMA_7B, "tgi", "3.3", 8)
    assert note(verdict, "not judged: the card") and verdict.capacity is None and verdict.gpu is None
    with pytest.raises(UserError, match="--gpu: 'v1000' is not known; did you mean v100-32g"):
        ask(LLAMA_7B, gpu="v1000")


# Drivers -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine, version, least, older", [
    ("tgi", "0.8", "450.80.02", "450.51.06"), ("tgi", "3.3", "525.60.13", "515.65.01"), ("vllm", None, "525.60.13", "470.57.02"),
])  # fmt: skip
def test_the_least_driver_of_each_image(engine, version, least, older):
    assert "minor-version compatibility" in note(
        accepted(LLAMA_7B, engine, version, 1, "a100", driver=least), "NVIDIA_DISABLE_REQUIRE"
    )
    reason = refused(LLAMA_7B, engine, version, 1, "a100", driver=older)
    assert reason.startswith("driver %s is too old for CUDA" % older) and "install %s or newer" % least in reason
    assert ("use --version 0.8" in reason) is (version == "3.3")


def test_drivers_that_need_no_remark():
    for engine, version, driver in (
        ("tgi", "0.8", "520.61.05"),
        ("tgi", "3.3", "535.54.03"),
        ("vllm", None, "580"),
        ("tgi", "0.8", "600.1"),
    ):
        assert not any("driver" in text for text in accepted(LLAMA_7B, engine, version, 1, "a100", driver=driver).notes)
    assert "needs 450.80.02 or newer for CUDA 11.8" in note(accepted(LLAMA_7B, "tgi", "0.8", 1, "t4"), "not judged: the driver")
    assert not any("driver" in text for text in accepted(LLAMA_7B, "tgi", "0.8", 1, "cpu").notes)


@pytest.mark.parametrize("driver", ["", "new", "515.", "v515", "515.65.01 "])
def test_a_driver_that_is_no_version(driver):
    if driver.endswith(" "):
        accepted(LLAMA_7B, "tgi", "0.8", 1, "t4", driver=driver)
        return
    with pytest.raises(UserError, match="--driver .*expected a version such as 515.65.01"):
        ask(LLAMA_7B, "tgi", "0.8", 1, "t4", driver=driver)


# Dtypes --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bf16", "bfloat16"])
@pytest.mark.parametrize("engine, version", [("tgi", "3.3"), ("vllm", None)])
def test_bf16_on_cards_that_have_none(engine, version, dtype):
    for gpu, capability in (("v100", "7.0"), ("t4", "7.5")):
        reason = refused(BLOOM_560M, engine, version, 1, gpu, dtype=dtype)
        assert "does not compute in bf16" in reason and capability in reason and "use fp16" in reason
        accepted(BLOOM_560M, engine, version, 1, gpu, dtype="float16")
    accepted(BLOOM_560M, engine, version, 1, "a100", dtype=dtype)
    accepted(BLOOM_560M, engine, version, 1, None, dtype=dtype)


def test_dtypes_that_a_server_does_not_have():
    assert "TGI 0.8.2 has no such choice, it computes in fp16" in refused(LLAMA_7B, "tgi", "0.8", 1, "a100", dtype="bfloat16")
    accepted(LLAMA_7B, "tgi", "0.8", 1, "a100", dtype="fp16")
    assert "computes in fp16 or bf16 on a GPU" in refused(LLAMA_7B, "tgi", "3.3", 1, "a100", dtype="float32")
    accepted(LLAMA_7B, "vllm", None, 1, "a100", dtype="fp32")
    accepted(LLAMA_7B, "vllm", None, 1, "a100", dtype="auto")
    with pytest.raises(UserError, match="--dtype int8: not one of those there are: fp16, bf16, fp32"):
        ask(LLAMA_7B, dtype="int8")


def test_weights_in_bf16():
    """vLLM takes the file's dtype; TGI fp16 in any case, with a smaller range than the model was trained in."""
    assert accepted(LLAMA_31, "vllm", None, 2, "t4").flags[:2] == ["--dtype", "float16"]
    assert "--dtype" not in accepted(LLAMA_31, "vllm", None, 1, "a100").flags
    assert "--dtype" not in accepted(LLAMA_31, "vllm", None, 2, "t4", dtype="half").flags
    assert "--dtype bfloat16" in note(accepted(LLAMA_31, "tgi", "3.3", 1, "a100"), "the weights are bf16")
    assert "all that a t4 computes in" in note(accepted(LLAMA_31, "tgi", "3.3", 2, "t4"), "the weights are bf16")
    assert not any("bf16" in text for text in accepted(llama(), "tgi", "3.3", 1, "a100").notes)
    assert note(
        accepted(bloom(torch_dtype="bfloat16"), "tgi", "0.8", 1, "a100"), "the weights are bf16; TGI 0.8.2 serves them in fp16"
    )
