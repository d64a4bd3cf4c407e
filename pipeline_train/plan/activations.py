"""What a micro-batch needs on a stage: bytes that layers keep for the backward pass, and what they need while they run.

First principles, read off ``models/*.py`` operation by operation; tests/unit/test_plan_activations.py counts the same bytes on
the real modules with saved-tensor hooks. Letters: n = B T tokens of a micro-batch, D hidden, Q = heads x head_dim, F ffn,
H heads, T row length, V vocabulary, b bytes of the run's dtype (2 or 4), S = n H T attention scores of one block.

Two ways to attend (models/attention.py):
fused  scaled_dot_product_attention with an explicit mask: keeps q, k, v, its output and a log-sum-exp (4 bytes per head and
       token), not the scores. torch 2.
eager  torch 1.13 has no fused attention: keeps the probabilities in fp32 (4 S) and, in 16 bits, their rounded copy (2 S).

A compiled block (run.compile) keeps what torch.compile's partitioner decides: norms, rotations and activation functions are done
again in the backward pass, and FlexAttention needs neither a mask nor keys and values repeated to all heads.
"""

from typing import Callable, Dict, NamedTuple

from ..families import Dims

LEAST_HEAD, LEAST_ROW = 16, 128  # for models/flex.py: a head's size and a row's length below which its kernel does not take them


class Shape(NamedTuple):
    """One micro-batch: rows of ``seq`` tokens, ``micro`` of them, ``width`` bytes a number, attention ``eager`` or fused, blocks
    ``compiled`` or not."""

    micro: int
    seq: int
    width: int
    eager: bool
    compiled: bool = False

    @property
    def tokens(self) -> int:
        return self.micro * self.seq


class Layer(NamedTuple):
    """Bytes for one micro-batch in one layer.

    ``kept``: from its forward to its backward pass (its input among it where the layer saves it). ``peak``: the most that is
    alive of it while it runs forward or backward, ``kept`` included, gradients of weights not. ``input``: what recomputation
    of whole blocks keeps instead of ``kept``. ``products``: what selective recomputation keeps, and ``products_peak`` then.
    """

    kept: int
    peak: int
    input: int
    products: int = 0
    products_peak: int = 0

    def keeps(self, recompute: str) -> int:
        return {"none": self.kept, "selective": self.products, "blocks": self.input}[recompute]

    def beside(self, recompute: str) -> int:
        """The most alive of it, less what it keeps anyway."""
        return {"none": self.peak - self.kept, "selective": self.products_peak - self.products, "blocks": self.peak}[recompute]


class Attention(NamedTuple):
    """``kept`` by the attention proper; ``forward`` and ``backward``: the most alive while it runs, ``kept`` included."""

    kept: int
    forward: int
    backward: int


def attention(dims: Dims, shape: Shape, mask: int, heads_in_mask: int, inputs: int) -> Attention:
    """``inputs``: bytes of q, k, v as kept. ``mask``: bytes of the additive mask as kept; ``heads_in_mask``: 1 or H."""
    n, b = shape.tokens, shape.width
    out = n * dims.q_size * b
    if not shape.eager:
        kept = inputs + mask + out + 4 * n * dims.heads
        # The mask is made in fp32 (from distances in fp32 and a bool) and then rounded; backward: gradients of q, k, v and of the
        # output, in the layout they need.
        making = n * shape.seq * (5 + (heads_in_mask * 4 if b < 4 else 0))
        return Attention(kept, inputs + mask + max(making, 2 * out), kept + 5 * out)
    scores = n * dims.heads * shape.seq
    kept = inputs + out + scores * (6 if b == 2 else 4)
    # 16 bits forward: scores 2, softmax 4, rounded 2. Backward: probabilities 4, their gradient 2, the same in fp32 4 (or,
    # after it, the scores' gradient 2). fp32 forward: scores with and without mask; backward: probabilities and two gradients.
    forward = inputs + mask + scores * 8
    return Attention(kept, forward, inputs + out + scores * (10 if b == 2 else 12))


def _compiled_attention(dims: Dims, shape: Shape, heads_in_mask: int) -> int:
    """Bytes kept: q, k, v, the output, its log-sum-exp; without FlexAttention the mask too, and k and v for every query head."""
    n, b = shape.tokens, shape.width
    flex = shape.seq >= LEAST_ROW and dims.head_dim >= LEAST_HEAD
    keys = dims.kv_size if flex else dims.q_size
    mask = 0 if flex else n * shape.seq * b * heads_in_mask
    return n * b * (2 * dims.q_size + 2 * keys) + mask + 4 * n * dims.heads


def _llama_compiled(dims: Dims, shape: Shape) -> Layer:
    n, b, wide = shape.tokens, shape.width, 4
    hidden, ffn = n * dims.hidden * b, n * dims.ffn * b
    # Of both norms input, output and 1/rms; gate, up and their product. Cosines and sines are counted with every block, though all
    # share one pair: less than 1 % of a block.
    kept = 4 * hidden + 2 * n * wide + 2 * n * dims.head_dim * b + _compiled_attention(dims, shape, 1) + 3 * ffn
    products = _products(dims, shape, 2 * ffn) + 2 * n * dims.head_dim * b
    return Layer(kept, kept + hidden + 2 * ffn, hidden, products, products + hidden + 3 * ffn)


