"""Into how many shards a model can be split, by engine and version. Standard library only.

Sources (tgi-contract of this project, section 5; file:line at the tag):

    0.8 bloom   bare asserts of its transformers fork: n_head (modeling_bloom.py:238), vocabulary (parallel_layers.py:92), linears
    0.8 llama   hidden and intermediate size (utils/layers.py:80,106); heads are divided without a check, so an uneven split
                computes nonsense; a vocabulary that does not divide is replicated (:302-314)
    3.3         num_heads, for bloom bloom_modeling.py:262-266; llama's key-value heads too, which are not replicated
                (flash_llama_modeling.py:167-176); any other dimension: utils/weights.py:274-276. The vocabulary need not divide
                (layers/tensor_parallel.py:56-64, utils/weights.py:235-247)
    vllm        heads (config: "must be divisible by tensor parallel size"); key-value heads divide or are replicated
                (QKVParallelLinear); the vocabulary is padded to a multiple of 64 (VocabParallelEmbedding); linears divide
"""

from typing import List, Optional, Tuple

from .engines import Engine
from .sizes import Sizes

MOST = 64  # shards looked at: more GPUs than one machine has


def rules(engine: Engine, sizes: Sizes) -> List[Tuple[str, Optional[int]]]:
    """(what, how many) that the number of shards must divide; None where config.json does not say."""
    found: List[Tuple[str, Optional[int]]] = [("attention heads", sizes.heads)]
    if sizes.family is None:
        return found
    if engine.name == "tgi" and sizes.kv_heads != sizes.heads:
        found.append(("key-value heads", sizes.kv_heads))
    found.append(("the intermediate size", sizes.ffn))
    if engine.line == "0.8":
        found.append(("the hidden size", sizes.hidden))
        if sizes.model_type == "bloom":
            found.append(("the vocabulary", sizes.vocab))
    return found


def divides(engine: Engine, sizes: Sizes, shards: int) -> List[str]:
    """What ``shards`` does not divide, "52 attention heads" each; [] when it can be split so."""
    wrong = ["%d of %s" % (size, what) if what.startswith("the ") else "%d %s" % (size, what)
             for what, size in rules(engine, sizes) if size is not None and size % shards]  # fmt: skip
    if engine.name == "vllm" and sizes.kv_heads and sizes.kv_heads % shards and shards % sizes.kv_heads:
        wrong.append("%d key-value heads" % sizes.kv_heads)
    return wrong


def valid(engine: Engine, sizes: Sizes) -> List[int]:
    """Every number of shards that divides all there is to divide."""
    return [shards for shards in range(1, MOST + 1) if not divides(engine, sizes, shards)]
