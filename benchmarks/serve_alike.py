"""Whether a greedy answer depends on who else is there: each request alone, then all of them at once, token by token.

    python benchmarks/serve_alike.py --model llama-1b                # on a GPU: bf16, recorded passes
    python benchmarks/serve_alike.py --model llama-tiny --tokens 60   # on a CPU
    ... --tokens 1400 --room 60000                                    # too little for all: some pause in the middle

Random weights, whose likeliest tokens are often almost equally likely, so that a last bit shows; prompts of 1 to 600 tokens, all of
which are read and decoded in one server. Prints a JSON row; ``same_text``: requests with the same tokens in both, ``same_bits``:
and the same log-probabilities, to the digits that the server prints (8). ``pauses``: how often one left the batch for a while.
"""

import argparse
import json
import os
import random
import sys
import tempfile
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Dict, List, Tuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from bench import shapes  # noqa: E402
from bench.servers import Server, random_model  # noqa: E402

Answer = List[Tuple[int, float]]  # (token id, log-probability)


def ask(server: Server, text: str, tokens: int) -> Answer:
    body = {"inputs": text, "parameters": {"max_new_tokens": tokens, "details": True}}
    sent = urllib.request.Request(server.url + "/generate", json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(sent, timeout=900) as answer:
        return [(token["id"], token["logprob"]) for token in json.load(answer)["details"]["tokens"]]


def crowd(server: Server, texts: List[str], tokens: int, pick: random.Random) -> List[Answer]:
    """All of them, each some milliseconds after the one before."""
    with ThreadPoolExecutor(len(texts)) as pool:
        jobs = []
        for text in texts:
            jobs.append(pool.submit(ask, server, text, tokens))
            time.sleep(pick.random() * 0.02)
        return [job.result() for job in jobs]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="llama-1b", help="a name of bench/shapes.py")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"])
    for name, usual in (("requests", 64), ("alone", 8), ("tokens", 256), ("seed", 1)):
        parser.add_argument("--" + name, type=int, default=usual)
    parser.add_argument("--room", type=int, help="tokens that the running requests may hold; default: what the memory allows")
    args = parser.parse_args()
    pick = random.Random(args.seed)
    texts = ["".join(pick.choice("abcdefgh ijklmnop") for _ in range(pick.randrange(1, 600))) for _ in range(args.requests)]
    with tempfile.TemporaryDirectory() as name:
        random_model(Path(name) / "model", shapes.SHAPES[args.model])
        flags = ["--dtype", args.dtype] if args.dtype else []
        flags += ["--max-batch-total-tokens", str(args.room)] if args.room else []
        spread = slice(None, None, max(1, args.requests // args.alone))  # early and late ones: the newest pause
        with Server(Path(name) / "model", *flags) as server:
            alone = [ask(server, text, args.tokens) for text in texts[spread]]
            together = crowd(server, texts, args.tokens, pick)[spread]
            pauses = int(server.gauge("pipedock_batch_pause_count"))
    same = [[one[0] for one in mine] == [one[0] for one in theirs] for mine, theirs in zip(alone, together)]
    row: Dict[str, Any] = {"what": "alike", **{key: getattr(args, key) for key in ("model", "dtype", "requests", "tokens", "room")}}
    row.update(alone=len(alone), pauses=pauses, same_text=sum(same), same_bits=sum(a == b for a, b in zip(alone, together)))
    print(json.dumps({**row, "load": round(os.getloadavg()[0], 1)}))


if __name__ == "__main__":
    main()
