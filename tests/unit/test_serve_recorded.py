"""Recorded passes: recorded once, for any model, and no request is met by another."""

import pytest

pytest.importorskip("starlette", reason="the embedded server needs Python 3.10")
import torch  # noqa: E402

from serve.embedded import attention  # noqa: E402
from serve.embedded.engine import Engine  # noqa: E402
from serve.embedded.recorded import ROWS, WIDTHS  # noqa: E402
from serve.embedded.sampling import likeliest  # noqa: E402
from tests import greedy  # noqa: E402
from tests.models import make_hf, tiny_config  # noqa: E402

LLAMA = tiny_config("llama", max_position_embeddings=512)


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.inference_mode():
        yield


def made(folder, config=LLAMA, dtype=None):
    """-> (an engine that records, the plain model)"""
    model = make_hf(folder, config)
    engine = Engine(str(folder), dtype)
    engine.record(lambda: lambda run: run)
    assert engine.graphs
    return engine, model


def test_a_pass_is_recorded_once_for_its_shape(tmp_path):
    recorded = []
    make_hf(tmp_path, LLAMA)
    engine = Engine(str(tmp_path))
    engine.record(lambda: lambda run: recorded.append(1) or run)
    recorded.clear()
    for _ in range(2):
        engine.prefill(0, [5] * 20, 0)  # a piece of 64
        for length in range(20, 30):
            engine.decode([5], [length])
        engine.rest(10**6)
    assert len(recorded) == 2
    engine.prefill(1, [5] * 200, 0)  # of 256: rows and columns grow, so the tables move
    engine.decode([5, 6], [30, 200])
    engine.decode([5], [30])
    assert len(recorded) == 5
    engine.rest(100)  # less than the tables hold
    engine.prefill(0, [5] * 20, 0)
    assert len(recorded) == 6


def test_a_model_that_cannot_be_recorded_is_served_all_the_same(tmp_path, caplog):
    def fails(run):
        raise RuntimeError("operation not permitted when stream is capturing")

    model = make_hf(tmp_path, LLAMA)
    engine = Engine(str(tmp_path))
    engine.record(lambda: fails)
    assert "llama is served without CUDA graphs, slower: operation not permitted when stream is capturing" in caplog.text
    assert greedy.of_engine(engine, [5, 6, 7], 4)[0] == greedy.of_model(model, [5, 6, 7], 4)


@pytest.mark.parametrize("kind", ["gpt2", "opt"])
@pytest.mark.parametrize("length", [127, 128, 150, 190])
def test_a_model_with_a_table_of_positions_is_served_to_its_last_one(tmp_path, kind, length):
    """Unused rows and the padding of a prompt stand at columns that the table may not have."""
    from transformers import GPT2Config, OPTConfig

    if kind == "gpt2":
        config = GPT2Config(vocab_size=140, n_positions=200, n_embd=32, n_layer=2, n_head=2)
    else:
        config = OPTConfig(vocab_size=140, max_position_embeddings=200, hidden_size=32, word_embed_proj_dim=32, ffn_dim=48,
                           num_hidden_layers=2, num_attention_heads=2)  # fmt: skip
    engine, model = made(tmp_path, config.to_dict())
    ids = [3 + place * place % 130 for place in range(length)]
    assert greedy.of_engine(engine, ids, 6)[0] == greedy.of_model(model, ids, 6)


@pytest.mark.parametrize("family", ["llama", "bloom"])
def test_a_request_that_overflows_leaves_nothing_behind(tmp_path, family):
    engine, model = made(tmp_path, tiny_config(family))
    wanted = greedy.of_model(model, [5, 6, 7], 4)
    table = engine.model.get_input_embeddings().weight
    sound = table[20].clone()
    table[20] = float("inf")
    assert torch.isnan(engine.prefill(0, [5, 20] * 15, 0)).any()
    assert torch.isnan(engine.prefill(1, [5, 20] * 15, 0)).any()
    table[20] = sound
    engine.rest(10**6)
    assert greedy.of_engine(engine, [5, 6, 7], 4)[0] == wanted
    engine.prefill(2, [5, 6, 7], 0)
    engine.move(2, 1)  # over what the overflow left there
    engine.move(1, 0)
    tokens = [wanted[0]]
    for step in range(3):
        tokens.append(int(engine.decode([tokens[-1]], [3 + step])[0].argmax()))
    assert tokens == wanted


def test_the_likeliest_tokens_come_with_a_pass(tmp_path):
    engine, _ = made(tmp_path)
    for row in range(3):
        logits = engine.prefill(row, [5 + row, 6, 7], 0)
        assert torch.equal(engine.best, likeliest(logits)) and int(engine.best[0]) == int(logits.argmax())
    logits = engine.decode([8, 9, 10], [3, 3, 3])
    assert torch.equal(engine.best[:, :3], likeliest(logits)) and logits.argmax(-1).tolist() == engine.best[0, :3].tolist()
    engine.prefill(3, [5, 6, 7], 0, all_logits=True)  # not recorded
    assert engine.best is None


