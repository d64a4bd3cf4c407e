"""What checkpoint.Saver asks of a pipeline, without DeepSpeed: one rank that has all layers. Every weight is the number of steps
done, a moment is that plus 1 or 2."""

import torch

from pipeline_train import config, families, manifest
from pipeline_train.models import build_layer
from pipeline_train.pulse import Board, Pulse
from tests.models import tiny_config


class Watched:
    def __init__(self):
        self.pulse = Pulse(Board.make(1), 0)


class Stage:
    tied_weight = None


class Pipe:
    """``train``: keys of run.yaml's section; ``dims``: keys of the tiny model's config.json."""

    cuda, data_rank, loss_scaler = False, 0, None

    def __init__(self, family="llama", dims=None, **train):
        self.config = config.parse({
            "run": {"out": "x"}, "model": {"path": "x", "dtype": "fp32"}, "data": {"train": "x"}, "parallel": {"pipe": 1},
            "train": train,
        })  # fmt: skip
        self.watched = Watched()
        self.dims = families.dims_of(tiny_config(family, **(dims or {})))
        self.stage = Stage()
        self.stage.layers = {layer: build_layer(self.dims, layer) for layer in range(self.dims.layers)}
        self.moments = manifest.MOMENTS[self.config.optim.type]
        self.set(0)

    def set(self, step):
        """As if ``step`` steps were done."""
        self.steps = step
        with torch.no_grad():
            for layer in self.stage.layers.values():
                for parameter in layer.parameters():
                    parameter.fill_(float(step))

    @property
    def groups(self):
        return [{"params": ["flat"]}]

    @property
    def base_optimizer(self):
        return type("Optimizer", (), {"state": {"flat": {"step": self.steps}}})

    def read_whole(self, parameter, moment=None, wanted=True):
        return parameter.detach().clone() + (0 if moment is None else 1 + self.moments.index(moment))
