"""Rows of the slot cache compute what transformers computes, and the same bits in any company."""

import random
import weakref

import pytest

pytest.importorskip("starlette", reason="the embedded server needs Python 3.10")
import torch  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from transformers.activations import GELUTanh  # noqa: E402
from transformers.models.bloom.modeling_bloom import BloomGelu  # noqa: E402

from pipeline_train.errors import RunFailed, UserError  # noqa: E402
from serve.embedded import packed  # noqa: E402
from serve.embedded.engine import Engine  # noqa: E402
from tests import greedy  # noqa: E402
from tests.models import make_hf, tiny_config  # noqa: E402

# Widths in multiples of 32, as published models have: then not one bit depends on the batch.
WIDE = {"hidden_size": 64, "num_attention_heads": 4}
CASES = {
    "llama": tiny_config("llama", **WIDE, intermediate_size=96, num_key_value_heads=4, max_position_embeddings=512),
    "llama-gqa-tied": tiny_config(
        "llama", **WIDE, intermediate_size=96, num_key_value_heads=2, tie_word_embeddings=True, max_position_embeddings=512
    ),
    "bloom": tiny_config("bloom", hidden_size=64, n_head=4),
    "gpt2": {"model_type": "gpt2", "vocab_size": 131, "n_positions": 512, "n_embd": 64, "n_layer": 2, "n_head": 4},
    "bloom-6-heads": tiny_config("bloom", hidden_size=96, n_head=6, tie_word_embeddings=False),
}


def as_a_graph(run):
    """What a CUDA graph does, on a CPU: the result is always in the same place, and what was recorded is not kept by it."""
    places, recorded = [result.clone() for result in run()], weakref.ref(run)

    def again():
        return [place.copy_(result) for place, result in zip(places, recorded()())]

    return again


@pytest.fixture(scope="module", params=sorted(CASES) + ["llama-recorded", "llama-gqa-tied-recorded", "bloom-recorded"])
def pair(request, tmp_path_factory):
    """(the engine, the plain model)"""
    folder = tmp_path_factory.mktemp(request.param)
    model = make_hf(folder, CASES[request.param.replace("-recorded", "")])
    engine, usual = Engine(str(folder)), torch.get_num_threads()
    if request.param.endswith("-recorded"):
        torch.set_num_threads(1)  # with more, torch's attention of many rows at once has other bits than of one on some CPUs
        with torch.inference_mode():
            engine.record(lambda: as_a_graph)
        assert engine.graphs
    yield engine, model
    torch.set_num_threads(usual)


@pytest.fixture
def several_threads():
    usual = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(usual)


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.inference_mode():
        yield


def greedy_alone(engine, ids, count):
    engine.clear()
    return greedy.of_engine(engine, ids, count)


def prompts(count, seed=1):
    pick = random.Random(seed)
    return [[pick.randrange(3, 131) for _ in range(pick.choice([1, 2, 5, 30, 63, 64, 65, 130]))] for _ in range(count)]


def test_greedy_is_transformers_greedy(pair):
    engine, model = pair
    for ids in prompts(4):
        assert greedy_alone(engine, ids, 8)[0] == greedy.of_model(model, ids, 8)


def test_logits_have_the_same_bits_in_any_company(pair):
    """Rows join one after the other while the rest decodes; each row's logits are those it has alone, bit by bit."""
    engine, _ = pair
    asked = prompts(7, seed=2)
    alone = [greedy_alone(engine, ids, 10)[1] for ids in asked]
    engine.clear()
    tokens, lengths, seen = [], [], [[] for _ in asked]
    for step in range(24):
        if len(tokens) < len(asked) and step % 2 == 0:
            row = len(tokens)
            logits = engine.prefill(row, asked[row], 0)[0]
            seen[row].append(logits.clone())
            tokens.append(int(logits.argmax()))
            lengths.append(len(asked[row]))
        logits = engine.decode(tokens, lengths)
        for row, line in enumerate(logits):
            seen[row].append(line.clone())
            tokens[row], lengths[row] = int(line.argmax()), lengths[row] + 1
    for mine, theirs in zip(alone, seen):
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs))


