"""huggingface_hub.InferenceClient against the server."""

import pytest
from huggingface_hub import InferenceClient
from huggingface_hub.errors import HfHubHTTPError, UnknownError, ValidationError


@pytest.fixture
def client(server):
    return InferenceClient(server.url, timeout=60)


def test_text_generation_is_greedy_without_parameters(client, model):
    assert client.text_generation("Where it ends") == model.text("Where it ends", 7)


def test_details_and_full_text(client, model):
    answer = client.text_generation("Hello", max_new_tokens=4, details=True, decoder_input_details=True, return_full_text=True)
    assert answer.generated_text == "Hello" + model.text("Hello", 4)
    assert [token.id for token in answer.details.tokens] == model.tokens("Hello", 4)
    assert answer.details.finish_reason == "length" and len(answer.details.prefill) == len(model.tokenizer("Hello")["input_ids"])


def test_stream(client, model):
    pieces = list(client.text_generation("Hello", max_new_tokens=4, stream=True))
    assert "".join(pieces) == model.text("Hello", 4)
    events = list(client.text_generation("Where it ends", max_new_tokens=20, stream=True, details=True))
    assert events[-1].generated_text == model.text("Where it ends", 7) and events[-1].details.finish_reason == "eos_token"


def test_errors(client):
    with pytest.raises(ValidationError, match="`temperature` must be strictly positive"):
        client.text_generation("Hello", temperature=-1.0)
    with pytest.raises(ValidationError, match="`temperature` must be strictly positive"):
        list(client.text_generation("Hello", temperature=-1.0, stream=True))


def test_chat(client, model):
    messages = [{"role": "user", "content": "hi"}]
    answer = client.chat_completion(messages, max_tokens=5, temperature=0.0, logprobs=True, top_logprobs=2)
    prompt = model.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert answer.choices[0].message.content == model.text(prompt, 5, special=False)
    assert len(answer.choices[0].logprobs.content) == 5 and len(answer.choices[0].logprobs.content[0].top_logprobs) == 2
    assert answer.model == "dummy"  # what this client sends, echoed


@pytest.mark.parametrize("usage", [True, False])
def test_chat_stream(client, model, usage):
    messages = [{"role": "user", "content": "hi"}]
    more = {"stream_options": {"include_usage": True}} if usage else {}
    chunks = list(client.chat_completion(messages, max_tokens=5, temperature=0.0, stream=True, **more))
    prompt = model.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    pieces = [chunk for chunk in chunks if chunk.choices]
    assert "".join(chunk.choices[0].delta.content for chunk in pieces) == model.text(prompt, 5, special=False)
    assert all(chunk.usage is None for chunk in pieces) and len(pieces) == 5
    assert len(chunks) == (6 if usage else 5)
    if usage:
        assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 5


def test_chat_errors(client):
    with pytest.raises(HfHubHTTPError, match="top_p"):
        client.chat_completion([{"role": "user", "content": "hi"}], top_p=1.0)
    with pytest.raises(UnknownError, match="http_status_code.*422"):
        list(client.chat_completion([{"role": "user", "content": "hi"}], top_p=1.0, stream=True))


def test_health_and_info(server, model):
    client = InferenceClient(server.url, provider="hf-inference")
    assert client.health_check(server.url) is True
    assert client.get_endpoint_info(model=server.url)["model_id"] == model.path
