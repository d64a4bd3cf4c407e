"""GPU memory of one stage, byte by byte. Standard library only.

The total is what ``torch.cuda.max_memory_allocated`` shows: the larger of two moments, a micro-batch's backward pass with the
others in flight, and the end of the step, when activations are gone but reduction and optimizer need copies. N is the stage's
number of parameters, D the number of replicas (ZeRO-1 gives each 1/D of the optimizer's state). Bytes per parameter:

                    weights  gradients        master + moments (AdamW; Lion 4 less)   at the step, beside them
 current, bf16      2        4 (fp32 sum)     12/D                  2, with replicas: the sum rounded to bf16 to be averaged
 current, fp16      2        2                12/D                  2/D + 4/D: the gradient flat, then in fp32 (ZeRO-1)
 current, fp32      4        4                12/D                  4/D: the gradient flat
 pinned, fp16       2        2                12/D                  as above; then, gradients gone, fp32 gradient 4/D and 8/D
                                                                    of torch 1.13's AdamW, which is not fused: two temporaries
run.fp8 adds 2 bytes for each parameter of a block's matrices (models/fp8.py).
In bf16 the product that makes a matrix's gradient adds it to the sum (accumulate.py); with offload ZeRO-1 adds each as it comes.
Sources: DeepSpeed 0.19.8 and 0.9.2 runtime/zero/stage_1_and_2.py and runtime/bf16_optimizer.py (step, reduction, norm),
runtime/pipe/engine.py (buffers), runtime/pipe/schedule.py (1F1B), torch/optim/adamw.py; engine.py of this package (settings).
"""

from typing import Any, List, NamedTuple, Tuple

from ..families import FAMILIES, Dims
from .activations import FAMILIES_KEEP, Shape

GIB = 2**30
WIDTH = {"fp32": 4, "bf16": 2, "fp16": 2}
LOSS_CHUNK = 1 << 24  # for models/loss.py: logits in fp32 at a time, 64 MiB; two such copies while the gradient is made
ONE_BUCKET = 500_000_000  # BF16_Optimizer averages both groups as one copy where they have fewer elements (engine.py of DeepSpeed)
REDUCE_BUCKET = 50_000_000  # for engine.py: zero_optimization.reduce_bucket_size, elements
LION_PIECE = 1 << 26  # for optimizer.py: elements of a Lion update, two fp32 temporaries; its Triton kernel numbers them in int32
WORKSPACE = 32 * 2**20  # cuBLAS, per process and stream, from torch's allocator


class Setup(NamedTuple):
    """What a run looks like to a stage. ``micro_batches``: M, per replica. ``stack``: "current" or "pinned"."""

    seq_len: int
    micro: int
    micro_batches: int
    pipe: int
    data: int = 1
    dtype: str = "bf16"
    optim: str = "adamw"
    recompute: str = "none"
    offload: bool = False
    stack: str = "current"
    compiled: bool = False
    fp8: bool = False

    @property
    def again(self) -> bool:
        """The forward pass of whole blocks is done twice."""
        return self.recompute == "blocks"

    @property
    def fp8_pays(self) -> bool:
        """Without run.compile the rounding takes longer than the products gain."""
        return self.fp8 and self.compiled

    @property
    def width(self) -> int:
        return WIDTH[self.dtype]

    @property
    def shape(self) -> Shape:
        return Shape(self.micro, self.seq_len, self.width, self.stack == "pinned", self.compiled)

    @property
    def sums(self) -> bool:
        """Gradients are summed over the micro-batches in fp32, and none stays in the run's dtype."""
        return self.dtype == "bf16"

    @property
    def bf16_optimizer(self) -> bool:
        """DeepSpeed's BF16_Optimizer instead of its ZeRO-1 (engine.py of 0.19.8, _do_optimizer_sanity_check)."""
        return self.dtype == "bf16" and not self.offload


def setup_of(run: Any, stack: str) -> Setup:
    """From a RunConfig whose seq_len and dtype are resolved."""
    parallel, batch = run.parallel, run.batch
    return Setup(run.data.seq_len, batch.micro, run.micro_batches, parallel.pipe, parallel.data, run.model.dtype, run.optim.type,
                 parallel.recompute, parallel.offload, stack, run.run.compile, run.run.fp8)  # fmt: skip


