"""The embedded server in a crowd: no answer lost, mixed or cut, refusals at once, places given back, memory flat, a clean end.

    python benchmarks/serve_load.py                                       # five minutes or so on a CPU
    python benchmarks/serve_load.py --clients 16 --seconds 5 --requests 500

One server with ``--clients`` places and a tiny random llama, so that what is measured is the server and not the model (another
size with --hidden and --blocks):

- crowd: every client asks for ``--seconds`` (streams, whole answers, chats; greedy and sampled) and compares with what the same
  request got alone before;
- overload: all places taken by endless streams; their speed without and with ``--flood`` more requests a second, the server's
  processor time per token in both, and how long the 429 takes;
- gone: all places taken by clients that then vanish; tokens generated after that, and seconds until the batch is empty;
- memory: ``--requests`` requests, the server's resident memory after each tenth of them;
- drain: SIGTERM with all places taken; answers finished, exit code.

Prints one JSON row per part; ``load``: the machine's load average then, ours included.
"""

import argparse
import asyncio
import json
import os
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Callable, Coroutine, Dict, List, Tuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from bench.servers import Server  # noqa: E402
from benchmarks.serving import Flood, Streams, tiny_model  # noqa: E402
from serve.client import AsyncClient, ClientError  # noqa: E402

MESSAGES = [{"role": "user", "content": "hello"}]
STEPS = 'tgi_batch_inference_count{method="decode"}'


def questions() -> List[Tuple[str, str, Dict[str, Any]]]:
    """(kind, text, parameters): different lengths of prompt and answer, every fourth sampled."""
    asked = []
    for k in range(48):
        how: Dict[str, Any] = {"max_new_tokens": 5 + 9 * (k % 5)}
        if k % 4 == 3:
            how.update(temperature=0.9, top_k=20, seed=k)
        asked.append((("stream", "whole", "stream", "chat")[k % 4], "request %d " % k * (1 + k % 7), how))
    return asked


async def answer(client: AsyncClient, kind: str, text: str, how: Dict[str, Any]) -> Tuple[str, int]:
    """-> text and number of tokens; a stream's pieces have to add up to its text."""
    if kind == "chat":
        said = await client.chat(MESSAGES, max_tokens=how["max_new_tokens"], temperature=0.0)
        return said.content, said.completion_tokens or 0
    if kind == "whole":
        made = await client.generate(text, **how)
        return made.text, made.generated_tokens
    pieces = [piece async for piece in client.generate_stream(text, **how)]
    return pieces[-1].generated_text or "", len(pieces)


async def crowd(server: Server, clients: int, seconds: float) -> Dict[str, Any]:
    asked, wrong, end = questions(), {"lost": 0, "mixed_or_cut": 0}, 0.0
    counts, tokens = [0] * clients, [0] * clients
    async with AsyncClient(server.url, timeout=120) as client:
        alone = [await answer(client, *one) for one in asked]

        async def work(number: int) -> None:
            turn = number
            while time.monotonic() < end:
                turn += 7
                try:
                    found = await answer(client, *asked[turn % len(asked)])
                except ClientError as error:
                    print("lost: %r" % error, file=sys.stderr)
                    wrong["lost"] += 1
                    continue
                wrong["mixed_or_cut"] += found != alone[turn % len(asked)]
                counts[number] += 1
                tokens[number] += found[1]

        started = time.monotonic()
        end = started + seconds
        await asyncio.gather(*[work(number) for number in range(clients)])
        took = time.monotonic() - started
    found = {"answers": sum(counts), "fewest_of_a_client": min(counts), **wrong, "tokens_per_s": round(sum(tokens) / took, 1)}
    return {"what": "crowd", "clients": clients, "seconds": round(took, 1), **found}


