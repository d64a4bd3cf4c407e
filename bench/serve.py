"""The embedded server with few streams and many, beside transformers' ``generate`` on the same model, in the same run.

Every contender is a process of its own, started for its turn alone. A stream asks again and again until the time is up, so requests
join and leave; tokens are counted as they come. ``generate`` has one prompt at a time, then as many as there are streams in one
static batch, which no request can join or leave.
"""

import json
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from http.client import HTTPException
from pathlib import Path
from typing import Any, Callable, Dict, List, Sequence

from pipeline_train.errors import RunFailed, UserError

from .servers import Server

PROMPT = "one two three four five six seven eight nine ten"
GENERATE = (
    """
import json, sys, time, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, tokens, seconds, batches = sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), json.loads(sys.argv[4])
cuda = torch.cuda.is_available()
model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto" if cuda else torch.float32).eval().to("cuda" if cuda else "cpu")
ids = AutoTokenizer.from_pretrained(folder)(%r, return_tensors="pt").input_ids.to(model.device)
def once(rows, new):
    some = ids.repeat(rows, 1)
    out = model.generate(some, attention_mask=torch.ones_like(some), max_new_tokens=new, do_sample=False)
    if cuda:
        torch.cuda.synchronize()
    return rows * (out.shape[1] - ids.shape[1])
with torch.inference_mode():
    for rows in batches:
        once(rows, 4)
        made, began = 0, time.monotonic()
        while not made or time.monotonic() - began < seconds:
            made += once(rows, tokens)
        print(json.dumps([rows, made / (time.monotonic() - began)]), flush=True)
"""
    % PROMPT
)
Row = Dict[str, Any]
Say = Callable[[str], None]


def bench(
    folder: Path, streams: Sequence[int], tokens: int, seconds: float, peers: bool, say: Say, flags: Sequence[str] = ()
) -> List[Row]:
    """A row for each number of ``streams``, of ``seconds`` each: {what, streams, tokens_per_s, first_token_s (median)}; with
    ``peers`` those of generate, too, and ``ratio`` of every row over generate's single stream. ``tokens``: of an answer at most;
    ``flags``: of the server. Raises UserError, RunFailed."""
    if not (folder / "config.json").is_file():
        raise UserError("--model %s: no config.json; expected a model folder" % folder)
    folder = folder.resolve()  # the server is started in another one
    rows = []
    with Server(folder, *flags) as server:
        for count in streams:
            rows.append(_streams(server, count, tokens, seconds))
            say(json.dumps(rows[-1]))
    if peers:
        rows += _generate(folder, sorted({1, *streams}), tokens, seconds, say)
        one = next(row["tokens_per_s"] for row in rows if row["what"] == "generate" and row["streams"] == 1)
        rows = [dict(row, ratio=round(row["tokens_per_s"] / one, 2)) for row in rows]
    return rows


def _streams(server: Server, count: int, tokens: int, seconds: float) -> Row:
    """``count`` clients at once. What comes before the first token of all of them is not timed."""
    _stream(server, 4, [], lambda: None)
    firsts: List[float] = []
    broken: List[Exception] = []
    made = [0] * count
    ready, end = threading.Barrier(count + 1), threading.Event()

    def client(number: int) -> None:
        ready.wait()
        try:
            while not end.is_set():
                _stream(server, max(1, tokens * (8 + number % 8) // 16), firsts, lambda: made.__setitem__(number, made[number] + 1))
        except (OSError, HTTPException, RunFailed) as error:
            broken.append(error)

    threads = [threading.Thread(target=client, args=(number,), daemon=True) for number in range(count)]
    for thread in threads:
        thread.start()
    ready.wait()
    time.sleep(min(2.0, seconds / 4))  # all are in
    before, began = sum(made), time.perf_counter()
    time.sleep(seconds)
    rate = (sum(made) - before) / (time.perf_counter() - began)
    end.set()
    for thread in threads:
        thread.join(60)
    if broken:
        told = broken[0].read().decode("utf-8", "replace") if isinstance(broken[0], urllib.error.HTTPError) else str(broken[0])
        raise RunFailed("bench serve: a stream broke off: %s" % told)
    if not rate or not firsts:
        raise RunFailed("bench serve: %d streams brought no token in %g s" % (count, seconds))
    return {
        "what": "embedded",
        "streams": count,
        "tokens_per_s": round(rate, 1),
        "first_token_s": round(sorted(firsts)[len(firsts) // 2], 4),
    }


def _stream(server: Server, tokens: int, firsts: List[float], token: Callable[[], None]) -> None:
    """One answer, token by token."""
    body = json.dumps({"inputs": PROMPT, "parameters": {"max_new_tokens": tokens}}).encode()
    request = urllib.request.Request(server.url + "/generate_stream", body, {"Content-Type": "application/json"})
    began, first = time.perf_counter(), True
    with urllib.request.urlopen(request, timeout=300) as answer:
        for line in answer:
            if line.startswith(b"data:"):
                if b'"error"' in line[:16]:
                    raise RunFailed("bench serve: %s" % line.decode("utf-8", "replace").strip())
                token()
                if first:
                    firsts.append(time.perf_counter() - began)
                first = False


def _generate(folder: Path, batches: List[int], tokens: int, seconds: float, say: Say) -> List[Row]:
    command = [sys.executable, "-c", GENERATE, str(folder), str(tokens), str(seconds), json.dumps(batches)]
    done = subprocess.run(command, capture_output=True, text=True)
    rows = []
    for line in done.stdout.splitlines():
        if line.startswith("["):
            count, rate = json.loads(line)
            rows.append({"what": "generate", "streams": count, "tokens_per_s": round(rate, 1), "first_token_s": None})
            say(json.dumps(rows[-1]))
    if done.returncode or not rows:
        raise RunFailed("bench serve: generate: %s" % (done.stderr.strip().splitlines() or ["ended without a word"])[-1])
    return rows