class Bytes(NamedTuple):
    """Of one stage. ``activations``: kept for the backward pass, all micro-batches in flight. ``buffers``: the rest of the
    peak: what the running layer and the loss need, received activations, the step's copies."""

    weights: int
    grads: int
    optimizer: int
    activations: int
    buffers: int

    @property
    def total(self) -> int:
        return sum(self)


class Part(NamedTuple):
    """Layers [start, end) of a model: what of them matters here."""

    embed: bool
    blocks: int
    head: bool


class Sizes:
    """Parameter counts of a model, each looked up once."""

    def __init__(self, dims: Dims) -> None:
        self.dims = dims
        family = FAMILIES[dims.family]
        self.params = [family.layer_params(dims, layer) for layer in (0, 1, dims.layers - 1)]
        self.matrices, self.largest = [], []
        for layer in (0, 1, dims.layers - 1):
            sizes = [s.size(dims) for s in family.layer_slots(dims, layer)]
            products = [s[0] * s[1] for s in sizes if len(s) == 2]
            self.matrices.append(sum(products))
            self.largest.append(max(products))

    def part(self, start: int, end: int) -> Part:
        last = self.dims.layers - 1
        return Part(start == 0, min(end, last) - max(start, 1), end > last)

    def _total(self, each: List[int], part: Part) -> int:
        shared = self.dims.vocab * self.dims.hidden if part.embed and part.head and self.dims.tied else 0
        return part.embed * each[0] + part.blocks * each[1] + part.head * each[2] - shared

    def parameters(self, part: Part) -> int:
        """A tied head is a copy of its own, unless embedding and head share a stage (stages.py)."""
        return self._total(self.params, part)

    def matrix_elements(self, part: Part) -> int:
        return self._total(self.matrices, part)

    def fp8_copies(self, part: Part) -> int:
        """Bytes of models/fp8.py's two copies of each block's matrices."""
        return 2 * part.blocks * self.matrices[1]

    def largest_matrix(self, part: Part) -> int:
        here = (part.embed, part.blocks > 0, part.head)
        return max(size for size, present in zip(self.largest, here) if present)


def stage_bytes(sizes: Sizes, setup: Setup, stage: int, start: int, end: int) -> Bytes:
    """Memory of layers [start, end) as stage number ``stage`` of ``setup.pipe``."""
    part = sizes.part(start, end)
    weights, grads, optimizer = static_bytes(sizes.parameters(part), setup)
    weights += sizes.fp8_copies(part) if setup.fp8 else 0
    activations = running_bytes(sizes, setup, stage, part)[0]
    peak = max(moments(sizes, setup, stage, start, end))
    return Bytes(weights, grads, optimizer, activations, peak - weights - grads - optimizer - activations)


def moments(sizes: Sizes, setup: Setup, stage: int, start: int, end: int) -> Tuple[int, int]:
    """-> (peak while micro-batches run, peak at the end of the step), everything included."""
    part = sizes.part(start, end)
    params = sizes.parameters(part)
    computing = sum(static_bytes(params, setup)) + running_bytes(sizes, setup, stage, part)[1]
    logits = setup.shape.tokens * sizes.dims.vocab * setup.width if part.head else 0
    stepping = step_bytes(sizes, setup, part, params) + min(2, setup.micro_batches) * logits  # never freed, see running_bytes
    copies = WORKSPACE + (sizes.fp8_copies(part) if setup.fp8 else 0)
    return computing + copies, stepping + copies


