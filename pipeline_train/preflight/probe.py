"""One rank of the bandwidth test: ``python -m pipeline_train.preflight.probe``, started by bandwidth.py.

RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT come from the environment, DS_ACCELERATOR=cpu chooses gloo. Rank 0 writes
one JSON object to stdout: {"backend", "neighbours": [[GB/s, microseconds] of rank r and r + 1], "all_reduce": GB/s, "bytes"}.
"""

import json
import os
import sys
import time
from datetime import timedelta
from typing import Any, List

from ..leaving import leave
from ..worker import die_with_parent

JOIN_S = 30.0
LARGE, SMALL = 64 << 20, 1 << 20  # bytes of a message
SLOW_S = 0.25  # a small message that takes so long is measured alone
ROUNDS, PINGS = 3, 10


def main() -> None:
    die_with_parent()
    import torch
    from torch import distributed

    rank, world, cuda = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), os.environ.get("DS_ACCELERATOR") != "cpu"
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    distributed.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(seconds=JOIN_S))
    device = torch.device("cuda" if cuda else "cpu")
    large = torch.zeros(LARGE // 4, device=device)
    figures = torch.zeros(2 * world, dtype=torch.float64, device=device)
    for left in range(world - 1):
        distributed.barrier()
        if rank in (left, left + 1):
            gbs, pause = pair(large, left, left + 1, rank == left)
            if rank == left:
                figures[2 * left], figures[2 * left + 1] = gbs, pause * 1e6
    distributed.all_reduce(figures)
    reduced = all_reduce(large)
    if rank == 0:
        rows = figures.tolist()
        document = {"backend": "nccl" if cuda else "gloo", "all_reduce": round(reduced, 4), "bytes": LARGE, "world": world,
                    "neighbours": [[round(rows[2 * r], 4), round(rows[2 * r + 1], 1)] for r in range(world - 1)]}  # fmt: skip
        sys.stdout.write(json.dumps(document) + "\n")
    distributed.barrier()
    leave()


def pair(large: Any, left: int, right: int, sender: bool) -> List[float]:
    """[10^9 bytes a second from rank ``left`` to rank ``right``, seconds for a few bytes one way]; both call it."""
    from torch import distributed

    def one(tensor: Any) -> float:
        """There, and a word back, so that the sender knows that it has arrived; -> seconds."""
        began = time.perf_counter()
        if sender:
            distributed.send(tensor, right)
            distributed.recv(word, right)
        else:
            distributed.recv(tensor, left)
            distributed.send(word, left)
        _wait(tensor)
        return time.perf_counter() - began

    word, small = large[:1].clone(), large[: SMALL // 4]
    one(word)  # makes the connection
    pause = min(one(word.clone()) for _ in range(PINGS)) / 2
    one(small)
    took = large.new_tensor([min(one(small) for _ in range(ROUNDS))])
    if sender:  # both must do the same
        distributed.send(took, right)
    else:
        distributed.recv(took, left)
    used = small if took.item() > SLOW_S else large
    took_s = took.item() if used is small else min(one(used) for _ in range(ROUNDS))
    return [used.numel() * 4 / max(1e-9, took_s - pause) / 1e9, pause]


def all_reduce(large: Any) -> float:
    """10^9 bytes a second that every link of a ring carries: 2 (n - 1) / n of the message, twice the message at most."""
    from torch import distributed

    def one(tensor: Any) -> float:
        """Seconds, of the slowest rank: all must do the same."""
        distributed.barrier()
        _wait(tensor)
        began = time.perf_counter()
        distributed.all_reduce(tensor)
        _wait(tensor)
        took = tensor.new_tensor([time.perf_counter() - began])
        distributed.all_reduce(took, op=distributed.ReduceOp.MAX)
        return float(took.item())

    world, small = distributed.get_world_size(), large[: SMALL // 4]
    one(small)
    took = min(one(small) for _ in range(ROUNDS))
    used = small if took > SLOW_S else large
    took = took if used is small else min(one(used) for _ in range(ROUNDS))
    return 2 * (world - 1) / world * used.numel() * 4 / took / 1e9


def _wait(tensor: Any) -> None:
    import torch

    if tensor.is_cuda:
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
