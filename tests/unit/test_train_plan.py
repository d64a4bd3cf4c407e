"""Which layers a stage gets, and what a step costs."""

import itertools

import pytest

from pipeline_train import plan
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
