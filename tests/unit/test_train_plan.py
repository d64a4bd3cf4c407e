"""Which layers a stage gets, and what a step costs."""

import itertools
import json
import re

import pytest

from pipeline_train import config, plan, prepare
from pipeline_train.errors import UserError
from pipeline_train.families import Dims

BLOOM_7B = Dims("bloom", 250880, 4096, 30, 32, 32, 128, 16384, None, 1e-5, True)
LLAMA_7B = Dims("llama", 32000, 4096, 32, 32, 32, 128, 11008, 2048, 1e-6, False)
SMALL = Dims("llama", 49152, 576, 30, 9, 3, 64, 1536, 2048, 1e-5, True)


def parts(dims, pipe, *rest):
    return plan.parts_of(plan.bounds(dims, pipe, "auto", *rest))


def test_bloom_7b_on_8_gets_the_known_balance():
    assert parts(BLOOM_7B, 8, 512) == parts(BLOOM_7B, 8, 2048) == [1, 5, 5, 5, 5, 5, 5, 1]


def test_llama_7b_on_8_is_even_in_blocks():
    assert parts(LLAMA_7B, 8) == [5, 4, 4, 4, 4, 4, 4, 5]


def test_every_split_is_whole_and_no_stage_is_empty():
    for dims, pipe in itertools.product((BLOOM_7B, LLAMA_7B, SMALL), (1, 2, 3, 5, 8, 13, 32)):
        found = parts(dims, pipe)
        assert len(found) == pipe and sum(found) == dims.layers and min(found) >= 1
    assert parts(LLAMA_7B, 34) == [1] * 34


@pytest.mark.parametrize("pipe", [2, 3, 4])
def test_the_slowest_stage_is_as_fast_as_brute_force_can_make_it(pipe):
    dims = Dims("bloom", 5000, 64, 9, 4, 4, 16, 256, None, 1e-5, True)
    weights = plan.layer_weights(dims, 128)

    def slowest(edges):
        return max(sum(weights[a:b]) for a, b in zip(edges, edges[1:]))

    best = min(slowest((0,) + cut + (dims.layers,)) for cut in itertools.combinations(range(1, dims.layers), pipe - 1))
    assert slowest(plan.bounds(dims, pipe, "auto", 128)) == pytest.approx(best)


def test_a_large_head_moves_blocks_to_the_first_stage():
    assert parts(SMALL, 2, 256) == [20, 12]  # the head costs as much as eight blocks


def test_recompute_makes_blocks_dearer_than_the_head():
    with_it, without = (plan.layer_weights(SMALL, 256, recompute) for recompute in (True, False))
    assert with_it[1] == pytest.approx(without[1] * 4 / 3) and with_it[-1] == without[-1] and with_it[0] == 0.0


def test_explicit_parts_are_taken_and_wrong_ones_refused():
    assert plan.bounds(LLAMA_7B, 3, [1, 32, 1]) == [0, 1, 33, 34]
    for wrong in ([1, 32, 2], [34, 0, 0], [17, 17]):
        with pytest.raises(UserError, match=r"parallel.parts: .* does not split 34 layers \(embed \+ 32 blocks \+ head\) into 3"):
            plan.bounds(LLAMA_7B, 3, wrong)
    with pytest.raises(UserError, match="parallel.pipe: 35 stages, but the model has only 34 layers"):
        plan.bounds(LLAMA_7B, 35)


def test_step_flops_follow_the_stated_formula():
    """6 x (parameters without the input embedding) x tokens + 12 x blocks x hidden x attended pairs; a 7B has 6.6e9 of them."""
    assert plan.step_flops(LLAMA_7B, 1, 0) / 6 == pytest.approx(6.607e9, rel=1e-3)
    assert plan.step_flops(LLAMA_7B, 0, 10) == 12 * 32 * 4096 * 10


def resolved_run(**more):
    run = {"run": {"out": "o"}, "model": {"path": "m", "dtype": "bf16"}, "data": {"train": "t", "seq_len": 2048},
           "parallel": {"pipe": 2}, "batch": {"micro": 8, "global": 64}}  # fmt: skip
    return config.parse(dict(run, **more))


def test_auto_parts_fit_on_the_card_if_any_do():
    dims, run = LLAMA_7B, resolved_run()
    free, limited = plan.parts_for(run, dims, None, "current"), plan.parts_for(run, dims, "h200", "current")
    assert free == [17, 17] and limited != free and sum(limited) == dims.layers
    run.parallel.parts = limited
    assert plan.lack(run, dims, "h200", "current") is None
    run.parallel.parts = free
    text = re.sub(r"1\d\d\.\d", "1xx", plan.lack(run, dims, "h200", "current"))
    assert text == ("by the plan stage 0 needs 1xx GiB, a h200 has 1xx beside context and reserve: it may run out of memory. "
                    "More stages, a smaller batch.micro or parallel.recompute: blocks need less")  # fmt: skip


def test_a_card_too_small_for_any_split_does_not_change_it():
    dims, run = LLAMA_7B, resolved_run()
    assert plan.parts_for(run, dims, "t4", "current") == plan.parts_for(run, dims, None, "current")


def test_the_user_s_own_parts_stay():
    run = resolved_run(parallel={"pipe": 2, "parts": [30, 4]})
    assert plan.parts_for(run, LLAMA_7B, "h200", "current") == [30, 4]


def test_what_may_not_fit_is_said_before_the_run(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({
        "model_type": "llama", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
        "num_attention_heads": 32}))  # fmt: skip
    for card, told in (("t4", 1), ("h200", 0), (None, 0)):
        run, said = resolved_run(model={"path": "m", "dtype": "fp16", "init": "random"}, batch={"micro": 1, "global": 8}), []
        prepare._resolve_model(run, tmp_path, "run.yaml", card, "current", said.append)
        assert run.parallel.parts == [17, 17] and len(said) == told
        assert all(
            line.startswith("run.yaml: parallel: by the plan stage 1 needs ") and ", a t4 has 13.1 " in line for line in said
        )