def static_bytes(params: int, setup: Setup) -> Tuple[int, ...]:
    """-> (weights, gradients, master weights and moments): there from step to step, or all through the backward passes."""
    weights = params * setup.width
    grads = 4 * params if setup.sums else params * setup.width  # whole on every replica
    state = 4 + (8 if setup.optim == "adamw" else 4)
    optimizer = 0 if setup.offload else -(-state * params // setup.data)
    return weights, grads, optimizer


def running_bytes(sizes: Sizes, setup: Setup, stage: int, part: Part) -> Tuple[int, ...]:
    """-> (kept for backward by everything in flight, peak while a micro-batch runs; both without ``static_bytes``)."""
    dims, shape, keep = sizes.dims, setup.shape, FAMILIES_KEEP[sizes.dims.family]
    n, b = shape.tokens, shape.width
    hidden, ints, wide = n * dims.hidden * b, 16 * n, 4 * n * dims.hidden  # ints: positions and segments
    flight = min(setup.pipe - stage, setup.micro_batches)
    block = keep.block(dims, shape)
    each = block.keeps(setup.recompute)
    embed = keep.embed(dims, shape).kept if part.embed else 0
    # Received (or read) and cloned by the engine; its output waits in a pipeline buffer until the gradient comes.
    wire = (2 * ints + 8 * n if part.embed else hidden + 2 * ints) + (0 if part.head else hidden)
    logits = n * dims.vocab * b if part.head else 0
    norm = keep.head_norm(dims, shape) if part.head else 0
    kept = wire + embed + part.blocks * each + norm + logits + (13 * n if part.head else 0)
    # The engine's second buffer still holds the last micro-batch's logits: it forgets outputs on all stages but the last.
    stale = logits if part.head and setup.micro_batches > 1 else 0
    # From the second micro-batch on a weight's gradient is made beside the sum so far. With one micro-batch none is there yet
    # when the backward pass begins (the engine drops them after each step): each layer adds its own.
    adds, stays, made = setup.micro_batches > 1, 0 if setup.sums else b, 0 if setup.bf16_optimizer else b
    params = sizes.parameters(part) * stays
    head, blocks = sizes.params[2] * stays * part.head, sizes.params[1] * stays * part.blocks
    # A compiled block hands over the gradients of all its weights at once.
    gradients = (sizes.params[1] if setup.compiled else sizes.largest[1]) * made
    vocabulary = dims.vocab * dims.hidden * made
    highest, kept_then = [], kept
    if part.head:
        chunk = 0 if setup.compiled else min(n * dims.vocab, LOSS_CHUNK)
        there = params * adds
        highest.append(kept + logits + 4 * chunk * (2 if b == 2 else 1) + there)  # their gradient, in pieces through fp32
        highest.append(kept + logits + hidden + vocabulary + there)  # the head's gradient
        kept_then = kept - norm
    if part.blocks:
        there = params if adds else head
        highest.append(kept_then + block.beside(setup.recompute) + gradients + there)
    if part.embed:
        there = params if adds else head + blocks
        highest.append(wire + logits + hidden + embed + (vocabulary or 2 * wide) + there)
    peak = max(highest) - params  # which static_bytes has counted
    received = hidden + ints if stage > 0 else hidden if not part.head else 0
    activations = flight * kept + stale
    return activations, (flight - 1) * kept + max(kept, peak) + stale + received


def step_bytes(sizes: Sizes, setup: Setup, part: Part, params: int) -> int:
    """Peak at the end of the step, everything included."""
    matrices, data, b = sizes.matrix_elements(part), setup.data, setup.width
    weights, grads, optimizer = static_bytes(params, setup)
    largest = min(sizes.largest_matrix(part), -(-matrices // data))
    if setup.bf16_optimizer:
        copies = 0 if data == 1 else 2 * matrices if matrices > ONE_BUCKET else 6 * params
        return weights + grads + optimizer + max(copies, _update_temporaries(setup, matrices // data))
    if setup.offload:
        mine = 4 * params // data if setup.dtype == "bf16" else 0  # the partition that the sums are reduced into
        return weights + grads + mine + largest * b + REDUCE_BUCKET * 4
    mine = -(-grads // data)  # the gradients of other replicas' partitions are gone by now
    flat, wide = b * matrices // data, (4 * matrices // data if b == 2 else 0)
    moments = (
        weights + grads + optimizer + min(REDUCE_BUCKET, params) * b,  # a bucket of gradients, flat, to be averaged
        weights + mine + optimizer + 8 * largest,  # the norm of a gradient is taken in fp64
        weights + mine + optimizer + flat + wide,
        weights + optimizer + 4 * matrices // data + _update_temporaries(setup, matrices // data),
    )
    return max(moments)


def _update_temporaries(setup: Setup, elements: int) -> int:
    """Bytes that the optimizer's arithmetic needs for ``elements`` parameters."""
    if setup.optim == "lion":
        return 2 * 4 * min(elements, LION_PIECE)
    return 8 * elements if setup.stack == "pinned" else 0  # fused AdamW works in place
