"""Whatever arrives as a body is either accepted or answered with a client's error."""

import json
import math

import pytest

pytest.importorskip("starlette", reason="the embedded server needs Python 3.10")
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from serve.embedded import params, serde, validation  # noqa: E402
from serve.embedded.errors import ApiError  # noqa: E402
from serve.embedded.validation import Limits  # noqa: E402

LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
VALUES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3), max_leaves=6
)
CHECKS = [params.generate_request, params.compat_request, params.chat_request, params.completion_request]


def bodies(fields, **more):
    given_fields = st.fixed_dictionaries({}, optional=dict.fromkeys(fields, VALUES))
    return st.builds(lambda base, extra: {**base, **extra}, given_fields, st.fixed_dictionaries(more))


def answered(body, check):
    try:
        return serde.parse(body, check)
    except serde.BodyError as error:
        assert error.status in (400, 422) and error.text.startswith("Failed to ")
        return None


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=60) | VALUES.map(lambda value: json.dumps(value).encode()), st.sampled_from(CHECKS))
def test_any_bytes(body, check):
    answered(body, check)


@settings(max_examples=200, deadline=None)
@given(bodies(params.PARAMETERS), st.text(max_size=5))
def test_any_parameters(parameters, inputs):
    request = answered(json.dumps({"inputs": inputs, "parameters": parameters}).encode(), params.generate_request)
    if request is None:
        return
    try:
        validation.check(request.inputs, request.parameters, Limits())
        accepted = validation.accept([1, 2, 3], request.parameters, Limits())
    except ApiError as error:
        assert error.status == 422 and error.kind == "validation"
        return
    how = accepted.sampling
    assert 1 <= accepted.max_new_tokens <= Limits().max_total_tokens
    assert how.temperature > 0 and math.isfinite(how.temperature) and how.repetition_penalty > 0


@settings(max_examples=150, deadline=None)
@given(bodies(params.CHAT) | bodies(params.COMPLETION), st.sampled_from(CHECKS[2:]))
def test_any_openai_body(body, check):
    answered(json.dumps(body).encode(), check)


@settings(max_examples=100, deadline=None)
@given(bodies(params.PARAMETERS, a=st.just("é\n")), st.integers(0, 400))
def test_any_truncated_body(parameters, length):
    whole = json.dumps({"inputs": "你好", "parameters": parameters}, ensure_ascii=False).encode("utf-8", "surrogatepass")
    answered(whole[:length], params.generate_request)
