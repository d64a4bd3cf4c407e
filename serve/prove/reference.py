"""What transformers alone says about the model folder: log-probabilities of given ids, and the likeliest token at each place."""

import math
from pathlib import Path
from typing import Any, List, NamedTuple, Optional, Sequence

import torch

from pipeline_train import host, proof
from pipeline_train.errors import UserError
from pipeline_train.families import read_config

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
ROWS = 64  # positions whose logits are widened at once


class Scores(NamedTuple):
    """For a row of n ids, [n] each: ``logprob[i]`` of ids[i] given those before it (NaN for the first); ``best[i]`` the likeliest
    token there and ``best_logprob[i]``; entry n of both is about the token that would come next."""

    logprob: List[float]
    best: List[int]
    best_logprob: List[float]


class Bounds(NamedTuple):
    """What the server's log-probabilities may differ by, in nats: one of them, and all of them on average."""

    one: float
    mean: float


class Reference:
    """``name``: what the server computes in (float32, float16, bfloat16). The reference itself is float32 on the same weights."""

    def __init__(self, folder: str, name: str) -> None:
        from transformers import AutoModelForCausalLM

        code = proof.foreign_code(folder)
        if code is not None:
            raise UserError("--model %s: %s is code that transformers would run; read it, then remove it" % (folder, code))
        _check_memory(folder)
        self.dtype = DTYPES[name]
        try:
            loaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=self.dtype, output_loading_info=True)
        except Exception as error:  # safetensors' errors derive from Exception alone
            why = (" ".join(str(error).split()) or type(error).__name__)[:300]
            raise UserError("--model %s: transformers cannot load it: %s" % (folder, why)) from error
        self.model, report = loaded
        missing = sorted(map(str, report["missing_keys"])) + sorted(map(str, report["mismatched_keys"]))
        if missing:
            raise UserError("--model %s: its weights are not whole: %s" % (folder, ", ".join(missing[:5])))
        self.model.eval()

    @property
    def vocab(self) -> int:
        return int(self.model.get_output_embeddings().weight.shape[0])

    def bounds(self, rows: Sequence[List[int]], tolerance: float) -> Bounds:
        """``tolerance``, and for 16 bits several times what rounding alone does to this model on these rows. Widens the model
        to float32; to be called once, before ``scores``."""
        if self.dtype == torch.float32:
            return Bounds(tolerance, tolerance)
        rounded = [self.scores(row) for row in rows]
        self.model.float()
        exact = [self.scores(row) for row in rows]
        gaps = [abs(a - b) for x, y in zip(rounded, exact) for a, b in zip(x.logprob[1:], y.logprob[1:])]
        return Bounds(tolerance + 4 * max(gaps, default=0.0), tolerance + 2 * sum(gaps) / max(1, len(gaps)))

    def scores(self, ids: List[int]) -> Scores:
        with torch.inference_mode():
            logits = self.model(torch.tensor([ids])).logits[0]
            logprob, best, best_logprob = [math.nan], [-1], [math.nan]
            for first in range(0, len(ids), ROWS):
                some = torch.log_softmax(logits[first : first + ROWS].float(), -1)
                top = some.max(-1)
                best += top.indices.tolist()
                best_logprob += top.values.tolist()
                following = torch.tensor(ids[first + 1 : first + ROWS + 1])
                logprob += some[: len(following)].gather(-1, following[:, None])[:, 0].tolist()
        return Scores(logprob, best, best_logprob)

    def with_embedding_as_head(self) -> bool:
        """From here on, the head is the input embedding, as in servers that know tied models only; False when it is already."""
        embedding, head = self.model.get_input_embeddings().weight, self.model.get_output_embeddings()
        if embedding.shape != head.weight.shape or torch.equal(embedding, head.weight):
            return False
        head.weight = embedding
        return True


def _check_memory(folder: str) -> None:
    """UserError when the model as float32 would not fit, which the system answers by killing the process."""
    stored = list(Path(folder).glob("*.safetensors")) or list(Path(folder).glob("pytorch_model*.bin"))
    config = read_config(folder)
    wide = str(config.get("torch_dtype") or config.get("dtype")) not in ("float16", "bfloat16")
    needed, free = sum(path.stat().st_size for path in stored) * (1 if wide else 2), host.available_memory()
    if free is not None and needed > free:
        raise UserError("--model %s: computing with it takes %s here, %s are free; --no-weights compares token ids and ends only"
                        % (folder, host.size(needed), host.size(free)))  # fmt: skip


def served_dtype(told: Optional[str], given: Optional[str], config: Any) -> str:
    """What a server most likely computes in: what it or the user says, else the folder's 16 bits, else what both engines make of
    float32 on a GPU."""
    stored = str(config.get("torch_dtype") or config.get("dtype") or "")
    named = given or told or (stored if stored in ("float16", "bfloat16") else "float16")
    if named not in DTYPES:
        raise UserError("--dtype %s: expected one of %s" % (named, ", ".join(DTYPES)))
    return named
