"""GPU memory of a server: weights, cache of keys and values, what computing a prompt takes beside them. Standard library only.

An estimate: what the allocator wastes and what libraries keep differs between drivers. Bytes per GPU:

 weights   two a parameter (fp16, bf16), matrices split over the shards, vectors on each. Twice the embedding where the server loads
           the head as a tensor of its own: 3.3 for a tied one too (S/models/custom_modeling/bloom_modeling.py:823-827@v3.3.7 and
           flash_llama_modeling.py:636-651), 0.8 for a llama, whose files must hold it
 cache     2 x blocks x key-value heads x head size a token. Padded batches (bloom in both, llama without flash attention) hold as
           many tokens of each request as the longest has. 0.8's llama copies the cache when a request joins
           (FlashCausalLMBatch.concatenate), so that half of what is free can be used
 prompt    hidden states; logits of every token of it in 0.8 (fp16, and their logarithms for details.prefill) and in padded
           batches; scores of heads x length^2 (fp16 and fp32) where there is no flash attention
"""

from typing import Any, Callable, Dict, NamedTuple, Optional

from pipeline_train.families import Dims, ModelFamily

from .engines import Engine
from .gpus import Card
from .sizes import Sizes

GIB = float(2**30)
CONTEXT = {False: 0.5, True: 1.0}  # GiB: CUDA's context and kernels; with NCCL's buffers where there are shards
FRACTION = {"0.8": 1.0, "3.3": 0.95, "0.18": 0.9}  # of the card that the server uses: TGI_WIGGLE_ROOM, vLLM's utilization
TIGHT = 0.95  # what vLLM may be told to use
CHUNK = 2048  # tokens of a prompt computed at a time where prompts are cut; never much more where memory is short
WIDTH = {"fp16": 2, "bf16": 2, "fp32": 4}


class Load(NamedTuple):
    """One model on one server. ``padded``: the generic batches without flash attention. ``dtype``: what the server computes in."""

    engine: Engine
    sizes: Sizes
    shards: int
    padded: bool
    dtype: str
    nbytes: Optional[int]

    @property
    def width(self) -> int:
        return WIDTH[self.dtype]


def weights(load: Load) -> Optional[float]:
    """GiB on one GPU, None when nothing says how many parameters there are."""
    sizes = load.sizes
    if sizes.dims is not None and sizes.family is not None and not sizes.quantized:
        return load.width * _parameters(load, sizes.family, sizes.dims) / GIB
    if load.nbytes is None:
        return None
    grows = 1.0 if sizes.quantized or sizes.dtype is None else load.width / WIDTH[sizes.dtype]
    return load.nbytes * grows / load.shards / GIB


def _parameters(load: Load, family: ModelFamily, dims: Dims) -> float:
    """Of one GPU."""
    total = 0.0
    for layer in range(dims.layers):
        for slot in family.layer_slots(dims, layer):
            size = slot.size(dims)
            if slot.hf == family.tied[1] and dims.tied and not _own_copy(load):
                continue
            whole = len(size) == 1 or (slot.shape[0] == "vocab" and size[0] % load.shards and load.engine.name == "tgi")
            count = 1
            for axis in size:
                count *= axis
            total += count if whole else count / load.shards
    return total


def _own_copy(load: Load) -> bool:
    """Whether a tied head lies in memory beside the embedding."""
    if load.engine.line == "3.3":
        return not (load.padded and load.sizes.model_type == "llama")  # transformers' own model ties
    return load.engine.line == "0.8" and not load.padded


def cache(load: Load) -> Optional[float]:
    """GiB of one token on one GPU; None when config.json does not say."""
    sizes = load.sizes
    head_dim = sizes.head_dim or (sizes.hidden // sizes.heads if sizes.hidden and sizes.heads else None)
    heads = sizes.kv_heads or sizes.heads
    if not heads or not head_dim or not sizes.blocks:
        return None
    return 2.0 * sizes.blocks * max(1, -(-heads // load.shards)) * head_dim * load.width / GIB


def prompt(load: Load, tokens: int) -> float:
    """GiB beside weights and cache while ``tokens`` of a prompt are computed."""
    sizes, shards = load.sizes, load.shards
    hidden, ffn, heads = sizes.hidden or 0, sizes.ffn or 4 * (sizes.hidden or 0), sizes.heads or 0
    each = load.width * (6 * hidden + 3 * (ffn + hidden) // shards) + load.width * _logits(load) * (sizes.vocab or 0)
    scores = (load.width + 4) * (-(-heads // shards)) * tokens * tokens if load.padded else 0
    return (tokens * each + scores) / GIB


def _logits(load: Load) -> int:
    """Copies of a whole prompt's logits that exist at once."""
    gathered = 1 if load.shards > 1 else 0
    if load.engine.line == "0.8":
        return 2 + gathered
    return 1 + gathered if load.padded else 0


def capacity(load: Load, card: Card, fraction: Optional[float] = None) -> Optional[Dict[str, Any]]:
    """What fits on each GPU of a card that is known; None where too little is known of the model.

    ``weights_gib_per_gpu``, ``kv_gib_per_token``, ``usable_gib`` (card, less what the server leaves alone and CUDA's context),
    ``free_gib`` (less the weights, negative when they do not fit), ``fitting_context`` (tokens of one request, prompt and answer),
    ``max_context`` (the same, within the model's positions), ``max_batch_tokens`` (all requests together); 0 where nothing fits."""
    held, token = weights(load), cache(load)
    if held is None or token is None:
        return None
    usable = card.gib * (FRACTION[load.engine.line] if fraction is None else fraction) - CONTEXT[load.shards > 1]
    free, cut = usable - held, load.engine.name == "vllm" or (load.engine.line == "3.3" and not load.padded)

    def taken(tokens: int) -> float:
        return token * tokens + prompt(load, min(tokens, CHUNK) if cut else tokens)

    def together(tokens: int) -> float:
        copies = 2 if load.engine.line == "0.8" and not load.padded else 1
        return copies * token * tokens + prompt(load, min(tokens, CHUNK if cut else 1000))

    fitting = most(taken, free)
    context = min(fitting, load.sizes.positions or fitting)
    return {"weights_gib_per_gpu": held, "kv_gib_per_token": token, "usable_gib": usable, "free_gib": free,
            "fitting_context": fitting, "max_context": context, "max_batch_tokens": max(context, most(together, free))}  # fmt: skip


def most(cost: Callable[[int], float], free: float) -> int:
    """The largest number of tokens whose cost, which grows with it, is not above ``free``."""
    low, high = 0, 1
    while cost(high) <= free:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if cost(middle) <= free else (low, middle)
    return low
