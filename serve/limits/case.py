"""A question with what follows from it, as every rule gets it. Standard library only."""

import shlex
from typing import NamedTuple, Optional, Set

from pipeline_train.errors import UserError

from . import memory, split
from .engines import Engine
from .gpus import Card
from .question import Question
from .sizes import Sizes

LEAST = 16  # tokens of a conversation below which a server is of no use: a block of its cache
DTYPES = {"float16": "fp16", "half": "fp16", "bfloat16": "bf16", "float32": "fp32", "float": "fp32"}

# Model types with a sharded class of their own, so that they need no flash attention (S/models/__init__.py at v0.8.2 and v3.3.7).
SHARDED_PLAIN = {"0.8": {"bloom", "gpt_neox", "opt", "t5", "galactica"}, "3.3": {"bloom", "mpt", "gpt_neox", "opt", "t5"}}
# What 0.8 shards with it; "sharded is not supported for AutoModel" for all others. 3.3 shards any type through its own backend.
SHARDED_FLASH = {"llama", "gpt_bigcode", "RefinedWeb", "RefinedWebModel"}


class Case(NamedTuple):
    asked: Question
    engine: Engine
    sizes: Sizes
    card: Card

    @property
    def title(self) -> str:
        """ "TGI 0.8.2"."""
        return "%s %s" % ({"tgi": "TGI", "vllm": "vLLM"}[self.engine.name], self.engine.version)

    @property
    def old(self) -> bool:
        return self.engine.line == "0.8"

    @property
    def flash(self) -> bool:
        """Whether TGI serves this model through flash attention on this card."""
        family = self.sizes.family
        return self.engine.name == "tgi" and family is not None and family.facts.flash_attention and self.card.flash(self.engine)

    @property
    def padded(self) -> bool:
        """Whether TGI serves it in padded batches; of a model_type that is not ours nobody knows."""
        return self.engine.name == "tgi" and self.sizes.family is not None and not self.flash

    @property
    def dtype(self) -> Optional[str]:
        """fp16, bf16, fp32 as the user wished, None without a wish. Raises UserError for another word."""
        wish = self.asked.dtype
        if wish is None or wish == "auto":
            return None
        name = DTYPES.get(wish, wish)
        if name not in DTYPES.values():
            raise UserError("--dtype %s: not one of those there are: fp16, bf16, fp32" % wish)
        return name

    @property
    def computes(self) -> str:
        """The dtype on a GPU: TGI takes fp16 unless told otherwise, vLLM the model's own half."""
        return self.dtype or ("bf16" if self.engine.name == "vllm" and self.sizes.dtype == "bf16" and self.card.bf16 else "fp16")

    def load(self, shards: int) -> memory.Load:
        return memory.Load(self.engine, self.sizes, shards, self.padded, self.computes, self.asked.nbytes)

    def shardable(self) -> bool:
        """Whether this server can split this type at all on this card."""
        if self.engine.name != "tgi":
            return True
        plain: Set[str] = SHARDED_PLAIN[self.engine.line]
        if self.sizes.model_type in plain:
            return True
        return self.card.flash(self.engine) and (not self.old or self.sizes.model_type in SHARDED_FLASH)

    def valid_shards(self) -> str:
        """The numbers of shards that would work, as text; those alone that fit on the cards, where some do."""
        found = [n for n in split.valid(self.engine, self.sizes) if n == 1 or self.shardable()]
        if self.asked.gpus is not None:
            found = [n for n in found if n <= self.asked.gpus]
        fitting = [n for n in found if self.fits(n)]
        words = ", ".join(str(n) for n in fitting or found)
        return words if fitting else "%s (none of which holds it on %s)" % (words, self.card.a)

    def fits(self, shards: int, tokens: int = LEAST) -> bool:
        """Whether so many shards hold the weights and one request of ``tokens``; True where that is not known."""
        if not self.card.known or self.card.cpu:
            return True
        found = memory.capacity(self.load(shards), self.card)
        return found is None or found["fitting_context"] >= tokens

    def export(self, target: str) -> str:
        """The command that writes this model for a server that can load it."""
        where = self.asked.where.rstrip("/") or "DIR"
        return "pipedock to-hf --input %s --output %s --target %s" % (shlex.quote(where), shlex.quote(where + "-" + target), target)
