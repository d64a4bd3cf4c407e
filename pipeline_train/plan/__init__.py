"""What a run will need, before anything starts: which layers a stage gets, its memory, the bubble, tokens per second.

Standard library only: a plan needs no GPU box and no torch. ``split`` (stage bounds and FLOPs), ``activations`` and ``memory``
(bytes of a stage).
"""

from .split import bounds, layer_weights, matrix_params, parts_of, step_flops

__all__ = ["bounds", "layer_weights", "matrix_params", "parts_of", "step_flops"]
