"""When fp16 overflows stop being normal. The scaler itself is DeepSpeed's: each overflow skips the step on every rank and, once the
hysteresis is used up, halves the scale; ``window`` steps without one double it."""

from .config_schema import LossScale
from .errors import RunFailed


class OverflowLimit:
    """Counts overflows in a row. A resumed run begins at zero."""

    def __init__(self, keys: LossScale) -> None:
        self.keys, self.in_a_row = keys, 0

    def after(self, step: int, skipped: bool, scale: float, samples: str) -> None:
        """``step`` counts from 1, ``scale`` is the loss scale it was done with. Raises RunFailed when this cannot go on."""
        self.in_a_row = self.in_a_row + 1 if skipped else 0
        if not skipped:
            return
        if scale <= self.keys.min:
            raise RunFailed(
                "step %d: the gradient overflows fp16 at the smallest loss scale (optim.loss_scale.min: %g). Lower optim.lr or "
                "optim.loss_scale.min, train in bf16, or look at its samples: %s" % (step, self.keys.min, samples)
            )
        if self.in_a_row >= self.keys.max_overflows:
            raise RunFailed(
                "step %d: %d fp16 overflows in a row (optim.loss_scale.max_overflows), the loss scale is %g. Lower optim.lr, train "
                "in bf16, or look at its samples: %s" % (step, self.in_a_row, scale, samples)
            )