@pytest.mark.skipif(not packed.available(), reason="this torch has no oneDNN")
@pytest.mark.parametrize("able", [True, False])
def test_bf16_is_served_on_any_cpu(able, tmp_path, monkeypatch, caplog):
    """oneDNN packs it with AVX-512 only; without, products are as for fp16."""
    if not able:

        def refuse(weight, sizes):
            raise RuntimeError("mkldnn_reorder_linear_weight: bf16 path needs the cpu support")

        monkeypatch.setattr(packed.torch.ops.mkldnn, "_reorder_linear_weight", refuse)
    packed.packs.cache_clear()
    make_hf(tmp_path, CASES["llama"])
    engine = Engine(str(tmp_path), "bfloat16")
    packed.packs.cache_clear()
    assert engine.prefill(0, [3, 4, 5], 0).isfinite().all() and (able or not engine.together)
    assert able or "the last bits depend on how many requests there are" in caplog.text


@pytest.mark.skipif(not packed.available(), reason="this torch has no oneDNN")
@pytest.mark.parametrize("name", ["llama", "llama-gqa-tied", "gpt2"])
def test_prompts_read_together_have_the_same_bits_as_alone(name, tmp_path):
    """Beginnings and the rest of a prompt in one pass, beside a row that runs; the steps behind it, too."""
    make_hf(tmp_path, CASES[name])
    engine = Engine(str(tmp_path))
    assert engine.together
    asked, cut = [list(range(3, 90))] + prompts(6, seed=3), 40

    def steps(first, tokens, lengths):
        """Logits of three decode steps of the rows from ``first`` on; all rows are given."""
        seen = []
        for step in range(3):
            seen.append(engine.decode(tokens, [length + step for length in lengths])[first:].clone())
        return torch.stack(seen, 1)

    alone = []
    for ids in asked:
        engine.clear()
        start = cut if ids is asked[0] else 0
        if start:
            engine.prefill(0, ids[:start], 0)
        logits = engine.prefill(0, ids[start:], start).clone()
        alone.append(torch.cat([logits, steps(0, [11], [len(ids)])[0]]))
    engine.clear()
    engine.prefill(0, [7, 8, 9], 0)
    engine.prefill(1, asked[0][:cut], 0)
    pieces, starts = [asked[0][cut:]] + asked[1:], [cut] + [0] * (len(asked) - 1)
    logits = engine.prefill_together(1, pieces, starts).clone()
    together = torch.cat([logits[:, None], steps(1, [5] + [11] * len(asked), [3] + [len(ids) for ids in asked])], 1)
    assert torch.equal(together, torch.stack(alone))


@pytest.mark.skipif(not packed.available(), reason="this torch has no oneDNN")
@pytest.mark.parametrize("name, threads, lengths", [("llama", 2, (251, 203, 251)), ("gpt2", 3, (251, 203, 250))])
def test_the_shares_of_several_threads_change_no_bit(name, threads, lengths, tmp_path, several_threads):
    """Together they are so many that torch shares activation functions out, and where a share ends vector code does."""
    torch.set_num_threads(threads)
    make_hf(tmp_path, CASES[name])
    engine = Engine(str(tmp_path))
    pieces = [[3 + place * place % 120 for place in range(length)] for length in lengths]
    alone = []
    for ids in pieces:
        engine.clear()
        alone.append(engine.prefill(0, ids, 0)[0].clone())
    engine.clear()
    assert torch.equal(engine.prefill_together(0, pieces, [0, 0, 0]), torch.stack(alone))


@pytest.mark.parametrize("function", [torch.nn.SiLU(), BloomGelu().eval(), GELUTanh()])
def test_a_function_of_one_thread_depends_on_no_other_row(function, several_threads):
    layer = packed.OneThread(function)
    for size, counts in (((900, 96), range(330, 900, 19)), ((60, 1408), range(1, 60))):
        x = torch.randn(*size)
        whole = layer(x)
        assert torch.allclose(whole, function(x), atol=1e-6) and layer(x[None]).shape == (1, *size)
        assert all(torch.equal(layer(x[:rows]), whole[:rows]) for rows in counts)


def test_a_prompt_in_pieces_is_the_prompt(pair):
    engine, model = pair
    ids = prompts(1, seed=5)[0] * 3 + list(range(3, 90))
    engine.clear()
    for start in range(0, len(ids), 32):
        logits = engine.prefill(0, ids[start : start + 32], start, all_logits=True)
    wanted = model(torch.tensor([ids])).logits[0, -logits.shape[0] :]
    assert torch.allclose(logits, wanted, atol=1e-4 * float(wanted.abs().max()))


def test_moved_rows_go_on(pair):
    engine, model = pair
    first, second = [5, 6, 7], [8, 9, 10, 11, 12]
    engine.clear()
    engine.prefill(0, first, 0)
    engine.prefill(1, second, 0)
    engine.decode([3, 4], [3, 5])
    engine.move(1, 0)
    logits = engine.decode([20], [6])[0]
    wanted = model(torch.tensor([second + [4, 20]])).logits[0, -1]
    assert torch.allclose(logits, wanted, atol=1e-4 * float(wanted.abs().max()))


