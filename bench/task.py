"""What one measurement is. Standard library only."""

import json
from dataclasses import asdict, dataclass, field
from typing import Any, Dict, List, Optional, Tuple

RATE = 1e-5  # the learning rate: speed does not depend on it


@dataclass(frozen=True)
class Case:
    """One engine on one shape. ``model``: config.json's content. ``micro``: rows of a micro-batch; ``micro_batches``: of a step, of
    each replica. ``documents``: (tokens, learnt ones) to make rows of, see rows.Rows. ``steps``: timed ones, after one that is
    not. ``pipe``, ``parts``, ``compile``, ``optim``: our pipeline's; ``pipe`` also of the ancestor's way; ``keep``: FSDP2's,
    see peers."""

    engine: str
    model: Dict[str, Any]
    seq: int
    micro: int
    micro_batches: int
    pipe: int = 1
    data: int = 1
    parts: Optional[List[int]] = None
    dtype: str = "bf16"
    recompute: str = "none"
    compile: bool = False
    fp8: bool = False
    optim: str = "adamw"
    keep: bool = False
    steps: int = 3
    documents: List[Tuple[int, int]] = field(default_factory=list)

    @property
    def world(self) -> int:
        return self.pipe * self.data

    @property
    def rows(self) -> int:
        """Of a step, over all replicas."""
        return self.micro * self.micro_batches * self.data

    def settings(self) -> Dict[str, Any]:
        """The same as a run.yaml, for pipeline_train.config.parse."""
        return {
            "run": {"out": "unused", "compile": self.compile, "fp8": self.fp8},
            "model": {"path": "unused", "init": "random", "dtype": self.dtype},
            "data": {"train": "unused", "seq_len": self.seq},
            "parallel": {"pipe": self.pipe, "data": self.data, "recompute": self.recompute, "parts": self.parts or "auto"},
            "batch": {"micro": self.micro, "global": self.rows},
            # Random weights overflow at larger scales, and a step that is skipped is no step.
            "optim": {"type": self.optim, "lr": RATE, "loss_scale": {"initial": 128}},
        }

    def text(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def of(cls, text: str) -> "Case":
        return cls(**json.loads(text))
