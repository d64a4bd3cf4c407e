"""The checks of a request: their texts, their limits, and which one speaks first."""

import pytest

pytest.importorskip("starlette", reason="the embedded server needs Python 3.10")
from serve.embedded import validation  # noqa: E402
from serve.embedded.errors import ApiError  # noqa: E402
from serve.embedded.params import Parameters  # noqa: E402
from serve.embedded.validation import Limits  # noqa: E402

LIMITS = Limits(max_input_tokens=99, max_total_tokens=100, vocabulary=50)


def asked(**given):
    return Parameters(**{"do_sample": False, **given})


def problem(function, *args):
    with pytest.raises(ApiError) as caught:
        function(*args)
    error = caught.value
    assert error.status == 422 and error.kind == "validation" and error.text.startswith("Input validation error: ")
    return error.text[len("Input validation error: ") :]


# In the order in which they are looked at: each request breaks its own rule and all later ones.
ORDER = [
    ({"best_of": 2}, "you must use sampling when `best_of` is > 1"),
    ({"temperature": 0.0}, "`temperature` must be strictly positive"),
    ({"repetition_penalty": 0.0}, "`repetition_penalty` must be strictly positive"),
    ({"frequency_penalty": 2.1}, "`frequency_penalty` must be >= -2.0 and <= 2.0"),
    ({"top_p": 1.0}, "`top_p` must be > 0.0 and < 1.0"),
    ({"typical_p": 0.0}, "`typical_p` must be > 0.0 and < 1.0"),
    ({"top_k": 0}, "`top_k` must be strictly positive"),
    ({"max_new_tokens": 0}, "`max_new_tokens` must be strictly positive"),
    ({"stop": ["a"] * 5}, "`stop` supports up to 4 stop sequences. Given: 5"),
    ({"seed": 1, "best_of": 2, "do_sample": True}, "`seed` must not be set when `best_of` > 1"),
    ({"top_n_tokens": 6}, "`top_n_tokens` must be >= 0 and <= 5. Given: 6"),
    ({"inputs": ""}, "`inputs` cannot be empty"),
    ({"truncate": 100}, "`truncate` must be strictly positive and less than 99. Given: 100"),
]


@pytest.mark.parametrize("place", range(len(ORDER)), ids=[next(iter(given)) for given, _ in ORDER])
def test_each_rule_and_its_place(place):
    given = dict(ORDER[place][0])
    for later, _ in ORDER[place + 1 :]:
        clash = {"temperature", "top_p", "typical_p", "top_k"} if place == 0 else set()  # any of these is sampling
        if not ({"best_of", "do_sample"} | clash) & set(later):
            given = {**later, **given}
    inputs = given.pop("inputs", "hello")
    assert problem(validation.check, inputs, asked(**given), LIMITS) == ORDER[place][1]


@pytest.mark.parametrize(
    "given",
    [
        {"temperature": -1.0},
        {"repetition_penalty": -0.1},
        {"frequency_penalty": -2.1},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"top_k": -3},
        {"truncate": 0},
    ],
)
def test_the_other_side_of_the_ranges(given):
    assert next(iter(given)) in problem(validation.check, "x", asked(**given), LIMITS)


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"temperature": 1e-9},
        {"frequency_penalty": 2.0},
        {"frequency_penalty": -2.0},
        {"top_p": 0.99},
        {"top_k": 1},
        {"truncate": 99},
        {"stop": ["a"] * 4},
        {"top_n_tokens": 5},
        {"top_n_tokens": 0},
        {"best_of": 1},
        {"best_of": 0},
        {"best_of": 2, "temperature": 1.0},
    ],
)
def test_what_is_allowed(given):
    validation.check("x", asked(**given), LIMITS)


def test_lengths():
    take = validation.accept
    assert problem(take, [1] * 50, asked(max_new_tokens=51), LIMITS) == (
        "`inputs` tokens + `max_new_tokens` must be <= 100. Given: 50 `inputs` tokens and 51 `max_new_tokens`"
    )
    short = Limits(max_input_tokens=40, max_total_tokens=100)
    assert problem(take, [1] * 41, asked(max_new_tokens=1), short) == "`inputs` must have less than 40 tokens. Given: 41"
    assert take([1] * 40, asked(max_new_tokens=1), short).total == 41  # equal is allowed
    # the total speaks first when both are too long
    assert problem(take, [1] * 120, asked(), LIMITS).startswith("`inputs` tokens + `max_new_tokens` must be <= 100. Given: 120")
    assert take([1] * 30, asked(), LIMITS).max_new_tokens == 70  # the rest, when not given


def test_only_the_first_leg_of_a_long_answer_is_checked():
    limits = Limits(max_input_tokens=1999, max_total_tokens=2000)
    assert validation.accept([1] * 900, asked(max_new_tokens=5000), limits).max_new_tokens == 1100
    assert "and 1024 `max_new_tokens`" in problem(validation.accept, [1] * 977, asked(max_new_tokens=5000), limits)


def test_truncate_keeps_the_end():
    assert validation.accept([1, 2, 3, 4], asked(truncate=2, max_new_tokens=1), LIMITS).ids == [3, 4]


@pytest.mark.parametrize(
    "given, name",
    [
        ({"watermark": True}, "watermark"),
        ({"grammar": {"type": "regex", "value": "a"}}, "grammar"),
        ({"adapter_id": "x"}, "adapter_id"),
    ],
)
def test_features_that_are_missing_are_refused(given, name):
    assert problem(validation.accept, [1], asked(max_new_tokens=1, **given), LIMITS) == "%s is not supported" % name


def test_best_of_limits():
    assert problem(validation.check_best_of, 3, LIMITS) == "`best_of` must be > 0 and <= 2. Given: 3"
    assert problem(validation.check_best_of, 2, Limits(max_best_of=1)) == "`best_of` != 1 is not allowed for this endpoint"
    validation.check_best_of(2, LIMITS)


def test_streams():
    assert problem(validation.check_stream, asked(best_of=0)) == "`best_of` != 1 is not supported when streaming tokens"
    assert problem(validation.check_stream, asked(decoder_input_details=True)) == (
        "`decoder_input_details` == true is not supported when streaming tokens"
    )
    validation.check_stream(asked(best_of=1))


@pytest.mark.parametrize(
    "given, sampled",
    [
        ({}, False),
        ({"temperature": 1.0}, False),
        ({"temperature": 0.5}, True),
        ({"top_k": 3}, True),
        ({"top_p": 0.5}, True),
        ({"typical_p": 0.5}, True),
        ({"do_sample": True}, True),
        ({"seed": 3}, False),
        ({"repetition_penalty": 1.5}, False),
    ],
)
def test_what_counts_as_sampling(given, sampled):
    assert (validation.sampling_of(asked(**given)).seed is not None) is sampled


def test_seeds():
    assert validation.sampling_of(asked(do_sample=True, seed=2**64 - 1)).seed == 2**64 - 1
    assert validation.sampling_of(asked(do_sample=True)).seed != validation.sampling_of(asked(do_sample=True)).seed


def test_a_token_that_the_model_does_not_know():
    """From a tokenizer with tokens added after the training: in the forward pass it would fail everybody's step."""
    text = "`inputs` has token 50, but the model knows only 50"
    assert problem(validation.accept, [1, 50, 2], asked(max_new_tokens=1), LIMITS) == text
    assert validation.accept([1, 49], asked(max_new_tokens=1), LIMITS).ids == [1, 49]
