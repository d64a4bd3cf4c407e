"""A causal language model of transformers, run by rows: prefill prompts piece by piece, decode one token for all rows.

Before it serves, every model shows that this gives the logits of a plain forward pass (``_settle``).
"""

import inspect
import logging
from typing import Any, Callable, Dict, List, Optional, Set, Tuple, Union

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from pipeline_train.errors import RunFailed

from . import alibi, attention, fused, packed
from .cache import COLUMNS, FixedStep, SlotCache, Step
from .loading import load
from .recorded import PIECES, ROWS, WIDTHS, Recorded, Run, graphs

LOG = logging.getLogger("pipedock.serve")
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}  # of the largest logit


class Engine:
    """``vocab``: logits per row; ``known``: token ids it can read; ``max_positions``: tokens a row may have; ``device_name``;
    ``dtype``; ``kv_bytes`` per token. ``best``: sampling.likeliest of the last pass's rows, None when it was not recorded."""

    def __init__(
        self, folder: str, dtype: Optional[str] = None, revision: Optional[str] = None, trust_remote_code: bool = False
    ) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = load(folder, dtype, self.device, revision, trust_remote_code)
        config = self.model.config
        self.dtype = next(self.model.parameters()).dtype
        self.vocab = int(self.model.get_output_embeddings().weight.shape[0])
        self.known = int(self.model.get_input_embeddings().weight.shape[0])
        self.max_positions = _positions(config)
        self.generation_eos = self.model.generation_config.eos_token_id if self.model.generation_config else config.eos_token_id
        self._arguments = set(inspect.signature(self.model.forward).parameters)
        self._cache = SlotCache()
        self._own_attention = bool(getattr(self.model, "_supports_attention_backend", False))
        self._keep: Union[int, Tensor] = 1  # for which positions the head computes: so many at the end, or one by its number
        self._recorded: Optional[Recorded] = None
        self._slopes = self._packed = False
        self.together = False  # several rows' prompts can be read in one pass
        self.kv_bytes = 0
        self.best: Optional[Tensor] = None
        with torch.inference_mode():
            self._settle()

    def prefill(self, row: int, ids: List[int], start: int, all_logits: bool = False) -> Tensor:
        """Read ``ids`` at columns ``start``.. of ``row`` -> logits float [1, V] behind the last, or [n, V] behind each."""
        if start == 0:
            self._cache.clean(row)
        if self._recorded and (self._own_attention or self._slopes) and not all_logits and len(ids) <= PIECES[-1]:
            logits, self.best = self._recorded.prefill(row, ids, start)
            return logits
        if self._recorded:
            self._recorded.room(row + 1, start + len(ids))
        return self._read(row, [ids], [start], len(ids) if all_logits else 1)

    def prefill_together(self, first: int, pieces: List[List[int]], starts: List[int]) -> Tensor:
        """``prefill`` for the rows from ``first`` on, in one pass, where ``together`` -> logits float [rows, V] behind their last:
        a pass over a few tokens takes as long as reading all weights, and here they are read once. The same bits as alone."""
        for row, start in enumerate(starts, first):
            if start == 0:
                self._cache.clean(row)
        ends = torch.tensor([len(ids) for ids in pieces], device=self.device).cumsum(0)
        return self._read(first, pieces, starts, ends - 1)

    def _read(self, first: int, pieces: List[List[int]], starts: List[int], keep: Union[int, Tensor]) -> Tensor:
        self._keep = keep
        step = Step(first, starts, [len(ids) for ids in pieces], False, self.device)
        return self._forward(torch.tensor([sum(pieces, [])], device=self.device), step)[0]

    def decode(self, tokens: List[int], lengths: List[int]) -> Tensor:
        """Add one token to each of the rows 0..B-1, which hold ``lengths`` tokens -> logits float [B, V]."""
        if self._recorded:
            logits, self.best = self._recorded.decode(tokens, lengths)
            return logits
        self._keep = 1
        step = Step(0, lengths, [1] * len(lengths), True, self.device)
        return self._forward(torch.tensor(tokens, device=self.device)[:, None], step)[:, 0]

    @property
    def attention(self) -> str:
        return "our own" if self._own_attention else "the model's own"

    @property
    def graphs(self) -> bool:
        """Whether passes are recorded."""
        return self._recorded is not None

    def move(self, source: int, target: int) -> None:
        self._cache.move(source, target)

    def clear(self) -> None:
        """Give the memory of keys and values back."""
        if self._recorded:
            self._recorded.forget()
        self._cache.clear()

    def rest(self, tokens: int) -> None:
        """Nobody runs: as ``clear``, but up to so many tokens' memory stays where passes are recorded over it."""
        rows, columns = self._cache.size
        if self._recorded is None or rows * columns > tokens:
            self.clear()

    def _fixed(self, ids: Tensor, step: FixedStep) -> Tensor:
        self._keep = 1 if step.last is None else step.last
        return self._forward(ids, step)

    def _forward(self, ids: Tensor, step: Union[Step, FixedStep]) -> Tensor:
        self._cache.step, self.best = step, None
        span = torch.arange(step.count, device=self.device)
        inputs: Dict[str, Any] = {"input_ids": ids, "past_key_values": self._cache, "use_cache": True}
        if "position_ids" in self._arguments:
            # What is computed for nobody (FixedStep) may stand behind the last position that the model has a number for.
            inputs["position_ids"] = step.positions.clamp(max=self.max_positions - 1)
        if "cache_position" in self._arguments:
            several = isinstance(step, Step) and not step.decode
            inputs["cache_position"] = step.positions[0] if several else step.width - step.count + span
        if self._slopes:
            inputs["attention_mask"] = attention.mask(step.columns, step.count, step.width, self.dtype)
        elif not self._own_attention:
            last = step.columns[:, None] + step.count
            inputs["attention_mask"] = (torch.arange(step.width, device=self.device) < last).long()
        return self.model(**inputs).logits.float()

    def _settle(self) -> None:
        """Switch to our attention, on a CPU to packed weights, on a GPU to recorded passes; keep what computes the same."""
        self._wanted = [
            self.model(input_ids=torch.tensor([ids], device=self.device), use_cache=False).logits[0, -3:].float()
            for ids in _samples(self.vocab)
        ]
        if self.device.type == "cpu":
            self._packed = packed.available() and packed.pack(self.model)
            if not self._packed:
                LOG.warning("%s on this CPU: the last bits depend on how many requests there are", self.dtype)
        self.model.get_output_embeddings().register_forward_pre_hook(lambda module, args: (self._kept(args[0]),) + args[1:])
        self._slopes = alibi.keep_slopes(self.model)
        if self.device.type == "cuda":
            fused.fuse(self.model)
        self._settle_attention()
        if self.device.type == "cuda":
            self.record(graphs)

    def _settle_attention(self) -> None:
        usual = self.model.config._attn_implementation
        if self._own_attention:
            name = "pipedock-%d" % id(self._cache)
            attention.register(name, self._cache)
            self.model.set_attn_implementation(name)
            for together in (True, False) if self._packed else (False,):
                self.together = together
                if self._same() is None:
                    return
            self._own_attention = False
            self.model.set_attn_implementation(usual)
        window = getattr(self.model.config, "sliding_window", None)
        if window and getattr(self.model.config, "use_sliding_window", True):
            # Rows of different lengths would need windows of their own: stay inside the window, where it hides nothing.
            self.max_positions = min(self.max_positions, int(window) // COLUMNS * COLUMNS)
        problem = self._same()
        if problem is not None:
            raise RunFailed("%s: models of type %s cannot be served in batches here" % (problem, self.model.config.model_type))

    def record(self, recorder: Callable[[], Callable[[Run], Run]]) -> None:
        """Run recorded passes from now on, if they compute the same; see Recorded."""
        self.together = False  # such a pass has one row's piece
        self._recorded = Recorded(self._cache, self.device, self._fixed, self._own_attention, recorder)
        problem = self._same()
        if problem is not None:
            self._recorded = None
            LOG.warning("%s is served without CUDA graphs, slower: %s", self.model.config.model_type, problem)
        elif self._own_attention:
            self._settle_sizes(self._recorded)

    def _settle_sizes(self, recorded: Recorded) -> None:
        """Leave out the sizes of a pass that give a row other bits than the largest does; where too few are left, take a slower
        kernel whose bits do not depend on the size."""
        usual = None
        for kernel in attention.KERNELS:
            found = self._alike(kernel)
            if found is None:
                break
            recorded.alike, recorded.kernel = found, kernel
            if recorded.independent and (kernel is None or self._same() is None):
                return
            usual = usual or found
        if usual is not None:
            recorded.alike, recorded.kernel = usual, None
            LOG.warning("this device's attention depends on how many requests there are: it may decide between almost equal tokens")

    def _alike(self, kernel: Optional[SDPBackend]) -> Optional[Set[Tuple[int, int]]]:
        """None where it cannot be tried."""
        try:
            heads = self.model.config.get_text_config().num_attention_heads
            return attention.alike(heads, *self._heads, self.dtype, self.device, ROWS, WIDTHS, kernel)
        except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:  # out of memory, say
            if kernel is None:
                why = str(error).split("\n")[0]
                LOG.warning("whether a row's attention is the same in any company could not be tried: %s", why)
            return None

    def _kept(self, hidden: Tensor) -> Tensor:
        return hidden[:, -self._keep :] if isinstance(self._keep, int) else hidden.index_select(1, self._keep)

    def _same(self) -> Optional[str]:
        """None when prefill and two decode steps of all samples together give what a plain pass gave, else what went wrong."""
        worst, samples = 0.0, _samples(self.vocab)
        try:
            if self.together:
                got = [[values.clone()] for values in self.prefill_together(0, [ids[:-2] for ids in samples], [0] * len(samples))]
            else:
                got = [[self.prefill(row, ids[:-2], 0)[0].clone()] for row, ids in enumerate(samples)]
            for back in (2, 1):
                logits = self.decode([ids[-back] for ids in samples], [len(ids) - back for ids in samples])
                for row, values in enumerate(logits):
                    got[row].append(values.clone())  # a recorded pass writes its result into the same place again
        except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            return str(error)
        finally:
            self.kv_bytes, self._heads = self._cache.bytes_per_token, self._cache.heads
            self.clear()
        for mine, theirs in zip(got, self._wanted):
            worst = max(worst, float((torch.stack(mine) - theirs).abs().max() / theirs.abs().max()))
        limit = TOLERANCE[self.dtype]
        return None if worst <= limit else "batched logits are %.1e away from a plain forward pass (allowed %.0e)" % (worst, limit)


def _positions(config: Any) -> int:
    scaling = getattr(config, "rope_scaling", None) or {}
    if scaling.get("rope_type", scaling.get("type")) == "longrope":
        # Beyond this, transformers turns all rows of a pass otherwise as soon as one of them is there.
        return int(getattr(config, "original_max_position_embeddings", 0) or scaling["original_max_position_embeddings"])
    for key in ("max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len", "seq_length"):
        if getattr(config, key, None):
            return int(getattr(config, key))
    return 2048


def _samples(vocab: int) -> List[List[int]]:
    """Two fixed prompts of different lengths."""
    return [[(7 * place * place + 3 * place + 5) % vocab for place in range(length)] for length in (9, 4)]
