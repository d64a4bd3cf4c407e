"""The original's own Python client, text-generation 0.7.0, synchronous and asynchronous, adapted from its tests."""

import asyncio

import pytest

pytest.importorskip("text_generation", reason="needs pydantic 2, never beside the pinned stack")
from text_generation import AsyncClient, Client  # noqa: E402
from text_generation.errors import OverloadedError, UnknownError, ValidationError  # noqa: E402
from text_generation.types import FinishReason  # noqa: E402


@pytest.fixture
def client(server):
    return Client(server.url, timeout=30)


@pytest.fixture
def async_client(server):
    return AsyncClient(server.url, timeout=30)


def check_one_token(response):
    assert response.generated_text is not None
    assert response.details.finish_reason == FinishReason.Length
    assert response.details.generated_tokens == 1 and response.details.seed is None
    assert response.details.prefill == [] and len(response.details.tokens) == 1
    assert response.details.tokens[0].special is False


def test_generate(client, model):
    response = client.generate("test", max_new_tokens=1)
    check_one_token(response)
    assert response.details.tokens[0].id == model.tokens("test", 1)[0]


def test_generate_async(async_client):
    check_one_token(asyncio.run(async_client.generate("test", max_new_tokens=1)))


def test_prefill(client, model):
    response = client.generate("test", max_new_tokens=1, decoder_input_details=True)
    assert [one.id for one in response.details.prefill] == model.tokenizer("test")["input_ids"]
    assert response.details.prefill[0].logprob is None


def test_best_of(client, async_client):
    for response in (
        client.generate("test", max_new_tokens=1, best_of=2, do_sample=True),
        asyncio.run(async_client.generate("test", max_new_tokens=1, best_of=2, do_sample=True)),
    ):
        assert response.details.seed is not None and len(response.details.best_of_sequences) == 1
        assert response.details.best_of_sequences[0].seed is not None


def test_validation_error(client, async_client):
    with pytest.raises(ValidationError, match="`inputs` tokens"):
        client.generate("test " * 1800, max_new_tokens=10_000)
    with pytest.raises(ValidationError, match="`truncate`"):
        asyncio.run(async_client.generate("test", truncate=100_000))


def check_stream(responses, text):
    assert len(responses) == 1
    assert responses[0].generated_text == text
    assert responses[0].details.finish_reason == FinishReason.Length
    assert responses[0].details.generated_tokens == 1 and responses[0].details.seed is None


def test_stream(client, model):
    check_stream(list(client.generate_stream("test", max_new_tokens=1)), model.text("test", 1))


def test_stream_async(async_client, model):
    async def collect():
        return [response async for response in async_client.generate_stream("test", max_new_tokens=1)]

    check_stream(asyncio.run(collect()), model.text("test", 1))


def test_longer_streams_add_up(client, async_client, model):
    async def collect():
        return [response async for response in async_client.generate_stream(model.endless, max_new_tokens=60)]

    text = model.text(model.endless, 60)
    for responses in (list(client.generate_stream(model.endless, max_new_tokens=60)), asyncio.run(collect())):
        assert len(responses) == 60 and responses[-1].generated_text == text
        assert "".join(response.token.text for response in responses) == text


def test_stream_validation_error(client, async_client):
    async def collect():
        return [response async for response in async_client.generate_stream("test", truncate=100_000)]

    with pytest.raises(ValidationError):
        list(client.generate_stream("test", truncate=100_000))
    with pytest.raises(ValidationError):
        asyncio.run(collect())


def test_all_parameters(client):
    how = {
        **{"max_new_tokens": 10, "repetition_penalty": 1.2, "frequency_penalty": 0.1, "return_full_text": True},
        **{"stop_sequences": ["test"], "temperature": 0.5, "top_p": 0.9, "top_k": 10, "truncate": 5, "typical_p": 0.9},
        **{"seed": 0, "top_n_tokens": 5},
    }
    first, second = client.generate("What is this test about?", **how), client.generate("What is this test about?", **how)
    assert first.generated_text == second.generated_text and first.generated_text.startswith("What is this test about?")
    assert first.details.seed == 0 and len(first.details.top_tokens[0]) == 5


def test_features_that_are_missing(client):
    with pytest.raises(ValidationError, match="watermark is not supported"):
        client.generate("test", watermark=True)


def test_four_at_once_are_equal(async_client):
    async def load():
        return await asyncio.gather(*[async_client.generate("Test request", max_new_tokens=10) for _ in range(4)])

    assert len({response.generated_text for response in asyncio.run(load())}) == 1


def test_chat(client, model):
    messages = [{"role": "user", "content": "hi"}]
    response = client.chat(messages, max_tokens=5, temperature=0.0)
    prompt = model.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert response.choices[0].message.content == model.text(prompt, 5, special=False)
    assert response.model == model.path and response.usage["completion_tokens"] == 5


def test_template_and_tool_errors_are_unknown_to_this_client(client):
    with pytest.raises(UnknownError, match="Tool error"):
        client.chat([{"role": "user", "content": "hi"}], tools=[{"type": "function", "function": {"name": "f"}}])


def test_overloaded(small_server):
    """The key is not in the way of an overload: it is checked first, the permit second."""
    key = {"Authorization": "Bearer S3cret"}

    async def load():
        clients = AsyncClient(small_server.url, headers=key, timeout=30)
        asked = [clients.generate("test", max_new_tokens=300) for _ in range(6)]
        return await asyncio.gather(*asked, return_exceptions=True)

    results = asyncio.run(load())
    refused = [result for result in results if isinstance(result, OverloadedError)]
    assert len(refused) == 3 and str(refused[0]) == "Model is overloaded"