def _bloom_compiled(dims: Dims, shape: Shape) -> Layer:
    n, b, wide = shape.tokens, shape.width, 4
    hidden, ffn = n * dims.hidden * b, n * dims.ffn * b
    kept = 4 * hidden + 4 * n * wide + _compiled_attention(dims, shape, dims.heads) + 2 * ffn
    products = _products(dims, shape, ffn)
    return Layer(kept, kept + hidden + ffn, hidden, products, products + hidden + 2 * ffn)


def _products(dims: Dims, shape: Shape, up: int) -> int:
    """The block's input; q, k, v; attention's output with its log-sum-exp, and the product after it; ``up``: the wide ones."""
    n, b = shape.tokens, shape.width
    return n * b * (2 * dims.hidden + 2 * dims.q_size + 2 * dims.kv_size) + 4 * n * dims.heads + up


def _llama_block(dims: Dims, shape: Shape) -> Layer:
    if shape.compiled:
        return _llama_compiled(dims, shape)
    n, b, wide = shape.tokens, shape.width, 4
    hidden, query, ffn = n * dims.hidden * b, n * dims.q_size * b, n * dims.ffn * b
    # RMSNorm: its input in fp32 (in an fp32 run that is the residual stream itself), 1/rms, the rounded quotient, its output.
    norm = n * dims.hidden * wide + n * wide + 2 * hidden
    # q and k turned by their positions, v; k and v repeated to all heads. cos and sin of every token, for both.
    turned = 3 * query + 2 * n * dims.head_dim * b
    attn = attention(dims, shape, n * shape.seq * b, 1, turned)
    mlp = 4 * ffn  # gate, silu(gate), up, their product
    kept = norm + attn.kept + norm + mlp
    start = norm + hidden  # before attention; the residual stream beside it
    moments = (
        start + attn.forward + 3 * query,  # q, k, v before they are turned
        start + attn.backward + 3 * query,
        kept + hidden + ffn,  # backward: the gradients of the block's output and of the product
        kept + hidden + 2 * ffn,  # then of silu(gate) and up, the product is gone
    )
    products = _products(dims, shape, 2 * ffn) + hidden  # the last product's output, which nobody asks for again
    shared = query + 4 * n * dims.heads + 2 * ffn  # made once: attention's output, gate and up
    return Layer(kept, max(moments), hidden, products, products + max(moments) - shared)


def _bloom_block(dims: Dims, shape: Shape) -> Layer:
    if shape.compiled:
        return _bloom_compiled(dims, shape)
    n, b, wide = shape.tokens, shape.width, 4
    hidden, query, ffn = n * dims.hidden * b, n * dims.q_size * b, n * dims.ffn * b
    norm = 2 * hidden + 2 * n * wide  # LayerNorm: its input, mean and 1/deviation, its output
    bias = n * dims.heads * shape.seq * b  # ALiBi with the mask: one number for each head and pair of tokens
    attn = attention(dims, shape, bias, dims.heads, 3 * query)
    mlp = 2 * ffn  # before and after the GELU
    kept = norm + attn.kept + norm + mlp
    moments = (
        norm + attn.forward,
        norm + hidden + attn.backward,
        kept + hidden + ffn,  # backward: the gradients of the block's output and of the GELU's (then of its input: as much)
    )
    products = _products(dims, shape, ffn) + hidden
    shared = 4 * query + 4 * n * dims.heads + ffn
    return Layer(kept, max(moments), hidden, products, products + max(moments) - shared)


def _llama_embed(dims: Dims, shape: Shape) -> Layer:
    ids = 8 * shape.tokens
    return Layer(ids, ids, 0)


def _bloom_embed(dims: Dims, shape: Shape) -> Layer:
    ids, hidden = 8 * shape.tokens, shape.tokens * dims.hidden * shape.width
    kept = ids + hidden + 8 * shape.tokens  # the word embeddings and the norm's statistics
    return Layer(kept, kept + hidden, 0)


def _llama_head(dims: Dims, shape: Shape) -> int:
    n = shape.tokens
    return n * dims.hidden * (2 * shape.width + (0 if shape.compiled else 4)) + 4 * n


def _bloom_head(dims: Dims, shape: Shape) -> int:
    n = shape.tokens
    return 2 * n * dims.hidden * shape.width + 8 * n


class Kept(NamedTuple):
    block: Callable[[Dims, Shape], Layer]
    embed: Callable[[Dims, Shape], Layer]
    head_norm: Callable[[Dims, Shape], int]  # what the norm before the head keeps


FAMILIES_KEEP: Dict[str, Kept] = {
    "llama": Kept(_llama_block, _llama_embed, _llama_head),
    "bloom": Kept(_bloom_block, _bloom_embed, _bloom_head),
}
