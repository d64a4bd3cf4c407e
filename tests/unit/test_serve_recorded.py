"""Recorded passes: recorded once, for any model, and no request is met by another."""

import sys

import pytest

pytest.importorskip("starlette", reason="the embedded server needs Python 3.10")
import torch  # noqa: E402

from serve.embedded import attention, trial  # noqa: E402
from serve.embedded.engine import Engine  # noqa: E402
from serve.embedded.recorded import Recorded, needed  # noqa: E402
from serve.embedded.sampling import likeliest  # noqa: E402
from tests import greedy  # noqa: E402
from tests.models import make_hf, tiny_config  # noqa: E402

LLAMA = tiny_config("llama", max_position_embeddings=512)
LONG = tiny_config("llama", max_position_embeddings=2048)
ROOM = Recorded.room


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.inference_mode():
        yield


@pytest.fixture(autouse=True)
def one_thread():
    """With more, torch's attention of many rows at once has other bits than of one on some CPUs (those without AVX-512)."""
    usual = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(usual)


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


def by_size(q, k, v, attn_mask=None, **how):
    """An attention that computes the passes of some sizes in another way."""
    found = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, **how)
    return found * 1.00001 if q.shape[2] == 1 and (len(q) in (2, 8) or k.shape[2] > 512) else found


def always_alike(q, k, v, attn_mask=None, **how):
    """In double precision, whose last bits a float does not show."""
    scores = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5 + attn_mask).double()
    return (scores.softmax(-1) @ v.double()).to(q.dtype)


def test_a_kernel_whose_bits_depend_on_the_size_gives_way_to_one_whose_do_not(tmp_path, monkeypatch, caplog):
    """As on a GPU without Triton: torch's choice goes by size; its memory-efficient kernel, which a CPU does not have, does not."""
    chosen = []

    def sdpa(q, *given, **how):
        chosen.append(not torch.backends.cuda.flash_sdp_enabled() and q.shape[2] == 1)
        return (always_alike if chosen[-1] else by_size)(q, *given, **how)

    monkeypatch.setattr(attention, "sdpa", sdpa)
    engine, model = made(tmp_path, LONG)
    assert "depend on how many" not in caplog.text
    del chosen[:]
    engine.prefill(0, [5] * 50, 0)
    assert not any(chosen)
    alone = engine.decode([7], [50])[0].clone()
    assert all(chosen[-2:])
    for neighbours in ([300], [60, 600, 60, 60], [60] * 63, [1200]):
        engine.prefill(0, [5] * 50, 0)
        assert torch.equal(engine.decode([7] + [8] * len(neighbours), [50] + neighbours)[0], alone)
    assert greedy.of_engine(engine, [5, 6, 7], 4)[0] == greedy.of_model(model, [5, 6, 7], 4)


@pytest.mark.parametrize("where", ["rows", "width", "place", "prompt", "never"])
def test_where_the_company_decides_it_is_said(tmp_path, monkeypatch, caplog, where):
    caplog.set_level("INFO")
    monkeypatch.setitem(sys.modules, "triton", None)
    plain = attention.sdpa

    def sdpa(q, k, v, attn_mask=None, **how):
        found = plain(q, k, v, attn_mask=attn_mask, **how)
        decode = q.shape[2] == 1
        other = {
            "rows": decode and len(q) == 64,
            "width": decode and k.shape[2] >= 512,
            "place": decode and len(q) == 2,
            "prompt": not decode and k.shape[2] > 64,
            "never": True,
        }[where]
        if where == "place" and other:
            return torch.cat([found[:1], found[1:] * 1.00001])
        return found + torch.rand(()) * 1e-6 if other else found

    monkeypatch.setattr(attention, "sdpa", sdpa)
    engine, model = made(tmp_path, LONG)
    assert "the last bits depend on how many requests there are" in caplog.text
    assert "attention is not computed by our kernel: import of triton halted" in caplog.text
    assert greedy.of_engine(engine, [5, 6, 7], 4)[0] == greedy.of_model(model, [5, 6, 7], 4)
    assert engine._cache.size == needed(1, 7)  # nothing is left of what was tried


def test_where_memory_is_short_what_was_tried_counts(tmp_path, monkeypatch, caplog):
    def room(self, rows, columns):
        if rows > 3:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory\nand more")
        ROOM(self, rows, columns)

    monkeypatch.setattr(Recorded, "room", room)
    engine, model = made(tmp_path)
    assert "what a row gets in company could not be tried: CUDA out of memory" in caplog.text
    assert "depend on how many" not in caplog.text
    assert greedy.of_engine(engine, [5, 6, 7], 4)[0] == greedy.of_model(model, [5, 6, 7], 4)


