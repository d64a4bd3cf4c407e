"""Sixteen streams on a CPU: the embedded server, HF ``generate`` of one stream and ``transformers serve``; same model, same run.

    python benchmarks/serve_cpu.py                     # llama of 8 blocks, hidden 512, fp32; transformers serve needs fastapi
    python benchmarks/serve_cpu.py --hidden 1024 --blocks 12 --tokens 64

In turns, ``--rounds`` of each, every server started for its turn alone:

- hf: ``generate`` in a process of its own, one prompt after the other (the yardstick: ours has to give 5 times its tokens/s);
- ours: the embedded server with one stream, then with ``--streams``;
- peer: ``transformers serve --continuous_batching`` with ``--streams``. Its release 4.57 asks for the memory of a GPU and fails
  on a CPU (``get_available_memory``: None - int); that one function is answered for it, or there would be nothing to compare with.

Prints one JSON row per turn (tokens/s, and processor seconds per 1000 tokens, which a busy machine changes less), then the ratios
of the medians. ``load``: the machine's load average at the end of the turn.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any, Callable, Dict, List

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from bench.servers import Server  # noqa: E402
from benchmarks.serving import tiny_model  # noqa: E402

PEER = """
import sys
from transformers.generation.continuous_batching import cache
cache.PagedAttentionMemoryHandler.get_available_memory = staticmethod(lambda share=1.0: int(share * 2**31))
from transformers.commands.transformers_cli import main
main()
"""
HF = """
import json, sys, time, torch
from transformers import AutoModelForCausalLM
folder, tokens = sys.argv[1], int(sys.argv[2])
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
def one(seed):
    ids = torch.randint(10, 500, (1, 12), generator=torch.Generator().manual_seed(seed))
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
    assert out.shape[1] == 12 + tokens
with torch.inference_mode():
    one(0)
    started, used = time.monotonic(), time.process_time()
    for seed in range(3):
        one(seed)
print(json.dumps([3 * tokens / (time.monotonic() - started), (time.process_time() - used) / 3 / tokens * 1000]))
"""


def hf(folder: Path, args: argparse.Namespace) -> List[Dict[str, Any]]:
    done = subprocess.run([sys.executable, "-c", HF, str(folder), str(args.tokens)], check=True, stdout=subprocess.PIPE, text=True)
    speed, cost = json.loads(done.stdout.splitlines()[-1])
    return [{"what": "hf", "streams": 1, "tokens_per_s": round(speed, 1), "cpu_s_per_1000": round(cost, 2)}]


def ours(folder: Path, args: argparse.Namespace) -> List[Dict[str, Any]]:
    body = {"inputs": "one two three four five six", "parameters": {"max_new_tokens": args.tokens}}
    with Server(folder) as server:
        return [streams("ours", server, count, "/generate_stream", body, args.tokens) for count in (1, args.streams)]


def peer(folder: Path, args: argparse.Namespace) -> List[Dict[str, Any]]:
    message = [{"role": "user", "content": "one two three"}]
    body = {"model": str(folder), "messages": message, "stream": True, "max_tokens": args.tokens, "temperature": 0}
    flags = ["serve", "--continuous_batching", "--device", "cpu", "--dtype", "float32", "--host", "127.0.0.1", "--port"]
    with Server(folder, command=[sys.executable, "-c", PEER, *flags]) as server:
        return [streams("peer", server, args.streams, "/v1/chat/completions", body, args.tokens)]


def streams(what: str, server: Server, count: int, path: str, body: Dict[str, Any], tokens: int) -> Dict[str, Any]:
    """One short stream first, so that everything is loaded; then ``count`` at once. Events that came are counted: a random model
    may end an answer early, and the peer sends one or two more than it has tokens."""
    short = {"parameters": {"max_new_tokens": 2}} if "parameters" in body else {"max_tokens": 2}
    read(server, path, {**body, **short})
    events: List[int] = []
    threads = [threading.Thread(target=lambda: events.append(read(server, path, body))) for _ in range(count)]
    started, used = time.monotonic(), server.cpu_s()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    made, took = sum(events), time.monotonic() - started
    if len(events) < count or min(events) < 0.8 * tokens:
        raise SystemExit("%s: %d tokens were asked for, the streams had %s" % (what, tokens, events))
    cost = (server.cpu_s() - used) / made * 1000
    return {"what": what, "streams": count, "tokens_per_s": round(made / took, 1), "cpu_s_per_1000": round(cost, 2)}


def read(server: Server, path: str, body: Dict[str, Any]) -> int:
    """The events of a whole stream."""
    sent = urllib.request.Request(server.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(sent, timeout=600) as answer:
        events = sum(line.startswith(b"data:") for line in answer)
    return events


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name, usual in (("hidden", 512), ("blocks", 8), ("streams", 16), ("tokens", 64), ("rounds", 3)):
        parser.add_argument("--" + name, type=int, default=usual)
    args = parser.parse_args()
    rows: List[Dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder, heads = Path(name) / "model", args.hidden // 64
        size = {"hidden_size": args.hidden, "intermediate_size": args.hidden * 11 // 4, "num_hidden_layers": args.blocks}
        tiny_model(folder, **size, num_attention_heads=heads, num_key_value_heads=heads, max_position_embeddings=1024)
        turns: List[Callable[[Path, argparse.Namespace], List[Dict[str, Any]]]] = [hf, ours, peer]
        for _ in range(args.rounds):
            for turn in turns:
                for row in turn(folder, args):
                    rows.append({**row, "load": round(os.getloadavg()[0], 1)})
                    print(json.dumps(rows[-1]), flush=True)

    def median(what: str, count: int, figure: str) -> float:
        return statistics.median(row[figure] for row in rows if (row["what"], row["streams"]) == (what, count))

    for figure in ("tokens_per_s", "cpu_s_per_1000"):
        mine = median("ours", args.streams, figure)
        found = {"over_hf_one_stream": mine / median("hf", 1, figure), "over_peer": mine / median("peer", args.streams, figure)}
        print(json.dumps({"what": "ratio", "of": figure, **{key: round(value, 2) for key, value in found.items()}}))


if __name__ == "__main__":
    main()
