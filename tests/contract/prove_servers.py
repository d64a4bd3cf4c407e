"""For the tests of ``pipedock prove``: the embedded server in this process, and two written from the contract that answer as 0.8
and as vLLM, with transformers' own numbers."""

import asyncio
import contextlib
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import torch


@contextlib.contextmanager
def embedded(model, *flags):
    """The whole embedded server, in a thread of this process -> its address."""
    import uvicorn

    from serve.embedded import args, build

    app, service = build.build(args.read(["--model-id", model, *flags], {}))
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None, lifespan="off"))

    async def work():
        await service.start()
        await server.serve()

    thread = threading.Thread(target=lambda: asyncio.run(work()))
    thread.start()
    while not server.started and thread.is_alive():
        time.sleep(0.01)
    try:
        yield "http://127.0.0.1:%d" % server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        thread.join()
        service.stop()


class Fake:
    """A server of transformers' own answers; a subclass has the routes of one engine: ``get`` and ``post`` -> document or None."""

    def __init__(self, model):
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.path, self.asked, fake = model, [], self
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self.model = AutoModelForCausalLM.from_pretrained(model).eval()
        listed = json.loads((Path(model) / "generation_config.json").read_text())["eos_token_id"]
        self.stops = {self.tokenizer.eos_token_id, *(listed if isinstance(listed, list) else [listed])}

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_):
                pass

            def do_GET(self):
                self.answer(fake.get(self.path))

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                fake.asked.append((self.path, body))
                self.answer(fake.post(self.path, body))

            def answer(self, document):
                body = b"" if document is None else json.dumps(document).encode()
                self.send_response(404 if document is None else 200)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = "http://127.0.0.1:%d" % self.server.server_address[1]

    def __enter__(self):
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.05,))
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()

    def logprobs(self, ids):
        """[n, V] behind each id."""
        with torch.inference_mode():
            return torch.log_softmax(self.model(torch.tensor([ids])).logits[0].float(), -1)

    def greedy(self, ids, count):
        """-> (new ids, their log-probabilities, "length" or "eos")"""
        new, values = [], []
        while len(new) < count:
            value, one = self.logprobs(ids + new)[-1].max(-1)
            new.append(int(one))
            values.append(float(value))
            if new[-1] in self.stops and len(new) < count:
                return new, values, "eos"
        return new, values, "length"

    def prompt(self, ids):
        """Log-probabilities of the prompt's ids, None for the first."""
        behind = self.logprobs(ids)
        return [None] + [float(behind[i, one]) for i, one in enumerate(ids[1:])]


class Tgi08(Fake):
    """Section 7 and 1.3 of the contract: no tokenize, no chat; details.prefill always with details."""

    def get(self, path):
        told = {"model_id": self.path, "model_sha": None, "model_dtype": "torch.float32", "model_device_type": "cuda",
                "model_pipeline_tag": None, "max_concurrent_requests": 128, "max_best_of": 2, "max_stop_sequences": 4,
                "max_input_length": 1000, "max_total_tokens": 1512, "waiting_served_ratio": 1.2, "max_batch_total_tokens": 32000,
                "max_waiting_tokens": 20, "validation_workers": 2, "version": "0.8.2", "sha": None,
                "docker_label": None}  # fmt: skip
        return told if path == "/info" else None

    def post(self, path, body):
        if path != "/generate":
            return None
        ids = self.tokenizer(body["inputs"])["input_ids"]
        new, values, finish = self.greedy(ids, body["parameters"].get("max_new_tokens", 20))
        prefill = [{"id": one, "text": self.tokenizer.decode([one]), "logprob": value} for one, value in zip(ids, self.prompt(ids))]
        tokens = [{"id": one, "text": self.tokenizer.decode([one]), "logprob": value, "special": one in self.stops}
                  for one, value in zip(new, values)]  # fmt: skip
        details = {"finish_reason": {"eos": "eos_token"}.get(finish, finish), "generated_tokens": len(new), "seed": None,
                   "prefill": prefill, "tokens": tokens}  # fmt: skip
        return {"generated_text": self.tokenizer.decode(new, skip_special_tokens=True), "details": details}


class Vllm(Fake):
    """vLLM's /version, /v1/models, /tokenize, /v1/completions and /v1/chat/completions, as far as they are asked here.
    ``old``: before return_token_ids was there."""

    old = False

    def get(self, path):
        listed = {"object": "list", "data": [{"id": self.path, "object": "model", "owned_by": "vllm", "max_model_len": 512}]}
        return {"/version": {"version": "0.9.1" if self.old else "0.11.0"}, "/v1/models": listed}.get(path)

    def post(self, path, body):
        assert body["model"] == self.path
        ids = self.ids(body)
        if path == "/tokenize":
            return {"count": len(ids), "max_model_len": 512, "tokens": ids, "token_strs": None}
        usage = {"prompt_tokens": len(ids), "completion_tokens": 1, "total_tokens": len(ids) + 1}
        if path == "/v1/completions":
            return {"object": "text_completion", "choices": [self.choice(ids, body)], "usage": usage}
        if path == "/v1/chat/completions":
            choice = {"index": 0, "message": {"role": "assistant", "content": "x"}, "finish_reason": "length"}
            return {"object": "chat.completion", "choices": [choice], "usage": usage}
        return None

    def ids(self, body):
        if "messages" in body:
            return self.tokenizer.apply_chat_template(body["messages"], add_generation_prompt=True)
        return self.tokenizer(body["prompt"])["input_ids"]

    def choice(self, ids, body):
        new, values, finish = self.greedy(ids, body["max_tokens"])
        rows = [None if value is None else {str(one): {"logprob": value, "rank": 1, "decoded_token": "x"}}
                for one, value in zip(ids, self.prompt(ids))]  # fmt: skip
        told = {"tokens": ["token_id:%d" % one for one in new], "token_logprobs": values, "text_offset": [], "top_logprobs": []}
        named = new[-1] if finish == "eos" and new[-1] != self.tokenizer.eos_token_id else None
        more = {} if self.old else {"prompt_token_ids": ids, "token_ids": new}
        return {"index": 0, "text": self.tokenizer.decode(new), "logprobs": told, "stop_reason": named,
                "finish_reason": {"eos": "stop"}.get(finish, finish),
                "prompt_logprobs": rows if body.get("prompt_logprobs") else None, **more}  # fmt: skip
