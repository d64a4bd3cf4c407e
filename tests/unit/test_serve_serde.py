"""Bodies that cannot be used: the code, and the text the original's parser gives, position included."""

import pytest

pytest.importorskip("starlette", reason="the embedded server needs Python 3.10")
from serve.embedded import params, serde  # noqa: E402

DATA = "Failed to deserialize the JSON body into the target type: "
SYNTAX = "Failed to parse the request body as JSON: "


def refused(body, check=params.generate_request):
    with pytest.raises(serde.BodyError) as caught:
        serde.parse(body.encode() if isinstance(body, str) else body, check)
    return caught.value.status, caught.value.text


@pytest.mark.parametrize(
    "body, text",
    [
        ("{}", "missing field `inputs` at line 1 column 2"),
        ('{"inputs": 5}', "inputs: invalid type: integer `5`, expected a string at line 1 column 12"),
        ('{"inputs": null}', "inputs: invalid type: null, expected a string at line 1 column 15"),
        ('{"inputs":["a"]}', "inputs: invalid type: sequence, expected a string at line 1 column 15"),
        (
            '{"inputs":"a","parameters":null}',
            "parameters: invalid type: null, expected struct GenerateParameters at line 1 column 31",
        ),
        (
            '{"inputs":"a","parameters":{"stop":null}}',
            "parameters.stop: invalid type: null, expected a sequence at line 1 column 39",
        ),
        (
            '{"inputs":"a","parameters":{"stop":"x"}}',
            'parameters.stop: invalid type: string "x", expected a sequence at line 1 column 38',
        ),
        (
            '{"inputs":"a","parameters":{"stop":["x",1]}}',
            "parameters.stop[1]: invalid type: integer `1`, expected a string at line 1 column 41",
        ),
        (
            '{"inputs":"a","parameters":{"do_sample":null}}',
            "parameters.do_sample: invalid type: null, expected a boolean at line 1 column 44",
        ),
        (
            '{"inputs":"a","parameters":{"details":"yes"}}',
            'parameters.details: invalid type: string "yes", expected a boolean at line 1 column 43',
        ),
        (
            '{"inputs":"a","parameters":{"seed":-1}}',
            "parameters.seed: invalid value: integer `-1`, expected u64 at line 1 column 37",
        ),
        (
            '{"inputs":"a","parameters":{"top_k":1.5}}',
            "parameters.top_k: invalid type: floating point `1.5`, expected i32 at line 1 column 39",
        ),
        (
            '{"inputs":"a","parameters":{"temperature":"hot"}}',
            'parameters.temperature: invalid type: string "hot", expected f32 at line 1 column 47',
        ),
        (
            '{"inputs":"a","parameters":{"temperature":true}}',
            "parameters.temperature: invalid type: boolean `true`, expected f32 at line 1 column 46",
        ),
        (
            '{"inputs":"a","parameters":{"max_new_tokens":4294967296}}',
            "parameters.max_new_tokens: invalid value: integer `4294967296`, expected u32 at line 1 column 55",
        ),
        ('{\n "inputs":\n  {}}', "inputs: invalid type: map, expected a string at line 3 column 4"),
        ('["a"]', "invalid type: sequence, expected struct GenerateRequest at line 1 column 5"),
        ('{"é": 1, "inputs": 2}', "inputs: invalid type: integer `2`, expected a string at line 1 column 21"),  # bytes, not letters
    ],
)
def test_wrong_shape_is_422(body, text):
    assert refused(body) == (422, DATA + text)


