"""How long a step takes, roughly: arithmetic at a share of the card's peak, transfers between stages, the optimizer's step.

    step = (M + P - 1) x slowest stage's time for a micro-batch (forward, backward, its transfers) + averaging + optimizer

1F1B with blocking transfers, as DeepSpeed sends them; the bubble is (P - 1) / (M + P - 1) of the pipelined part.
"""

from typing import List, NamedTuple, Sequence

from ..families import Dims
from .cards import GPUS, Link
from .memory import Setup, Sizes
from .split import layer_weights

FLEX = 1.74  # FlexAttention's arithmetic takes so much longer than a product's, at 188 000 tokens a row (benchmarks/results, H200)
HOST_GBS = 10.0  # 10^9 bytes a second between a GPU and the host, and of the host's optimizer: parallel.offload


class Speed(NamedTuple):
    """Seconds of a step and tokens per second over all replicas (padding counted); ``shares``: of the FLOPs, per stage."""

    step_s: float
    tokens_per_s: float
    bubble: float
    shares: List[float]
    boundary_bytes: int  # forward and backward, one micro-batch at one stage boundary
    boundary_s: float


def bubble(pipe: int, micro_batches: int) -> float:
    """The part of the pipelined time that a stage waits."""
    return (pipe - 1) / (micro_batches + pipe - 1)


def speed(dims: Dims, sizes: Sizes, setup: Setup, boundaries: Sequence[int], gpu: str, link: Link, mfu: float) -> Speed:
    """``mfu``: share of the card's peak that arithmetic reaches, recomputation counted as work."""
    card, tokens = GPUS[gpu], setup.micro * setup.seq_len
    weights = layer_weights(dims, setup.seq_len, setup.again)
    fp8 = setup.fp8_pays and mfu == card.fp8  # any other share is not one of blocks in fp8
    work_of, products = (layer_weights(dims, length, setup.again, fp8) for length in (setup.seq_len, 0))
    dearer = FLEX if setup.compiled else 1.0
    costs = [product + (both - product) * dearer for both, product in zip(work_of, products)]
    flops, work = ([sum(each[a:b]) for a, b in zip(boundaries, boundaries[1:])] for each in (weights, costs))
    peak = card.tflops * 1e12 * mfu * (0.125 if setup.dtype == "fp32" else 1.0)
    hidden = tokens * dims.hidden * setup.width
    crossing = 2 * hidden + 16 * tokens  # hidden and its gradient; positions and segments
    crossing_s = 4 * link.us * 1e-6 + crossing / (link.gbs * 1e9) if setup.pipe > 1 else 0.0
    busy = max(work) * tokens / peak
    pipelined = (setup.micro_batches + setup.pipe - 1) * (busy + crossing_s * (2 if setup.pipe > 2 else 1))
    params = max(sizes.parameters(sizes.part(a, b)) for a, b in zip(boundaries, boundaries[1:]))
    averaging = 2 * (setup.data - 1) / setup.data * params * 2 * setup.width / (link.gbs * 1e9)
    touched = params * (30 if setup.optim == "adamw" else 22) / setup.data  # read and written once: state, gradient, weight
    update = touched / (HOST_GBS if setup.offload else card.gbs) / 1e9
    step_s = pipelined + averaging + update
    total = float(setup.data * setup.micro_batches * tokens)
    shares = [stage / sum(flops) for stage in flops]
    return Speed(step_s, total / step_s, bubble(setup.pipe, setup.micro_batches), shares, crossing, crossing_s)