async def overload(server: Server, clients: int, flood: float) -> Dict[str, Any]:
    """Windows without and with the flood: the longer the streams' contexts, the slower their steps, so each pair of windows comes
    in the other order than the pair before it, and both kinds have the same mean context."""
    streams, waits, quiet, flooded = Streams(server, clients), [], [], []
    await streams.start()
    for beside in (False, True, True, False) * 2:
        if not beside:
            quiet.append(await streams.speed(2))
            continue
        with Flood(server, flood) as poured:
            flooded.append(await streams.speed(2))
        waits += poured.waits
    running = server.gauge("tgi_batch_current_size")
    await streams.leave()
    waits.sort()
    spread = {"ms_p50": waits[len(waits) // 2], "ms_p99": waits[int(len(waits) * 0.99)], "ms_max": waits[-1]}
    found: Dict[str, Any] = {"what": "overload", "streams": clients, "still_running": running, "refused": len(waits)}
    found.update((name, round(value * 1000, 1)) for name, value in spread.items())
    for name, windows in (("alone", quiet), ("flooded", flooded)):
        found["tokens_per_s_" + name] = round(statistics.mean(speed for speed, _ in windows))
        found["cpu_ms_per_token_" + name] = round(statistics.mean(cost for _, cost in windows), 3)
    return found


async def gone(server: Server, clients: int) -> Dict[str, Any]:
    streams = Streams(server, clients)
    await streams.start()
    started, before = time.monotonic(), server.gauge(STEPS)
    await streams.leave()
    while server.gauge("tgi_batch_current_size"):
        await asyncio.sleep(0.01)
    took = time.monotonic() - started
    return {"what": "gone", "clients": clients, "seconds": round(took, 3), "steps_after": server.gauge(STEPS) - before}


async def memory(server: Server, clients: int, requests: int) -> Dict[str, Any]:
    """The first tenth warms allocators and metrics; flat means from there on."""
    asked, sizes = questions(), []
    async with AsyncClient(server.url, timeout=120) as client:
        for part in range(10):
            todo = iter(range(requests // 10))

            async def work() -> None:
                for number in todo:  # noqa: B023 - shared by this part's workers, which end before the next part
                    kind, text, how = asked[number % len(asked)]
                    await answer(client, kind, text, {**how, "max_new_tokens": 1 + number % 8})

            await asyncio.gather(*[work() for _ in range(min(clients, 32))])
            sizes.append(server.resident_mib())
            print("%d requests: %.1f MiB" % ((part + 1) * requests // 10, sizes[-1]), file=sys.stderr)
    return {"what": "memory", "requests": requests, "mib": sizes, "grown_mib_since_the_first_tenth": round(sizes[-1] - sizes[0], 1)}


async def drain(server: Server, clients: int) -> Dict[str, Any]:
    streams = Streams(server, clients)
    await streams.start(400)
    started = time.monotonic()
    server.process.send_signal(signal.SIGTERM)
    await asyncio.gather(*streams.tasks, return_exceptions=True)
    code = await asyncio.get_running_loop().run_in_executor(None, server.process.wait, 120)
    return {
        "what": "drain",
        "streams": clients,
        "finished": streams.ended,
        "seconds": round(time.monotonic() - started, 2),
        "code": code,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--flood", type=float, default=50.0, help="refused requests a second")
    parser.add_argument("--requests", type=int, default=10000)
    parser.add_argument("--hidden", type=int, default=64, help="with 64 a step is nearly all server")
    parser.add_argument("--blocks", type=int, default=3)
    parser.add_argument("--parts", default="crowd,overload,gone,memory,drain")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        size = {"hidden_size": args.hidden, "intermediate_size": args.hidden * 3 // 2, "num_hidden_layers": args.blocks}
        tiny_model(Path(folder) / "model", **size)
        with Server(Path(folder) / "model", "--max-concurrent-requests", str(args.clients)) as server:
            parts: Dict[str, Callable[[], Coroutine[Any, Any, Dict[str, Any]]]] = {
                "crowd": lambda: crowd(server, args.clients, args.seconds),
                "overload": lambda: overload(server, args.clients, args.flood),
                "gone": lambda: gone(server, args.clients),
                "memory": lambda: memory(server, args.clients, args.requests),
                "drain": lambda: drain(server, args.clients),
            }
            for name in args.parts.split(","):
                row = asyncio.run(parts[name]())
                print(json.dumps({**row, "load": round(os.getloadavg()[0], 1)}), flush=True)


if __name__ == "__main__":
    main()
