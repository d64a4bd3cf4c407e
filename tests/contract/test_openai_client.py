"""The openai library against the /v1 routes; and their bytes."""

import json
import re

import pytest

openai = pytest.importorskip("openai", reason="needs Python 3.10")


@pytest.fixture
def client(server):
    return openai.OpenAI(base_url=server.url + "/v1", api_key="any", max_retries=0, timeout=60)


MESSAGES = [{"role": "user", "content": "hi"}]


def expected(model, count):
    prompt = model.tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    return model.text(prompt, count, special=False)


def test_chat(client, model):
    answer = client.chat.completions.create(model="tgi", messages=MESSAGES, max_tokens=5, temperature=0)
    assert answer.choices[0].message.content == expected(model, 5) and answer.choices[0].finish_reason == "length"
    assert answer.id == "" and answer.model == model.path and answer.system_fingerprint == "3.3.6-dev0-native"
    assert answer.usage.completion_tokens == 5 and answer.usage.total_tokens == answer.usage.prompt_tokens + 5
    assert client.chat.completions.create(model="mine", messages=MESSAGES, max_tokens=1).model == "mine"


def test_chat_seed_and_sampling(client):
    def ask(**how):
        return client.chat.completions.create(model="tgi", messages=MESSAGES, max_tokens=8, **how).choices[0].message.content

    assert ask(seed=1) == ask(seed=1)
    assert len({ask() for _ in range(3)}) == 3


@pytest.mark.parametrize("usage", [True, False])
def test_chat_stream(client, model, usage):
    more = {"stream_options": {"include_usage": True}} if usage else {}
    chunks = list(client.chat.completions.create(model="tgi", messages=MESSAGES, max_tokens=5, temperature=0, stream=True, **more))
    pieces = [chunk for chunk in chunks if chunk.choices]
    assert "".join(chunk.choices[0].delta.content for chunk in pieces) == expected(model, 5)
    assert all(chunk.usage is None and chunk.choices[0].index == 0 for chunk in pieces)
    assert [chunk.choices[0].finish_reason for chunk in pieces] == [None] * 4 + ["length"]
    assert (chunks[-1].usage is not None) is usage and len(chunks) == 5 + usage


