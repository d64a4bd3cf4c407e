"""What a run will need, before anything starts: which layers a stage gets, its memory, the bubble, tokens per second.

Standard library only: a plan needs no GPU box and no torch. Lowest first: ``cards`` (GPUs, links), ``split`` (stage bounds,
FLOPs), ``activations``, ``memory`` (bytes of a stage), ``speed``, ``planner`` (all of it as one document).
"""

from .planner import memory_of, plan
from .split import bounds, layer_weights, matrix_params, parts_of, step_flops

__all__ = ["bounds", "layer_weights", "matrix_params", "memory_of", "parts_of", "plan", "step_flops"]
