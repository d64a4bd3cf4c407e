"""Both families and both kinds of tokenizer through the whole application, in this process: text and stream equal transformers'."""

import asyncio
import json

import httpx
import pytest
import torch
from transformers import AutoTokenizer

from serve.embedded import args, build
from tests.models import make_hf, tiny_config
from tests.tokenizers import tiny_tokenizer

CASES = [
    ("bloom", {"n_head": 6, "hidden_size": 96}, "spm"),
    ("bloom", {"tie_word_embeddings": False}, "bpe"),
    ("llama", {}, "spm-new"),
]


@pytest.fixture(params=CASES, ids=lambda case: "%s-%s" % (case[0], case[2]))
def served(request, tmp_path):
    """(application, service, reference(prompt, count) -> (ids, text))"""
    family, more, kind = request.param
    tiny_tokenizer(tmp_path, kind)
    tokenizer = AutoTokenizer.from_pretrained(str(tmp_path))
    model = make_hf(tmp_path, tiny_config(family, vocab_size=len(tokenizer), **more))
    options = args.read(["--model-id", str(tmp_path), "--max-total-tokens", "120", "--max-batch-size", "2"], {})
    app, service = build.build(options)

    def reference(prompt, count):
        ids = tokenizer(prompt)["input_ids"]
        out = []
        with torch.inference_mode():
            while len(out) < count and not (out and out[-1] in service.text.stop_ids):
                out.append(int(model(torch.tensor([ids + out])).logits[0, -1].argmax()))
        whole = tokenizer.decode(ids[-1:] + out, skip_special_tokens=True)
        return out, whole[len(tokenizer.decode(ids[-1:], skip_special_tokens=True)) :].rstrip("\ufffd")

    return app, service, reference


def test_answers_and_streams(served):
    app, service, reference = served
    prompts = ["### Human: hi\n### Assistant:", "你好", "a b c d e f g h", "### Human: 什么是人工智能？\n### Assistant:"]

    async def ask(client, prompt):
        body = {"inputs": prompt, "parameters": {"max_new_tokens": 20, "details": True}}
        whole = (await client.post("/generate", json=body)).json()
        stream = (await client.post("/generate_stream", json=body)).text
        return whole, [json.loads(event[6:]) for event in stream.split("\n\n")[:-1]]

    async def work():
        await service.start()
        try:
            async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://served", timeout=60) as client:
                return await asyncio.gather(*[ask(client, prompt) for prompt in prompts])
        finally:
            await asyncio.get_running_loop().run_in_executor(None, service.stop)

    for prompt, (whole, events) in zip(prompts, asyncio.run(work())):
        ids, text = reference(prompt, 20)
        assert [token["id"] for token in whole["details"]["tokens"]] == ids and whole["generated_text"] == text
        assert [event["token"]["id"] for event in events] == ids and events[-1]["generated_text"] == text
        if "\ufffd" not in text and not any(event["token"]["special"] for event in events):  # no bytes that are no text
            assert "".join(event["token"]["text"] for event in events) == text


@pytest.mark.parametrize(
    "flags, text",
    [
        (["--max-total-tokens", "129"], "--max-total-tokens 129: this model has positions for 128"),
        (["--max-input-tokens", "128"], "128 tokens in all"),
    ],
)
def test_limits_beyond_the_model(tmp_path, flags, text):
    from pipeline_train.errors import UserError

    tiny_tokenizer(tmp_path, "bpe")
    make_hf(tmp_path, tiny_config("llama", vocab_size=600))
    with pytest.raises(UserError) as caught:
        build.build(args.read(["--model-id", str(tmp_path), *flags], {}))
    assert text in str(caught.value)