def test_chat_stream_bytes(server, model):
    body = {
        "model": "m",
        "messages": MESSAGES,
        "max_tokens": 2,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    status, kind, stream = server.curl("/v1/chat/completions", body=body)
    assert (status, kind) == (200, "text/event-stream") and stream.endswith(b"\n\ndata: [DONE]\n\n")
    head = (
        r'data: \{"object":"chat\.completion\.chunk","id":"","created":\d+,"model":"m","system_fingerprint":"3\.3\.6-dev0-native",'
    )
    delta = r'"choices":\[\{"index":0,"delta":\{"role":"assistant","content":"[^"]*"\},"logprobs":null,"finish_reason":%s\}\],'
    delta += r'"usage":null\}'
    usage = r'"choices":\[\],"usage":\{"prompt_tokens":\d+,"completion_tokens":2,"total_tokens":\d+\}\}'
    end = r"data: \[DONE\]"
    wanted = [head + delta % "null", head + delta % '"length"', head + usage, end, ""]
    events = stream.decode().split("\n\n")
    assert len(events) == len(wanted) and all(re.fullmatch(one, event) for one, event in zip(wanted, events))


def test_chat_answer_bytes(server):
    body = {"messages": MESSAGES, "max_tokens": 1, "temperature": 0}
    found = json.loads(server.curl("/v1/chat/completions", body=body)[2])
    assert list(found) == ["object", "id", "created", "model", "system_fingerprint", "choices", "usage"]
    assert list(found["choices"][0]) == ["index", "message", "logprobs", "finish_reason"]
    assert list(found["usage"]) == ["prompt_tokens", "completion_tokens", "total_tokens"]


def test_an_end_is_called_stop_and_special_tokens_are_silent(client, server, model):
    answer = client.completions.create(model="tgi", prompt="Where it ends", temperature=0, max_tokens=50)
    assert answer.choices[0].finish_reason == "stop" and answer.choices[0].text == model.text("Where it ends", 7)
    _, _, stream = server.curl(
        "/v1/completions", body={"prompt": "Where it ends", "temperature": 0, "max_tokens": 50, "stream": True}
    )
    events = [json.loads(event[6:]) for event in stream.decode().split("\n\n")[:-2]]
    assert [event["choices"][0]["finish_reason"] for event in events] == [""] * 6 + ["eos_token"]  # not mapped in streams
    assert list(events[0]) == ["object", "id", "created", "choices", "model", "system_fingerprint"]
    assert list(events[-1]) == ["object", "id", "created", "model", "system_fingerprint", "choices", "usage"]


def test_continue_a_message(client, model):
    messages = MESSAGES + [{"role": "assistant", "content": "The answer"}]
    answer = client.chat.completions.create(model="tgi", messages=messages, max_tokens=5, temperature=0).choices[0].message.content
    prompt = model.tokenizer.apply_chat_template(messages, tokenize=False, continue_final_message=True)
    assert prompt.endswith("The answer") and answer == model.text(prompt, 5, special=False)


def test_completions_with_several_prompts(client, model):
    prompts = ["Hello", "Where it ends", "prompt", "another"]
    answer = client.completions.create(model="tgi", prompt=prompts, max_tokens=4, temperature=0)
    choices = sorted(answer.choices, key=lambda choice: choice.index)
    assert [choice.index for choice in choices] == [0, 1, 2, 3]
    assert [choice.text for choice in choices] == [model.text(prompt, 4) for prompt in prompts]
    texts, final = {}, 0
    for chunk in client.completions.create(model="tgi", prompt=prompts, max_tokens=4, temperature=0, stream=True):
        (choice,) = chunk.choices
        texts[choice.index] = texts.get(choice.index, "") + choice.text
        final += chunk.usage is not None
    assert [texts[index] for index in range(4)] == [model.text(prompt, 4) for prompt in prompts] and final == 4


def test_errors(client, server):
    with pytest.raises(openai.UnprocessableEntityError) as caught:
        client.chat.completions.create(model="tgi", messages=MESSAGES, top_p=1)
    assert "`top_p` must be > 0.0 and < 1.0" in str(caught.value.response.text)
    with pytest.raises(openai.UnprocessableEntityError):
        client.chat.completions.create(model="tgi", messages=MESSAGES, stop="x")
    with pytest.raises(openai.APIError, match="`top_p` must be"):
        list(client.chat.completions.create(model="tgi", messages=MESSAGES, top_p=1, stream=True))
    _, _, stream = server.curl("/v1/chat/completions", body={"messages": MESSAGES, "top_p": 1, "stream": True})
    message = b"Input validation error: `top_p` must be > 0.0 and < 1.0"
    assert stream == b'data: {"error":{"message":"%s","http_status_code":422}}\n\ndata: [DONE]\n\n' % message


@pytest.mark.parametrize(
    "path, more, error, kind",
    [
        (
            "chat/completions",
            {"messages": MESSAGES, "tools": [{}], "stream": True},
            "Tool error: tools are not supported",
            "tool_error",
        ),
        (
            "chat/completions",
            {"messages": MESSAGES, "response_format": {"type": "json", "value": {}}},
            "Input validation error: grammar is not supported",
            "validation",
        ),
        (
            "chat/completions",
            {"messages": MESSAGES, "tools": [{}], "response_format": {"type": "json", "value": {}}},
            "Tool error: Grammar and tools are mutually exclusive",
            "tool_error",
        ),
        (
            "completions",
            {"prompt": "x", "suffix": "y"},
            "Suffix is not supported and can be achieved by preprocessing the prompt.",
            "suffix not supported",
        ),
        (
            "completions",
            {"prompt": ["x"] * 9},
            "Number of prompts exceeds the maximum allowed batch size of 8",
            "batch size exceeded",
        ),
    ],
)
def test_refused_before_any_stream(server, path, more, error, kind):
    status, content, body = server.curl("/v1/" + path, body=more)
    assert (status, content) == (422, "application/json") and json.loads(body) == {"error": error, "error_type": kind}


def test_tools_that_must_not_be_used(client):
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    answer = client.chat.completions.create(model="tgi", messages=MESSAGES, tools=[tool], tool_choice="none", max_tokens=1)
    assert answer.choices[0].finish_reason == "length"


def test_models(client, model):
    assert [one.id for one in client.models.list()] == [model.path]
