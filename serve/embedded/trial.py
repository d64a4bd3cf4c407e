"""What an engine shows before it serves: the logits of a plain forward pass, and a row's bits alone and in company."""

import logging
from typing import TYPE_CHECKING, Any, List, Optional, Sequence

import torch
from torch import Tensor

from .memory import free_memory
from .recorded import LEAST, Recorded

if TYPE_CHECKING:
    from .engine import Engine

LOG = logging.getLogger("pipedock.serve")
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}  # of the largest logit


def plain(model: Any, vocab: int, device: torch.device) -> List[Tensor]:
    """transformers' own logits float [3, V] at the end of each sample."""
    return [model(input_ids=torch.tensor([ids], device=device), use_cache=False).logits[0, -3:].float() for ids in samples(vocab)]


def same(engine: "Engine", wanted: Sequence[Tensor]) -> Optional[str]:
    """None when prefill and two decode steps of all samples together give what ``plain`` gave, else what went wrong."""
    asked = samples(engine.vocab)
    try:
        if engine.together:
            got = [[values.clone()] for values in engine.prefill_together(0, [ids[:-2] for ids in asked], [0] * len(asked))]
        else:
            got = [[engine.prefill(row, ids[:-2], 0)[0].clone()] for row, ids in enumerate(asked)]
        for back in (2, 1):
            logits = engine.decode([ids[-back] for ids in asked], [len(ids) - back for ids in asked])
            for row, values in enumerate(logits):
                got[row].append(values.clone())  # a recorded pass writes its result into the same place again
    except Exception as error:  # noqa: BLE001 - a model of any kind, or Triton's compiler: what they raise is theirs
        return words(error)
    finally:
        engine.rewind()
    limit = TOLERANCE[engine.dtype]
    found = [distance(torch.stack(mine), theirs) for mine, theirs in zip(got, wanted)]
    if all(one <= limit for one in found):  # never so for NaN
        return None
    return "batched logits are %.1e away from a plain forward pass (allowed %.0e)" % (max(found, key=_order), limit)


def distance(mine: Tensor, theirs: Tensor) -> float:
    """The largest difference, of the largest number of ``theirs``; NaN where one has it."""
    largest = theirs[theirs.isfinite()].abs().max()
    return float((torch.where(mine == theirs, 0.0, (mine - theirs).abs()) / largest).max())


def alone(engine: "Engine", recorded: Recorded) -> bool:
    """Whether a row gets the same bits alone as elsewhere among others, whose rows are longer, as far as there is memory to try.
    Raises what a pass raises."""
    length = min(150, engine.max_positions - 2)
    ids = samples(engine.vocab, [length])[0]
    most = (free_memory(engine.device) // 2) // max(1, engine.kv_bytes)
    found = []
    try:
        for rows, longest in ((1, length), (2, 1000), (8, 300), (LEAST, 100)):
            longest = max(length, min(longest, engine.max_positions - 2))
            if rows > 1 and rows * 2 * longest > most:
                continue
            recorded.room(rows, longest + 2)
            behind = engine.prefill(rows - 1, ids, 0)[-1].clone()
            found.append((behind, engine.decode([7] * rows, [longest] * (rows - 1) + [length])[-1].clone()))
    except torch.cuda.OutOfMemoryError as error:
        LOG.warning("what a row gets in company could not be tried: %s", words(error))
    finally:
        engine.clear()
    return all(torch.equal(mine, other) for pair in found for mine, other in zip(found[0], pair))


def words(error: Exception) -> str:
    """Its first line."""
    return str(error).strip().split("\n")[0] or type(error).__name__


def samples(vocab: int, lengths: Sequence[int] = (9, 4)) -> List[List[int]]:
    """Fixed prompts."""
    return [[(7 * place * place + 3 * place + 5) % vocab for place in range(length)] for length in lengths]


def _order(value: float) -> float:
    return value if value == value else float("inf")
