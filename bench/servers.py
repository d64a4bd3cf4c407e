"""What the measurements of servers share: a model of random weights, and a server as a process of its own."""

import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any, Dict, List, Optional

from pipeline_train.errors import RunFailed
from pipeline_train.network import free_port
from serve.reach import healthy

ROOT = Path(__file__).resolve().parents[1]


def random_model(folder: Path, config: Dict[str, Any]) -> None:
    """A model folder of random weights (bf16) with a tokenizer of single bytes; it never ends an answer by itself."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from .convert import make

    make(folder, dict(config, eos_token_id=None, bos_token_id=None))
    (folder / "generation_config.json").write_text("{}")
    core = Tokenizer(models.BPE({char: number for number, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=core).save_pretrained(str(folder))


class Server:
    """``python -m serve.embedded``, or ``command`` with a free port behind it; ready inside the with block, killed behind it."""

    def __init__(self, folder: Path, *flags: str, command: Optional[List[str]] = None) -> None:
        self.port = free_port()
        self.url = "http://127.0.0.1:%d" % self.port
        ours = [sys.executable, "-m", "serve.embedded", "--model-id", str(folder), "--no-proof", *flags, "--port"]
        clean = {name: value for name, value in os.environ.items() if name not in ("HOSTNAME", "PORT", "API_KEY")}
        self.process = subprocess.Popen([*(command or ours), str(self.port)], cwd=str(ROOT), env=clean, stdout=subprocess.DEVNULL)

    def __enter__(self) -> "Server":
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline and self.process.poll() is None:
            if healthy(self.url):
                return self
            time.sleep(0.2)
        self.__exit__()
        raise RunFailed("bench serve: the server did not start: %s" % " ".join(self.process.args))  # type: ignore[arg-type]

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