def test_a_kernel_that_fails_in_a_larger_pass_is_not_taken(tmp_path, monkeypatch):
    """As one that does not compile for it."""
    plain, failed = attention.sdpa, []

    def sdpa(q, k, v, attn_mask=None, **how):
        if torch.backends.cuda.flash_sdp_enabled():
            return plain(q, k, v, attn_mask=attn_mask, **how)
        if k.shape[2] > 512:
            failed.append(1)
            raise OSError("no space left on device")
        return always_alike(q, k, v, attn_mask)

    monkeypatch.setattr(attention, "sdpa", sdpa)
    engine, model = made(tmp_path, LONG)
    assert failed and engine._recorded._kernel == attention.ANY
    assert greedy.of_engine(engine, [5, 6, 7], 4)[0] == greedy.of_model(model, [5, 6, 7], 4)


def test_where_every_kernel_fails_in_larger_passes_none_is_recorded(tmp_path, monkeypatch, caplog):
    plain = attention.sdpa

    def sdpa(q, k, v, attn_mask=None, **how):
        if attn_mask is not None and k.shape[2] > 512:
            raise RuntimeError("no kernel for that width")
        return plain(q, k, v, attn_mask=attn_mask, **how)

    monkeypatch.setattr(attention, "sdpa", sdpa)
    model = make_hf(tmp_path, LONG)
    engine = Engine(str(tmp_path))
    engine.record(lambda: lambda run: run)
    assert not engine.graphs and "depend on how many" not in caplog.text
    assert "llama is served without CUDA graphs, slower: no kernel for that width" in caplog.text
    assert greedy.of_engine(engine, [5] * 600, 3)[0] == greedy.of_model(model, [5] * 600, 3)


def test_a_kernel_that_makes_no_number_is_not_taken(tmp_path, monkeypatch, caplog):
    """NaN is no number, so it is not far from any."""
    caplog.set_level("INFO")
    plain = attention.sdpa

    def sdpa(q, k, v, attn_mask=None, **how):
        return plain(q, k, v, attn_mask=attn_mask, **how) if torch.backends.cuda.flash_sdp_enabled() else q * float("nan")

    monkeypatch.setattr(attention, "sdpa", sdpa)
    engine, model = made(tmp_path, LONG)
    assert "by torch's memory-efficient kernel: batched logits are nan away from a plain forward pass" in caplog.text
    assert engine._recorded._kernel == attention.ANY
    assert greedy.of_engine(engine, [5, 6, 7], 4)[0] == greedy.of_model(model, [5, 6, 7], 4)


@pytest.mark.parametrize("mine, theirs, wanted", [
    ([1.0, 2.0], [1.0, 2.5], 0.2), ([1.0, float("-inf")], [1.5, float("-inf")], 1 / 3), ([float("nan"), 1.0], [1.0, 1.0], None),
    ([1.0, float("inf")], [1.0, 2.0], float("inf")),
])  # fmt: skip
def test_how_far_logits_are_away(mine, theirs, wanted):
    found = trial.distance(torch.tensor(mine), torch.tensor(theirs))
    assert found == pytest.approx(wanted) if wanted is not None else found != found


def test_a_company_that_would_not_fit_is_not_tried(tmp_path, monkeypatch):
    rows = set()
    monkeypatch.setattr(Recorded, "room", lambda self, *size: rows.add(size[0]) or ROOM(self, *size))
    make_hf(tmp_path, LLAMA)
    engine = Engine(str(tmp_path))
    monkeypatch.setattr("serve.embedded.trial.free_memory", lambda device: 2 * 64 * 250 * engine.kv_bytes)
    engine.record(lambda: lambda run: run)
    assert rows == {1, 2, 8}


def test_passes_share_the_place_of_their_results(tmp_path):
    engine, _ = made(tmp_path)
    engine.prefill(3, [5] * 20, 0)
    engine.decode([5], [400])  # the tables are as large as they get
    places = {engine.decode([5], [length]).data_ptr() for length in (20, 130, 300)}
    places |= {engine.decode([5, 6, 7], [20, 20, 20]).data_ptr()}
    assert len(places) == 1
