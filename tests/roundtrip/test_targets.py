"""What each target's server finds in an export is the trained model, or the export is refused with the reason."""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from export import bins, targets
from export.to_hf import to_hf
from export.verify import verify
from pipeline_train import families
from pipeline_train.errors import UserError
from pipeline_train.weights import open_source, same_bits
from pipeline_train.weights.writing import Item
from tests.models import make_hf, tiny_config
from tests.roundtrip.folders import change_weights, failing, make_checkpoint, needs, rewrite, state_of, write_tokenizer_core
from tests.roundtrip.servers import SERVERS, Unservable, tgi_bloom
from tests.tokenizers import tiny_tokenizer

CASES = [(target, family, tied, dtype) for target, family in SERVERS for tied in (True, False) for dtype in ("fp32", "bf16")]


@pytest.mark.parametrize("target, family, tied, dtype", CASES)
def test_every_server_finds_the_trained_model(target, family, tied, dtype, tmp_path):
    model = make_checkpoint(tmp_path / "c", tiny_config(family, tie_word_embeddings=tied))
    if family == "bloom" and not tied and target in ("tgi-3", "vllm"):
        with pytest.raises(UserError) as caught:
            to_hf(str(tmp_path / "c"), str(tmp_path / "x"), target=target)
        assert "--target %s: this model's head is not its embedding, and this server takes the embedding" % target in str(
            caught.value
        )
        assert not (tmp_path / "x").exists()
        return
    told = to_hf(str(tmp_path / "c"), str(tmp_path / "x"), target=target, dtype=dtype, shard_size="60KB")
    assert told["target"] == target
    expected = {name: t.to({"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]) for name, t in state_of(model).items()}
    for version, find in SERVERS[target, family].items():
        found = find(tmp_path / "x", set(expected))
        assert set(found) == set(expected), version
        assert all(same_bits(found[name], expected[name]) for name in expected), version
    proof = verify(str(tmp_path / "c"), str(tmp_path / "x"))
    assert proof["holds"] and proof["target"] == target and proof["whole_model"]["compared"]
    loaded, info = AutoModelForCausalLM.from_pretrained(str(tmp_path / "x"), output_loading_info=True, torch_dtype="auto")
    assert not info["unexpected_keys"] and not info["mismatched_keys"]
    assert all(same_bits(tensor, expected[name]) for name, tensor in state_of(loaded).items())


def test_a_plain_bloom_is_what_tgi_3_cannot_find(tmp_path):
    """The reason for the target, and proof that the oracle can say no."""
    model = make_checkpoint(tmp_path / "c", tiny_config("bloom"))
    to_hf(str(tmp_path / "c"), str(tmp_path / "hf"))
    to_hf(str(tmp_path / "c"), str(tmp_path / "tgi"), target="tgi-3")
    names = set(state_of(model))
    with pytest.raises(Unservable, match=r"^weight (h\.\d|word|ln_f).* does not exist"):
        tgi_bloom([""])(tmp_path / "hf", names)
    tgi_bloom(["", "transformer."])(tmp_path / "hf", names)
    assert all(not name.startswith(("transformer.", "lm_head")) for name in open_source(str(tmp_path / "tgi")).names())


def test_an_untied_head_that_equals_the_embedding(tmp_path):
    """Trained tied, saved untied: right on a server that takes the embedding, so it is exported, as tied."""
    make_hf(tmp_path / "hf", tiny_config("bloom", tie_word_embeddings=False))
    rewrite(tmp_path / "hf", lambda s: s.update({"lm_head.weight": s["transformer.word_embeddings.weight"].clone()}))
    told = to_hf(str(tmp_path / "hf"), str(tmp_path / "x"), target="tgi-3")
    assert json.loads((tmp_path / "x" / "config.json").read_text())["tie_word_embeddings"] is True and told["notes"] == []
    assert verify(str(tmp_path / "hf"), str(tmp_path / "x"))["holds"]
    assert verify(str(tmp_path / "hf"), str(tmp_path / "x"), whole=False)["holds"]


REFUSED = {
    "grouped queries": ({"num_key_value_heads": 2}, "2 key-value heads for 4 heads, it has no grouped queries"),
    "theta": ({"rope_theta": 500000.0}, "rope_theta is 500000.0, it computes 10000.0"),
    "scaling": ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope_scaling is RopeScaling"),
    "attention bias": ({"attention_bias": True}, "attn_bias is True, it computes False"),
    "mlp bias": ({"mlp_bias": True}, "mlp_bias is True, it computes False"),
    "head_dim": ({"head_dim": 20}, "head_dim is 20, it computes 12"),
}


@pytest.mark.parametrize("why", REFUSED)
def test_what_tgi_08_would_compute_wrongly_is_refused(why):
    """Its transformers ignores these keys, and answers nonsense."""
    changes, reason = REFUSED[why]
    dims = families.dims_of(tiny_config("llama", **changes))
    with pytest.raises(UserError) as caught:
        targets.check(targets.find("tgi-0.8"), dims)
    assert reason in str(caught.value) and "Use --target tgi-3 or vllm" in str(caught.value)
    for name in ("hf", "tgi-3", "vllm"):
        targets.check(targets.find(name), dims)


@pytest.mark.parametrize("target", ["tgi-0.8", "hf"])
@pytest.mark.parametrize("kind, model", [("bpe", False), ("spm", True)])
def test_tokenizers_of_2023_can_be_read(kind, model, target, tmp_path):
    """Merges as "a b"; the same ids; tokenizer.model, or for tgi-0.8 a note that it is missing."""
    make_hf(tmp_path / "hf", tiny_config("llama", vocab_size=520))
    tiny_tokenizer(tmp_path / "hf", kind, vocab=512 if kind == "bpe" else 420)
    told = to_hf(str(tmp_path / "hf"), str(tmp_path / "x"), target=target)
    core = json.loads((tmp_path / "x" / "tokenizer.json").read_text(encoding="utf-8"))
    assert core["model"]["merges"] and all(isinstance(pair, str) and pair.count(" ") == 1 for pair in core["model"]["merges"])
    a, b = (AutoTokenizer.from_pretrained(str(tmp_path / name)) for name in ("hf", "x"))
    for text in ("Hello, how are you?", "你好", "a  b\n"):
        assert a(text)["input_ids"] == b(text)["input_ids"]
    assert (tmp_path / "x" / "tokenizer.model").exists() is model
    assert [("there is no tokenizer.model" in note) for note in told["notes"]] == ([] if model or target == "hf" else [True])
    assert verify(str(tmp_path / "hf"), str(tmp_path / "x"))["holds"]
    write_tokenizer_core(tmp_path / "x", lambda core: core["model"]["merges"].reverse())
    assert "tokenizer.json: differs from the checkpoint's" in failing(tmp_path / "hf", tmp_path / "x")[0]


def test_merges_that_cannot_be_joined(tmp_path):
    make_hf(tmp_path / "hf", tiny_config("llama", vocab_size=520))
    tiny_tokenizer(tmp_path / "hf", "bpe", vocab=512)
    write_tokenizer_core(tmp_path / "hf", lambda core: core["model"].update(merges=[["a b", "c"]]))
    with pytest.raises(UserError, match="tokenizer.json: merges tokens with a blank in them"):
        to_hf(str(tmp_path / "hf"), str(tmp_path / "x"), target="tgi-0.8")
    assert not (tmp_path / "x").exists() and not (tmp_path / ".x.partial").exists()
    to_hf(str(tmp_path / "hf"), str(tmp_path / "x"), target="hf")
    assert (tmp_path / "x" / "tokenizer.json").read_bytes() == (tmp_path / "hf" / "tokenizer.json").read_bytes()


def test_our_bin_files_are_torchs(tmp_path):
    """torch.load gives the same tensors, by either reader; a scalar, an empty one and every dtype."""
    tensors = {
        "a": torch.randn(3, 5), "b": torch.randn(7).half(), "c": torch.randn(2, 2, 2).bfloat16(), "scalar": torch.tensor(1.5),
        "none": torch.zeros(0, 3),
    }  # fmt: skip
    kinds = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
    items = [Item(name, kinds[t.dtype], tuple(t.shape)) for name, t in tensors.items()]

    def pieces(item):
        flat = tensors[item.name].reshape(-1)
        return [flat[:2], flat[2:]]

    bins.write(tmp_path / "pytorch_model.bin", items, pieces)
    for only in (True, False):
        read = torch.load(str(tmp_path / "pytorch_model.bin"), map_location="cpu", weights_only=only)
        assert list(read) == list(tensors) and all(same_bits(read[name], tensors[name]) for name in tensors)
        assert all(read[name].stride() == tensors[name].stride() for name in tensors)


SPOILT = {
    "another value": (lambda s: s["model.norm.weight"].mul_(2), "model.norm.weight differs from the safetensors file's"),
    "missing": (lambda s: s.pop("model.norm.weight"), "pytorch_model.bin: model.norm.weight is missing"),
    "extra": (lambda s: s.update(more=torch.ones(1)), "holds more, which the safetensors files do not"),
    "narrower": (lambda s: s.update({"lm_head.weight": s["lm_head.weight"].half()}), "lm_head.weight differs"),
}


@pytest.mark.parametrize("how", SPOILT)
def test_bin_files_are_proved_too(how, tmp_path):
    change, message = SPOILT[how]
    make_checkpoint(tmp_path / "c", tiny_config("llama"))
    to_hf(str(tmp_path / "c"), str(tmp_path / "x"), target="tgi-0.8")
    path = tmp_path / "x" / "pytorch_model.bin"
    state = torch.load(str(path), weights_only=True)
    change(state)
    torch.save(state, str(path))
    assert message in failing(tmp_path / "c", tmp_path / "x")[0]


def test_the_proof_knows_the_target(tmp_path):
    """By the page in the export; one that does not fit the files fails."""
    make_checkpoint(tmp_path / "c", tiny_config("bloom"))
    to_hf(str(tmp_path / "c"), str(tmp_path / "x"), target="tgi-3")
    page = tmp_path / "x" / "pipedock-export.json"
    assert json.loads(page.read_text())["target"] == "tgi-3"
    page.write_text(page.read_text().replace("tgi-3", "hf"))
    assert "missing: lm_head.weight, transformer.h.0" in failing(tmp_path / "c", tmp_path / "x")[0]
    page.write_text('{"target": "elsewhere"}')
    assert "--target elsewhere: not one of those there are" in failing(tmp_path / "c", tmp_path / "x")[0]


@needs((4, 43), "chat_template.jinja")
@pytest.mark.parametrize("target", targets.TARGETS)
def test_every_target_has_the_template_inside_tokenizer_config(target, tmp_path):
    """TGI 3.3 does not read chat_template.jinja."""
    make_hf(tmp_path / "hf", tiny_config("bloom", vocab_size=520))
    tiny_tokenizer(tmp_path / "hf", "bpe", vocab=512)
    (tmp_path / "hf" / "chat_template.jinja").write_text("{{ messages[0]['content'] }}!")
    to_hf(str(tmp_path / "hf"), str(tmp_path / "x"), target=target)
    assert json.loads((tmp_path / "x" / "tokenizer_config.json").read_text())["chat_template"] == "{{ messages[0]['content'] }}!"


def test_an_export_for_one_server_is_made_from_one_for_another(tmp_path):
    """Any folder is a source: bare keys, a head that is not there, .bin files beside."""
    model = make_checkpoint(tmp_path / "c", tiny_config("bloom"))
    to_hf(str(tmp_path / "c"), str(tmp_path / "a"), target="tgi-3")
    to_hf(str(tmp_path / "a"), str(tmp_path / "b"), target="tgi-0.8")
    to_hf(str(tmp_path / "b"), str(tmp_path / "d"), target="hf")
    source = open_source(str(tmp_path / "d"))
    assert {"lm_head.weight", "transformer.ln_f.bias"} <= set(source.names())
    assert same_bits(source.tensor(4, "lm_head.weight"), state_of(model)["lm_head.weight"])
    shutil.rmtree(str(tmp_path / "a"))
    change_weights(tmp_path / "d", lambda s: s["transformer.ln_f.bias"].add_(1))
    assert "transformer.ln_f.bias" in failing(tmp_path / "b", tmp_path / "d")[0]


@pytest.mark.parametrize(
    "family, tied, head", [("llama", True, False), ("llama", False, True), ("bloom", True, True), ("bloom", False, True)]
)
def test_which_hf_exports_carry_a_head(family, tied, head):
    config = tiny_config(family, tie_word_embeddings=tied)
    row = targets.exported(targets.find("hf"), families.family_of(config), families.dims_of(config))
    assert ("lm_head.weight" in [name for name, _, _ in row]) is head


def test_a_run_whose_export_cannot_be_served_is_refused_before_training():
    def dims(family, **changes):
        return families.dims_of(tiny_config(family, **changes))

    targets.check_run("tgi-3", dims("bloom"))
    for name in ("tgi-3", "vllm"):
        targets.check_run(name, dims("llama"))
        with pytest.raises(UserError, match="export.target: %s: this run trains a head of its own" % name):
            targets.check_run(name, dims("bloom", tie_word_embeddings=False))
    targets.check_run("tgi-0.8", dims("bloom", tie_word_embeddings=False))
    with pytest.raises(UserError, match="no grouped queries"):
        targets.check_run("tgi-0.8", dims("llama", num_key_value_heads=2))
