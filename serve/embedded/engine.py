"""A causal language model of transformers, run by rows: prefill prompts piece by piece, decode one token for all rows.

Before it serves, every model shows that this gives the logits of a plain forward pass (``_settle``).
"""

import inspect
import logging
from functools import partial
from typing import Any, Callable, Dict, List, Optional, Tuple, Union

import torch
from torch import Tensor

from pipeline_train.errors import RunFailed, UserError

from . import alibi, attention, fused, packed, trial
from .cache import COLUMNS, FixedStep, SlotCache, Step
from .loading import load, positions
from .recorded import PIECES, Recorded, Run, graphs, needed

LOG = logging.getLogger("pipedock.serve")
SAME, DIFFERS = "", "its last bits depend on other requests"  # what a row gets in company


class Engine:
    """``vocab``: logits per row; ``known``: token ids it can read; ``max_positions``: tokens a row may have; ``device_name``;
    ``dtype``; ``kv_bytes`` per token. ``best``: sampling.likeliest of the last pass's rows, None when it was not recorded.
    ``before_recording`` is called when a pass has to be recorded first, which takes its time."""

    def __init__(
        self, folder: str, dtype: Optional[str] = None, revision: Optional[str] = None, trust_remote_code: bool = False
    ) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = load(folder, dtype, self.device, revision, trust_remote_code)
        config = self.model.config
        self.dtype = next(self.model.parameters()).dtype
        self.vocab = int(self.model.get_output_embeddings().weight.shape[0])
        self.known = int(self.model.get_input_embeddings().weight.shape[0])
        self.max_positions = positions(config)
        self.generation_eos = self.model.generation_config.eos_token_id if self.model.generation_config else config.eos_token_id
        self._arguments = set(inspect.signature(self.model.forward).parameters)
        self._cache = SlotCache()
        self._own_attention = self._alibi = False
        self._alibi_mask = torch.zeros(1, 1, 1, 1, device=self.device, dtype=self.dtype)  # one that transformers leaves as it is
        self._keep: Union[int, Tensor] = 1  # for which positions the head computes: so many at the end, or one by its number
        self._recorded: Optional[Recorded] = None
        self._packed = False
        self.together = False  # several rows' prompts can be read in one pass
        self.kv_bytes = 0
        self.best: Optional[Tensor] = None
        self.before_recording: Run = lambda: None
        with torch.inference_mode():
            self._settle()

    def prefill(self, row: int, ids: List[int], start: int, all_logits: bool = False) -> Tensor:
        """Read ``ids`` at columns ``start``.. of ``row`` -> logits float [1, V] behind the last, or [n, V] behind each."""
        if start == 0:
            self._cache.clean(row)
        if self._recorded and self._own_attention and not all_logits and len(ids) <= PIECES[-1]:
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

    def taken(self, row: int, length: int) -> List[Tensor]:
        """What there is of a row of ``length`` tokens, in the host's memory."""
        return self._cache.taken(row, length)

    def put(self, row: int, saved: List[Tensor]) -> None:
        """What was ``taken`` of a row is in this one now, bit by bit."""
        if self._recorded and saved:
            self._recorded.room(row + 1, saved[0].shape[1])
        self._cache.put(row, saved)

    def fit(self, rows: int, columns: int, most: int) -> None:
        """``rows`` are in use or will be at once, with at most ``columns``. Where tables for these and for all that there was room
        for before would take more than ``most`` tokens' memory, they are cut to what is needed; ``most`` is more than that."""
        have, need = self._cache.size, needed(rows, columns)
        if (have[0] > need[0] or have[1] > need[1]) and max(have[0], need[0]) * max(have[1], need[1]) > most:
            if self._recorded:
                self._recorded.forget()
            self._cache.trim(*need)

    def clear(self) -> None:
        """Give the memory of keys and values back."""
        if self._recorded:
            self._recorded.forget()
        self._cache.clear()

    def rewind(self) -> None:
        """After a trial: as ``clear``, and what a token took is known from here on."""
        self.kv_bytes = self._cache.bytes_per_token
        self.clear()

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
        if self._alibi:
            inputs["attention_mask"] = self._alibi_mask
        elif not self._own_attention:
            last = step.columns[:, None] + step.count
            inputs["attention_mask"] = (torch.arange(step.width, device=self.device) < last).long()
        return self.model(**inputs).logits.float()

    def _settle(self) -> None:
        """Switch to our attention, on a CPU to packed weights, on a GPU to recorded passes; keep what computes the same."""
        self._wanted = trial.plain(self.model, self.vocab, self.device)
        if any(bool(values.isnan().any()) for values in self._wanted):
            text = "models of type %s: in %s this one's logits are not numbers; try another --dtype, float32 at last"
            raise UserError(text % (self.model.config.model_type, str(self.dtype).split(".")[-1]))
        if self.device.type == "cpu":
            self._packed = packed.available() and packed.pack(self.model)
            if not self._packed:
                LOG.warning("%s on this CPU: the last bits depend on how many requests there are", self.dtype)
        self.model.get_output_embeddings().register_forward_pre_hook(lambda module, args: (self._kept(args[0]),) + args[1:])
        if self.device.type == "cuda":
            fused.fuse(self.model)
        self._settle_attention()
        if self.device.type == "cuda":
            self.record(graphs)

    def _settle_attention(self) -> None:
        undo = self._take_attention()
        if undo is not None:
            self._own_attention = True
            for together in (True, False) if self._packed else (False,):
                self.together = together
                if trial.same(self, self._wanted) is None:
                    return
            self._own_attention = self._alibi = False
            undo()
        window = getattr(self.model.config, "sliding_window", None)
        if window and getattr(self.model.config, "use_sliding_window", True):
            # Rows of different lengths would need windows of their own: stay inside the window, where it hides nothing.
            self.max_positions = min(self.max_positions, int(window) // COLUMNS * COLUMNS)
        problem = trial.same(self, self._wanted)
        if problem is not None:
            raise RunFailed("%s: models of type %s cannot be served in batches here" % (problem, self.model.config.model_type))

    def _take_attention(self) -> Optional[Callable[[], None]]:
        """Switch to our attention -> what undoes it; None where that cannot be."""
        usual, name = self.model.config._attn_implementation, "pipedock-%d" % id(self._cache)
        attend = attention.register(name, self._cache)
        undo = alibi.take(self.model, attend)
        self._alibi = undo is not None
        if undo is None and getattr(self.model, "_supports_attention_backend", False):
            self.model.set_attn_implementation(name)
            undo = partial(self.model.set_attn_implementation, usual)
        return undo

    def record(self, recorder: Callable[[], Callable[[Run], Run]]) -> None:
        """Run recorded passes from now on, if they compute the same; see Recorded. Of attention's kernels, the first that gives a
        row the same bits in any company."""
        self.together = False  # such a pass has one row's piece
        kernels: Tuple[Optional[str], ...] = attention.KERNELS if self._own_attention else (None,)
        works, problem = None, ""
        for kernel in kernels:
            self._recorded = Recorded(self._cache, self.device, self._fixed, kernel, recorder)
            self._recorded.before_recording = lambda: self.before_recording()
            found = self._tried(self._recorded)
            if found == SAME:
                return
            works, problem = (self._recorded, problem) if found == DIFFERS else (works, found)
            if kernel is not None:
                LOG.info("attention is not computed by %s: %s", kernel, found)
        self._recorded = works
        if works is not None:
            LOG.warning("the last bits depend on how many requests there are here: that may decide between almost equal tokens")
        else:
            LOG.warning("%s is served without CUDA graphs, slower: %s", self.model.config.model_type, problem)

    def _tried(self, recorded: Recorded) -> str:
        """SAME, DIFFERS, or why such passes cannot be used: a kernel that fails in larger ones is none."""
        problem = trial.same(self, self._wanted)
        if problem is None:
            try:
                return SAME if trial.alone(self, recorded) else DIFFERS
            except Exception as error:  # noqa: BLE001 - Triton's compiler, say
                problem = trial.words(error)
        return problem

    def _kept(self, hidden: Tensor) -> Tensor:
        return hidden[:, -self._keep :] if isinstance(self._keep, int) else hidden.index_select(1, self._keep)