def planted(monkeypatch, wide, many):
    """An attention that computes small passes in another way."""
    plain = attention.sdpa

    def by_size(q, k, v, **how):
        small = 64 < k.shape[2] < wide or len(q) < many
        return plain(q, k, v, **how) * (1.00001 if small and q.shape[2] == 1 else 1)

    monkeypatch.setattr(attention, "sdpa", by_size)


@pytest.mark.parametrize("wide, many", [(128, 1), (256, 1), (1024, 1), (128, 4), (256, 4)])
def test_no_pass_is_so_small_that_its_size_changes_a_bit(tmp_path, monkeypatch, wide, many):
    """What a row gets must not depend on its neighbours."""
    planted(monkeypatch, wide, many)
    engine, _ = made(tmp_path, tiny_config("llama", max_position_embeddings=2048))
    assert engine._recorded.alike == {(n, width) for n in ROWS for width in WIDTHS if n >= many and width >= wide}
    engine.prefill(0, [5] * 50, 0)
    alone = engine.decode([7], [50])[0].clone()
    for neighbours in ([300], [60, 600, 60, 60], [60] * 70, [1200]):
        engine.prefill(0, [5] * 50, 0)
        tokens, lengths = [7] + [8] * len(neighbours), [50] + neighbours
        assert torch.equal(engine.decode(tokens, lengths)[0], alone)


def test_what_would_cost_too_much_is_not_done_but_said(tmp_path, monkeypatch, caplog):
    planted(monkeypatch, wide=1024, many=64)
    engine, model = made(tmp_path, tiny_config("llama", max_position_embeddings=128))
    assert engine._recorded.alike == {(64, 1024)} and not engine._recorded.independent
    assert "this device's attention depends on how many requests there are" in caplog.text
    assert greedy.of_engine(engine, [5, 6, 7], 4)[0] == greedy.of_model(model, [5, 6, 7], 4)
    assert engine._cache.size == (1, 192)


def test_a_kernel_whose_bits_depend_on_the_size_gives_way_to_one_whose_do_not(tmp_path, monkeypatch, caplog):
    """As planted for a GPU: cuDNN's by size; torch's memory-efficient one, which a CPU does not have, always alike."""
    planted(monkeypatch, wide=1024, many=64)
    by_size, seen = attention.sdpa, []

    def by_kernel(q, k, v, attn_mask=None, **how):
        chosen = not torch.backends.cuda.flash_sdp_enabled()
        seen.append(chosen)
        if not chosen:
            return by_size(q, k, v, attn_mask=attn_mask, **how)
        assert torch.backends.cuda.mem_efficient_sdp_enabled() and not torch.backends.cuda.math_sdp_enabled()
        scores = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5 + attn_mask).double()
        return (scores.softmax(-1) @ v.double()).to(q.dtype)

    monkeypatch.setattr(attention, "sdpa", by_kernel)
    engine, model = made(tmp_path, tiny_config("llama", max_position_embeddings=2048))
    assert engine._recorded.kernel == torch.nn.attention.SDPBackend.EFFICIENT_ATTENTION and engine._recorded.independent
    assert "depends on how many" not in caplog.text
    del seen[:]
    engine.prefill(0, [5] * 50, 0)
    assert not any(seen)
    alone = engine.decode([7], [50])[0].clone()
    assert all(seen[-2:])
    for neighbours in ([300], [60] * 70):
        engine.prefill(0, [5] * 50, 0)
        assert torch.equal(engine.decode([7] + [8] * len(neighbours), [50] + neighbours)[0], alone)


def test_a_device_that_never_gives_the_same_bits_is_served(tmp_path, monkeypatch, caplog):
    plain = attention.sdpa
    monkeypatch.setattr(attention, "sdpa", lambda q, k, v, **how: plain(q, k, v, **how) + torch.rand(1) * 1e-6)
    engine, model = made(tmp_path)
    assert engine._recorded.alike == {(64, 1024)} and "almost equal tokens" in caplog.text
    assert greedy.of_engine(engine, [5, 6, 7], 4)[0] == greedy.of_model(model, [5, 6, 7], 4)


def test_where_that_cannot_be_tried_it_is_said(tmp_path, monkeypatch, caplog):
    def fails(*args):
        raise RuntimeError("CUDA out of memory\nand more")

    monkeypatch.setattr(attention, "alike", fails)
    engine, model = made(tmp_path)
    assert "whether a row's attention is the same in any company could not be tried: CUDA out of memory" in caplog.text
    assert greedy.of_engine(engine, [5, 6, 7], 4)[0] == greedy.of_model(model, [5, 6, 7], 4)


def test_passes_share_the_place_of_their_results(tmp_path):
    engine, _ = made(tmp_path)
    engine.prefill(3, [5] * 20, 0)
    engine.decode([5], [400])  # the tables are as large as they get
    places = {engine.decode([5], [length]).data_ptr() for length in (20, 130, 300)}
    places |= {engine.decode([5, 6, 7], [20, 20, 20]).data_ptr()}
    assert len(places) == 1
