"""What the benchmarks of the embedded server share: a tiny model, streams that fill its places, a flood that it refuses."""

import asyncio
import socket
import threading
import time
from pathlib import Path
from typing import Any, List, Tuple

from bench.servers import Server


def tiny_model(folder: Path, **size: Any) -> None:
    """A random llama with a tokenizer and a chat template, for the server's own speed; it seldom meets its end-of-sequence."""
    from tests.models import make_hf, tiny_config
    from tests.tokenizers import CHATML, tiny_tokenizer

    tiny_tokenizer(folder, "bpe-bos", chat_template=CHATML, special=["<|im_start|>", "<|im_end|>"])
    given = {"hidden_size": 64, "intermediate_size": 96, "num_key_value_heads": 2, "max_position_embeddings": 4096, **size}
    make_hf(folder, tiny_config("llama", vocab_size=600, **given), seed=3)


class Streams:
    """As many endless streams as there are places, read from bare sockets: what is measured must be the server, and a client that
    understands what it reads is slower than that. ``received``: tokens; ``ended``: answers that came to their end."""

    def __init__(self, server: Server, count: int) -> None:
        self.received, self.ended = 0, 0
        self._server, self._count = server, count
        self._writers: List[asyncio.StreamWriter] = []
        self.tasks: List[asyncio.Task[None]] = []

    async def start(self, tokens: int = 3900) -> None:
        while self._server.gauge("tgi_batch_current_size"):  # those who left before have not given back their places
            await asyncio.sleep(0.05)
        self.tasks = [asyncio.ensure_future(self._read(tokens)) for _ in range(self._count)]
        end = time.monotonic() + 60
        while self._server.gauge("tgi_batch_current_size") < self._count:
            if time.monotonic() > end:
                raise SystemExit(
                    "the server never had %d streams at once: an answer ended early, or its batch is smaller" % self._count
                )
            await asyncio.sleep(0.05)

    async def _read(self, tokens: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", self._server.port)
        self._writers.append(writer)
        writer.write(request("/generate_stream", tokens))
        while data := await reader.read(65536):
            self.received += data.count(b'data: {"index":')
            self.ended += data.count(b'"generated_text":"')
            if data.endswith(b"0\r\n\r\n"):
                return

    async def speed(self, seconds: float) -> Tuple[float, float]:
        """Tokens a second, and processor milliseconds of the server per token."""
        before, started, used = self.received, time.monotonic(), self._server.cpu_s()
        await asyncio.sleep(seconds)
        tokens = self.received - before
        return tokens / (time.monotonic() - started), (self._server.cpu_s() - used) * 1000 / max(1, tokens)

    async def leave(self) -> None:
        for task in self.tasks:
            task.cancel()
        for writer in self._writers:
            writer.close()
        await asyncio.gather(*self.tasks, return_exceptions=True)


def request(path: str, tokens: int) -> bytes:
    body = b'{"inputs":"x","parameters":{"max_new_tokens":%d}}' % tokens
    head = b"POST %s HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    return head % (path.encode(), len(body)) + body


class Flood:
    """A thread that asks ``rate`` times a second, on one connection, and notes how long each refusal took."""

    def __init__(self, server: Server, rate: float) -> None:
        self.waits: List[float] = []
        self._server, self._rate, self._over = server, rate, threading.Event()
        self._thread = threading.Thread(target=self._pour)

    def __enter__(self) -> "Flood":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _pour(self) -> None:
        with socket.create_connection(("127.0.0.1", self._server.port)) as connection:
            while not self._over.wait(1 / self._rate):
                started = time.perf_counter()
                connection.sendall(request("/generate", 1))
                answer = connection.recv(65536)
                while b'"overloaded"}' not in answer:  # head and body may come one after the other
                    answer += connection.recv(65536)
                self.waits.append(time.perf_counter() - started)
                assert answer.startswith(b"HTTP/1.1 429 "), answer
