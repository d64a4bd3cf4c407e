"""What a run will need, before anything starts: which layers a stage gets, its memory, the bubble, tokens per second.

Standard library only: a plan needs no GPU box and no torch. Lowest first: ``cards`` (GPUs, links), ``split`` (stage bounds,
FLOPs), ``activations``, ``memory`` (bytes of a stage), ``fitting`` (stages that fit on a card), ``speed``, ``layouts`` (the same
GPUs shared otherwise), ``planner`` (all of it as one document).
"""

from .cards import card_here
from .fitting import lack, memory_of, parts_for
from .planner import check_fp8_sizes, plan
from .split import bounds, layer_weights, matrix_params, parts_of, step_flops

__all__ = [
    "bounds", "card_here", "check_fp8_sizes", "lack", "layer_weights", "matrix_params", "memory_of", "parts_for", "parts_of",
    "plan", "step_flops",
]  # fmt: skip