def test_own_attention_where_the_model_lets_us(pair):
    engine, _ = pair
    assert engine.attention == "our own" and engine.kv_bytes > 0


def test_a_prompt_that_is_read_while_others_decode(pair):
    """Recorded passes compute rows that nobody uses: a row whose prompt is half read must not notice."""
    engine, model = pair
    first, second = [5, 6, 7], list(range(10, 50))
    engine.clear()
    engine.prefill(0, first, 0)
    engine.prefill(1, second[:20], 0)
    engine.decode([3], [3])
    logits = engine.prefill(1, second[20:], 20)[-1]
    wanted = model(torch.tensor([second])).logits[0, -1]
    assert torch.allclose(logits, wanted, atol=1e-4 * float(wanted.abs().max()))


@pytest.mark.skipif(not packed.available(), reason="this torch has no oneDNN")
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("size", [(576, 1536), (192, 576), (131, 64)])
def test_packed_linear_rows_do_not_depend_on_their_number(size, bias):
    out, inner = size
    linear = torch.nn.Linear(inner, out, bias=bias)
    layer, x = packed.PackedLinear(linear.weight, linear.bias), torch.randn(33, inner)
    whole = layer(x)
    assert torch.allclose(whole, linear(x), atol=1e-4)
    for rows in (1, 2, 3, 7, 16, 32):
        assert torch.equal(layer(x[:rows]), whole[:rows])


def test_a_sliding_window_is_kept(tmp_path):
    model = make_hf(
        tmp_path,
        {
            "model_type": "mistral",
            "vocab_size": 131,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "sliding_window": 6,
            "max_position_embeddings": 128,
        },
    )
    engine = Engine(str(tmp_path))
    ids = list(range(3, 40))
    assert greedy_alone(engine, ids, 6)[0] == greedy.of_model(model, ids, 6)


def test_where_products_depend_on_their_rows_it_is_said_and_prompts_are_read_alone(tmp_path, caplog):
    make_hf(tmp_path, CASES["llama"])
    engine = Engine(str(tmp_path), "float16")
    assert not engine.together and "torch.float16 on this CPU: the last bits depend on how many requests there are" in caplog.text
    assert engine.attention == "our own"


def test_a_rotation_that_the_longest_row_would_change_for_all_is_not_reached(tmp_path):
    """longrope: transformers takes its long factors for a whole pass once one row is beyond the original positions."""
    factors = [1.0 + place / 8 for place in range(8)]
    scaling = {"type": "longrope", "short_factor": [1.0] * 8, "long_factor": factors}
    make_hf(tmp_path, {
        "model_type": "phi3", "vocab_size": 131, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "pad_token_id": 0, "max_position_embeddings": 256, "original_max_position_embeddings": 64,
        "rope_scaling": scaling,
    })  # fmt: skip
    assert Engine(str(tmp_path)).max_positions == 64


def test_missing_weights_are_not_made_up(tmp_path):
    make_hf(tmp_path, tiny_config("llama"))
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="1 weights are missing, the first is model.layers.1.mlp.up_proj.weight"):
        Engine(str(tmp_path))


def test_a_truncated_file_is_one_line(tmp_path):
    make_hf(tmp_path, CASES["llama"])
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match="its weights cannot be loaded: ") as error:
        Engine(str(tmp_path))
    assert "\n" not in str(error.value)


def test_a_model_that_cannot_be_batched_is_refused(tmp_path, monkeypatch):
    """Planted: positions that are off by one in every decode step."""
    make_hf(tmp_path, tiny_config("llama"))
    forward = Engine._forward

    def shifted(self, ids, step):
        if step.decode:
            step.columns = step.columns - 1
        return forward(self, ids, step)

    monkeypatch.setattr(Engine, "_forward", shifted)
    with pytest.raises(RunFailed, match="away from a plain forward pass .* models of type llama cannot be served"):
        Engine(str(tmp_path))


def test_a_model_whose_own_logits_are_no_numbers_is_refused(tmp_path):
    model = make_hf(tmp_path, tiny_config("llama"))
    model.lm_head.weight.data[3] = float("nan")
    model.save_pretrained(str(tmp_path))
    with pytest.raises(UserError, match="^models of type llama: in float32 this one's logits are not numbers; try another --dtype"):
        Engine(str(tmp_path))