@pytest.mark.parametrize(
    "body, text",
    [
        (r'{"inputs":"\ud800"}', "lone leading surrogate in hex escape at line 1 column 17"),
        (r'{"inputs":"a","parameters":{"temperature":"\udfff"}}', "lone leading surrogate in hex escape at line 1 column 49"),
        (r'{"inputs":"a","\uDAAA":1}', "lone leading surrogate in hex escape at line 1 column 21"),
        ("", "EOF while parsing a value at line 1 column 0"),
        ('{"inputs":"a",', "EOF while parsing an object at line 1 column 14"),
        ('{"inputs":"a"', "EOF while parsing an object at line 1 column 13"),
        ('{"inputs":"a', "EOF while parsing a string at line 1 column 12"),
        ('{"inputs"', "EOF while parsing an object at line 1 column 9"),
        ('{"inputs":}', "expected value at line 1 column 11"),
        ("{'inputs':1}", "key must be a string at line 1 column 2"),
        ('{"inputs":"a"} x', "trailing characters at line 1 column 16"),
        ('{"inputs" "a"}', "expected `:` at line 1 column 11"),
        ('{"inputs":"a" "b"}', "expected `,` or `}` at line 1 column 15"),
        ('{"inputs":"a\nb"}', "control character (\\u0000-\\u001F) found while parsing a string at line 2 column 0"),
        (b'{"inputs":"\xff"}', "invalid unicode code point at line 1 column 11"),
        ("[" * 200000, "recursion limit exceeded at line 1 column 128"),
    ],
)
def test_broken_json_is_400(body, text):
    assert refused(body) == (400, SYNTAX + text)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999", "1" * 5000])
def test_numbers_that_json_or_a_float_does_not_have(number):
    status, text = refused('{"inputs":"a","parameters":{"temperature":%s}}' % number)
    assert status == 400 and text.startswith(SYNTAX)


def test_unknown_keys_are_ignored_at_both_levels_and_defaults_apply():
    body = b'{"inputs":"a","x":{"deep":[1]},"parameters":{"y":null,"temperature":1,"best_of":null}}'
    request = serde.parse(body, params.generate_request)
    assert request.inputs == "a" and request.parameters.temperature == 1.0
    assert request.parameters.do_sample is False  # there is a parameters key
    assert serde.parse(b'{"inputs":"a"}', params.generate_request).parameters.do_sample is True  # there is none


def test_stream_is_read_on_the_compatible_route_only():
    body = b'{"inputs":"a","stream":true}'
    assert serde.parse(body, params.compat_request).stream is True
    assert serde.parse(body, params.generate_request).stream is False
    assert refused('{"inputs":"a","stream":null}', params.compat_request)[0] == 422


@pytest.mark.parametrize(
    "body, text",
    [
        ("{}", "missing field `messages`"),
        ('{"messages":[{"content":"a"}]}', "messages[0]: missing field `role`"),
        (
            '{"messages":[{"role":"user","content":null}]}',
            "messages[0]: data did not match any variant of untagged enum MessageBody",
        ),
        ('{"messages":[],"stop":"x"}', 'stop: invalid type: string "x", expected a sequence'),
        ('{"messages":[],"logit_bias":{"1":2}}', "logit_bias: invalid type: map, expected a sequence"),
        ('{"messages":[],"stream_options":null}', "stream_options: invalid type: null, expected struct StreamOptions"),
        ('{"messages":[],"max_tokens":1,"max_completion_tokens":2}', "max_completion_tokens: duplicate field `max_tokens`"),
        ('{"messages":[],"response_format":{"type":"text","value":1}}', "response_format: unknown variant `text`"),
    ],
)
def test_chat_traps(body, text):
    status, message = refused(body, params.chat_request)
    assert status == 422 and message.startswith(DATA + text)


def test_chat_accepts_what_clients_send():
    content = b'[{"type":"text","text":"a"}]'
    body = b'{"messages":[{"role":"user","content":%s}],"max_completion_tokens":7,"n":1,"stop":null,"user":"u"}' % content
    chat = serde.parse(body, params.chat_request)
    assert chat["max_tokens"] == 7 and chat["stop"] is None and chat["messages"][0]["content"][0]["text"] == "a"


def test_completion_prompts():
    assert serde.parse(b'{"prompt":"a"}', params.completion_request)["prompt"] == ["a"]
    assert serde.parse(b'{"prompt":["a","b"]}', params.completion_request)["prompt"] == ["a", "b"]
    assert "Empty array detected" in refused('{"prompt":[]}', params.completion_request)[1]
    assert refused('{"prompt":[1,2]}', params.completion_request)[0] == 422
