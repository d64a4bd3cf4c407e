"""Choosing tokens: filters against their definitions, penalties, seeds, and numbers that are no numbers."""

import math

import pytest

pytest.importorskip("starlette", reason="the embedded server needs Python 3.10")
import torch  # noqa: E402

from serve.embedded.sampling import Sampler, choices, likeliest, shortest, warp  # noqa: E402
from serve.embedded.validation import Sampling  # noqa: E402

LOGITS = torch.tensor([0.1, 2.0, -1.0, 1.5, 0.0, 1.9])


def kept(how, logits=LOGITS):
    return set(torch.nonzero(warp(logits, how) > -math.inf)[:, 0].tolist())


def test_top_k():
    assert kept(Sampling(seed=1, top_k=2)) == {1, 5}
    assert kept(Sampling(seed=1, top_k=99)) == set(range(6))


@pytest.mark.parametrize("mass", [0.01, 0.3, 0.5, 0.8, 0.95, 0.9999])
def test_top_p_is_the_smallest_set_that_holds_the_mass(mass):
    probs = torch.softmax(LOGITS, -1)
    chosen = kept(Sampling(seed=1, top_p=mass))
    order = torch.argsort(probs, descending=True).tolist()
    assert chosen == set(order[: len(chosen)])
    assert float(probs[order[: len(chosen)]].sum()) >= mass - 1e-6
    assert float(probs[order[: len(chosen) - 1]].sum()) < mass


def test_top_p_beyond_the_first_guess():
    """A flat distribution needs more tokens than the quick look at the likeliest 1024."""
    assert len(kept(Sampling(seed=1, top_p=0.5), torch.zeros(10000))) == pytest.approx(5000, abs=2)


@pytest.mark.parametrize("mass", [0.2, 0.6, 0.9])
def test_typical_p_takes_the_tokens_closest_to_the_entropy(mass):
    logprobs = torch.log_softmax(LOGITS, -1)
    entropy = -float((logprobs.exp() * logprobs).sum())
    order = sorted(range(6), key=lambda one: abs(-float(logprobs[one]) - entropy))
    chosen = kept(Sampling(seed=1, typical_p=mass))
    assert chosen == set(order[: len(chosen)])
    assert float(logprobs[order[: len(chosen) - 1]].exp().sum()) < mass <= float(logprobs[order[: len(chosen)]].exp().sum()) + 1e-6


def test_sampled_frequencies_follow_the_distribution():
    sampler = Sampler(Sampling(seed=3, temperature=2.0), [])
    counts = torch.bincount(torch.tensor([sampler.pick(LOGITS).id for _ in range(4000)]), minlength=6) / 4000
    assert torch.allclose(counts, torch.softmax(LOGITS / 2.0, -1), atol=0.03)


def test_same_seed_same_tokens_and_other_seed_others():
    def draw(seed):
        sampler = Sampler(Sampling(seed=seed), [])
        return [sampler.pick(torch.zeros(500)).id for _ in range(20)]

    assert draw(5) == draw(5) != draw(6)
    assert draw(2**64 - 1) == draw(2**64 - 1)


def test_logprob_is_that_after_the_filters():
    choice = Sampler(Sampling(seed=1, top_k=1), []).pick(LOGITS)
    assert (choice.id, choice.logprob) == (1, 0.0)


def test_repetition_penalty_divides_positive_and_multiplies_negative_logits():
    how = Sampling(repetition_penalty=2.0, top_n_tokens=6)
    ids = dict(Sampler(how, [1, 2, 2]).pick(LOGITS).top)
    expected = torch.log_softmax(torch.tensor([0.1, 1.0, -2.0, 1.5, 0.0, 1.9]), -1)
    assert [ids[one] for one in range(6)] == pytest.approx(expected.tolist(), abs=1e-5)


def test_frequency_penalty_takes_each_tokens_share_of_the_text():
    how = Sampling(frequency_penalty=1.0, top_n_tokens=6)
    sampler = Sampler(how, [1, 1, 3, 0])
    expected = torch.log_softmax(LOGITS - torch.tensor([0.25, 0.5, 0, 0.25, 0, 0]), -1)
    choice = sampler.pick(LOGITS)
    assert [dict(choice.top)[one] for one in range(6)] == pytest.approx(expected.tolist(), abs=1e-5)
    assert choice.id == 5
    expected = torch.log_softmax(LOGITS - torch.tensor([0.2, 0.4, 0, 0.2, 0, 0.2]), -1)  # the generated token counts
    top = dict(sampler.pick(LOGITS).top)
    assert [top[one] for one in range(6)] == pytest.approx(expected.tolist(), abs=1e-5)


@pytest.mark.parametrize("vocab", [50257, 50280, 250880])
def test_a_lone_row_has_the_bits_that_it_has_among_others(vocab):
    usual = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        for seed in range(4):
            rows = 3 * torch.randn(5, vocab, generator=torch.Generator().manual_seed(seed))
            assert torch.equal(likeliest(rows[:1]), likeliest(rows)[:, :1]) and torch.equal(
                likeliest(rows[:2]), likeliest(rows)[:, :2]
            )
    finally:
        torch.set_num_threads(usual)


def test_greedy_takes_the_first_of_equals_alone_and_in_a_batch():
    rows = torch.tensor([[1.0, 3.0, 3.0], [0.5, 0.1, 0.4]])
    together = choices(likeliest(rows))
    alone = [Sampler(Sampling(), []).pick(row) for row in rows]
    assert [one.id for one in together] == [one.id for one in alone] == [1, 0]
    assert [one.logprob for one in together] == pytest.approx([one.logprob for one in alone], abs=1e-6)


@pytest.mark.parametrize(
    "how",
    [
        Sampling(),
        Sampling(seed=1, temperature=1e-30),
        Sampling(seed=1, temperature=1e30),
        Sampling(seed=1, top_p=0.5, typical_p=0.5),
        Sampling(seed=1, top_p=1e-300),
        Sampling(seed=1, typical_p=1e-300, top_k=1),
        Sampling(repetition_penalty=1e30),
        Sampling(repetition_penalty=1e-30, seed=1),
    ],
)
@pytest.mark.parametrize("logits", [[math.nan, 1.0, 2.0], [math.inf, -math.inf, 0.0], [1e38, -1e38, 0.0], [math.nan] * 3])
def test_no_logits_and_no_setting_break_the_choice(how, logits):
    choice = Sampler(how, [0, 1]).pick(torch.tensor(logits))
    assert 0 <= choice.id < 3
    assert choice.logprob is None or choice.logprob <= 0.0


def test_tiny_temperature_is_greedy_and_huge_is_uniform():
    assert Sampler(Sampling(seed=1, temperature=1e-30), []).pick(LOGITS).id == 1
    assert Sampler(Sampling(seed=1, temperature=1e30), []).pick(LOGITS).logprob == pytest.approx(-math.log(6), abs=1e-5)


def test_logprobs_are_spelled_like_float32():
    assert repr(shortest(torch.tensor(-0.34).item())) == "-0.34"
    assert shortest(math.nan) is None and shortest(-math.inf) is None


def test_a_sure_token_is_spelled_the_same_by_both_ways():
    logits = torch.full((1, 100), -1e4)
    logits[0, 7] = 1e4
    found = [choices(likeliest(logits))[0].logprob, Sampler(Sampling(), []).pick(logits[0]).logprob]
    assert [str(value) for value in found] == ["0.0", "0.0"]
