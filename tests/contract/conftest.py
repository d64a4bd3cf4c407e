"""A tiny random llama served by a real process, and what transformers alone says about the same model."""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

if sys.version_info < (3, 10):
    collect_ignore_glob = ["test_*"]

ROOT = Path(__file__).resolve().parents[2]
EOS, SPECIAL = "<|im_end|>", ["<|im_start|>", "<|im_end|>"]


class Served:
    """A server process and its address; ``post`` answers (status, headers, body bytes) without any client library."""

    def __init__(self, folder, log, *flags, **environment):
        from tests.free_port import free_port

        self.port, self.log = free_port(), log
        self.url = "http://127.0.0.1:%d" % self.port
        command = [sys.executable, "-m", "serve.embedded", "--model-id", str(folder), "--port", str(self.port), *flags]
        clean = {name: value for name, value in os.environ.items() if name not in ("HOSTNAME", "PORT", "API_KEY")}
        with open(log, "wb") as out:
            self.process = subprocess.Popen(
                command, cwd=str(ROOT), stderr=out, env={**clean, "OMP_NUM_THREADS": "1", "HOSTNAME": "0a1b2c3d4e5f", **environment}
            )

    def wait(self, seconds=120):
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                with urllib.request.urlopen(self.url + "/health", timeout=5):
                    return self
            except OSError:
                time.sleep(0.1)
        raise AssertionError("the server did not start:\n" + Path(self.log).read_text())

    def stop(self, number=signal.SIGTERM):
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(100)

    def curl(self, path, *args, body=None):
        """-> (status, content type, body) of curl's own request."""
        more = ["-H", "Content-Type: application/json", "-d", json.dumps(body)] if body is not None else []
        form = "\n%{http_code} %{content_type}"
        done = subprocess.run(
            ["curl", "-sS", "-N", "-m", "60", "-w", form, *more, *args, self.url + path], capture_output=True, check=True
        )
        text, last = done.stdout.rsplit(b"\n", 1)
        status, _, kind = last.decode().partition(" ")
        return int(status), kind, text


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """The folder and, as ``reference(text, n, special)``, the greedy ids and text that transformers generates."""
    import torch
    from transformers import AutoTokenizer

    from tests.models import make_hf, tiny_config
    from tests.tokenizers import CHATML, tiny_tokenizer

    folder = tmp_path_factory.mktemp("served") / "tiny"
    tiny_tokenizer(folder, "bpe-bos", chat_template=CHATML, special=SPECIAL)
    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    size = {"hidden_size": 64, "intermediate_size": 96, "num_key_value_heads": 2, "max_position_embeddings": 4096}
    plain = make_hf(folder, tiny_config("llama", vocab_size=len(tokenizer), **size), seed=3)

    class Model:
        path = str(folder)

        @staticmethod
        def tokens(text, count, special=True):
            ids = tokenizer(text, add_special_tokens=special)["input_ids"]
            with torch.inference_mode():
                out = plain.generate(
                    torch.tensor([ids]), max_new_tokens=count, do_sample=False, eos_token_id=Model.eos, pad_token_id=Model.eos[0]
                )
            return out[0, len(ids) :].tolist()

        @staticmethod
        def text(text, count, special=True):
            ids = tokenizer(text, add_special_tokens=special)["input_ids"]
            new = Model.tokens(text, count, special)
            before = tokenizer.decode(ids[-1:], skip_special_tokens=True)
            return tokenizer.decode(ids[-1:] + new, skip_special_tokens=True)[len(before) :].rstrip("\ufffd")

    Model.eos = [tokenizer.convert_tokens_to_ids(EOS), tokenizer.eos_token_id]
    Model.tokenizer = tokenizer
    Model.eos.append(Model.tokens("Where it ends", 7)[6])  # so that one prompt meets an end: a list, as generation_config has
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": Model.eos}))
    Model.endless = next(text for text in ("prompt %d" % k for k in range(200)) if len(Model.tokens(text, 400)) == 400)
    return Model


@pytest.fixture(scope="session")
def server(model, tmp_path_factory):
    """The server of most tests."""
    served = Served(model.path, tmp_path_factory.mktemp("log") / "server.log", "--max-client-batch-size", "8")
    yield served.wait()
    assert served.stop() == 0


@pytest.fixture(scope="session")
def small_server(model, tmp_path_factory):
    """Three requests at once, an API key, short prompts, one browser origin."""
    flags = ["--max-concurrent-requests", "3", "--api-key", "S3cret", "--max-input-tokens", "60", "--max-total-tokens", "3000"]
    flags += ["--payload-limit", "20000", "--cors-allow-origin", "http://page.example", "--max-best-of", "1"]
    served = Served(model.path, tmp_path_factory.mktemp("log") / "small.log", *flags)
    yield served.wait()
    assert served.stop(signal.SIGINT) == 0  # Ctrl-C is as clean as SIGTERM
