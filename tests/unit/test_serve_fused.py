"""What the embedded server changes in transformers' modules for a GPU computes the same."""

import pytest

pytest.importorskip("starlette", reason="the embedded server needs Python 3.10")
import torch  # noqa: E402

from serve.embedded import alibi, attention, fused  # noqa: E402
from serve.embedded.cache import SlotCache, Step  # noqa: E402
from serve.embedded.engine import Engine  # noqa: E402
from tests import greedy  # noqa: E402
from tests.models import make_hf, tiny_config  # noqa: E402

CASES = {
    "llama": tiny_config("llama", attention_bias=True),
    "llama-gqa-tied": tiny_config("llama", num_key_value_heads=2, tie_word_embeddings=True),
    "bloom": tiny_config("bloom"),
}


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.inference_mode():
        yield


@pytest.mark.parametrize("heads", [4, 6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bloom_with_our_attention_is_the_same(tmp_path, heads, dtype):
    model = make_hf(tmp_path, tiny_config("bloom", hidden_size=96, n_head=heads)).to(dtype)
    ids = torch.arange(5, 60)[None]
    plain = model(ids, use_cache=False).logits
    cache = SlotCache()
    undo = alibi.take(model, attention.register("here", cache))
    cache.step = Step(0, [0], [ids.shape[1]], False, ids.device)
    mask = torch.zeros(1, 1, 1, 1, dtype=dtype)
    ours = model(input_ids=ids, past_key_values=cache, use_cache=True, attention_mask=mask).logits
    assert (ours - plain).abs().max() <= plain.abs().max() * (1e-5 if dtype == torch.float32 else 1e-2)
    undo()
    assert torch.equal(model(ids, use_cache=False).logits, plain)


@pytest.mark.parametrize("recorded", [False, True])
def test_a_bloom_whose_attention_is_another_keeps_its_own(tmp_path, monkeypatch, recorded):
    assert alibi.take(make_hf(tmp_path / "llama", CASES["llama"]), None) is None
    monkeypatch.setattr(alibi._Attention, "__call__", lambda self, hidden_states, *given, **named: (hidden_states, None))
    model = make_hf(tmp_path / "bloom", CASES["bloom"])
    engine = Engine(str(tmp_path / "bloom"))
    if recorded:
        engine.record(lambda: lambda run: run)
    assert engine.attention == "the model's own" and engine.graphs is recorded
    assert greedy.of_engine(engine, [5, 6, 7], 4)[0] == greedy.of_model(model, [5, 6, 7], 4)


@pytest.fixture
def llama_module(monkeypatch):
    from transformers.models.llama import modeling_llama

    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", modeling_llama.apply_rotary_pos_emb)
    return modeling_llama


@pytest.mark.parametrize("weights, same", [("ones", True), ("random", True), ("one more", False)])
def test_norms_are_fused_where_they_are_the_same(weights, same, llama_module):
    norm = llama_module.LlamaRMSNorm(64)
    if weights != "ones":
        norm.weight.copy_(torch.randn(64))
    if weights == "one more":
        norm.forward = lambda x, plain=norm.forward: plain(x) + x  # as if it multiplied by 1 + w
    x = torch.randn(3, 64)
    wanted = norm(x)
    assert fused.fuse(torch.nn.Sequential(norm))[0] == same
    assert ("rms_norm" in norm.forward.__code__.co_names) == same
    assert torch.allclose(norm(x), wanted, rtol=1e-6)


@pytest.mark.parametrize("case", sorted(CASES))
def test_a_fused_model_is_the_same(case, tmp_path, llama_module):
    model = make_hf(tmp_path, CASES[case])
    ids = torch.tensor([[5, 9, 3, 3, 40, 7], [8, 2, 60, 61, 5, 5]])
    wanted = model(ids).logits
    norms, rotations, projections = fused.fuse(model)
    blocks = 0 if case.startswith("bloom") else model.config.num_hidden_layers
    assert (norms, rotations, projections) == (2 * blocks + bool(blocks), bool(blocks), 2 * blocks)
    assert torch.allclose(model(ids).logits, wanted, rtol=1e-4, atol=1e-5)
    shared = [part for part in model.modules() if isinstance(part, fused.Part)]
    assert all(part.weight.untyped_storage().data_ptr() == part._product.weight.untyped_storage().data_ptr() for part in shared)
    assert Engine(str(tmp_path)).attention  # a second model meets the rotation that is there


def test_queries_and_keys_are_copied_only_where_they_do_not_lie_together():
    y = torch.randn(2, 3, 6 * 8)  # of each token four queries, a key, a value
    heads = y.view(2, 3, 6, 8).transpose(1, 2)
    q, k, v = heads[:, :4], heads[:, 4:5], heads[:, 5:]
    together = fused._beside(q, k)
    assert together.data_ptr() == y.data_ptr() and torch.equal(together, torch.cat([q, k], 1))
    for other in (v, k.clone(), k.contiguous(), q[:, :1]):
        copied = fused._beside(q, other)
        assert copied.data_ptr() != y.data_ptr() and torch.equal(copied, torch.cat([q, other], 1))


def test_what_cannot_be_fused_is_left(tmp_path, llama_module):
    llama_module.apply_rotary_pos_emb = lambda q, k, cos, sin: (k, q)
    model = make_hf(tmp_path, CASES["llama"])
    model.model.layers[0].self_attn.k_proj = torch.nn.Identity()
    blocks = model.config.num_hidden_layers
    assert fused.fuse(model) == (2 * blocks + 1, False, 2 * blocks - 1)
