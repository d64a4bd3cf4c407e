"""Our pipeline as an engine of the bench: pipeline_train's own, with random weights made on the device."""

from typing import Any, Dict, List

import torch

from pipeline_train import config, engine, families, plan

from .rows import Counts, MicroBatch
from .task import RATE, Case
from .values import random_like


class Ours:
    """One rank of ``pipe`` x ``data``. ``facts``: of the last step."""

    packs = True

    def __init__(self, case: Case, device: torch.device) -> None:
        self.case, self.dims = case, families.dims_of(case.model)
        self.run = config.parse(case.settings())
        self.run.parallel.parts = plan.parts_for(
            self.run, self.dims, plan.card_here() if device.type == "cuda" else None, "current"
        )
        boundaries = plan.bounds(self.dims, case.pipe, self.run.parallel.parts)
        self.planned = plan.memory_of(self.run, self.dims)
        self.pipe = engine.Pipeline(self.run, self.dims, boundaries, device.type == "cuda")
        for layer, module in self.pipe.stage.layers.items():
            for number, parameter in enumerate(module.parameters()):
                self.pipe.write_whole(parameter, random_like(parameter, 1000 * int(layer) + number))
        self.pipe.set_steps(0)
        self.times = (0.0, 0.0)

    @property
    def replica(self) -> int:
        return self.pipe.data_rank

    def step(self, batches: List[MicroBatch], counts: Counts) -> float:
        """One optimizer step on this replica's micro-batches; -> the loss."""
        feed = ((batch[:3], batch.targets) for batch in batches)
        result = self.pipe.train(feed, max(1, counts.learnt), RATE)
        self.times = result.busy, result.span
        return result.loss

    def facts(self) -> Dict[str, Any]:
        """Seconds computing and of the pipelined part, the stage and its planned GiB."""
        stage = self.pipe.pipe_rank
        return {"stage": stage, "parts": self.run.parallel.parts, "busy_s": self.times[0], "span_s": self.times[1],
                "plan_gib": self.planned[stage]["total"]}  # fmt: skip
