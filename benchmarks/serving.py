"""What the serving benchmarks share: a tiny model, and a server as a process of its own."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any, List, Optional

ROOT = Path(__file__).resolve().parents[1]


def tiny_model(folder: Path, **size: Any) -> None:
    """A random llama with a tokenizer and a chat template, for the server's own speed; it seldom meets its end-of-sequence."""
    from tests.models import make_hf, tiny_config
    from tests.tokenizers import CHATML, tiny_tokenizer

    tiny_tokenizer(folder, "bpe-bos", chat_template=CHATML, special=["<|im_start|>", "<|im_end|>"])
    given = {"hidden_size": 64, "intermediate_size": 96, "num_key_value_heads": 2, "max_position_embeddings": 4096, **size}
    make_hf(folder, tiny_config("llama", vocab_size=600, **given), seed=3)


class Server:
    """``python -m serve.embedded``, or ``command`` with a free port behind it; ready inside the with block, killed behind it."""

    def __init__(self, folder: Path, *flags: str, command: Optional[List[str]] = None) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = "http://127.0.0.1:%d" % self.port
        ours = [sys.executable, "-m", "serve.embedded", "--model-id", str(folder), "--no-proof", *flags, "--port"]
        clean = {name: value for name, value in os.environ.items() if name not in ("HOSTNAME", "PORT", "API_KEY")}
        self.process = subprocess.Popen([*(command or ours), str(self.port)], cwd=str(ROOT), env=clean, stdout=subprocess.DEVNULL)

    def __enter__(self) -> "Server":
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                with urllib.request.urlopen(self.url + "/health", timeout=5):
                    return self
            except OSError:
                time.sleep(0.2)
        self.__exit__()
        raise SystemExit("the server did not start")

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def gauge(self, name: str) -> float:
        """A figure of /metrics, 0 when it has not been used yet."""
        with urllib.request.urlopen(self.url + "/metrics", timeout=30) as answer:
            found = re.search(r"^%s (\S+)$" % re.escape(name), answer.read().decode("utf-8"), re.M)
        return float(found.group(1)) if found else 0.0

    def cpu_s(self) -> float:
        """Processor seconds used so far, of all threads: what a busy machine changes little."""
        fields = Path("/proc/%d/stat" % self.process.pid).read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def resident_mib(self) -> float:
        """Linux."""
        pages = int(Path("/proc/%d/statm" % self.process.pid).read_text().split()[1])
        return round(pages * os.sysconf("SC_PAGE_SIZE") / 2**20, 1)
