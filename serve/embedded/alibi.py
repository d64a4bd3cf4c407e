"""Our attention for bloom, whose attention transformers has not made exchangeable."""

from typing import Any, Callable, Optional, Tuple

import torch
from torch import Tensor


def take(model: Any, attend: Callable[..., Tuple[Tensor, None]]) -> Optional[Callable[[], None]]:
    """Let all blocks use ``attend`` (attention.register) with their slopes -> what undoes it; None if the model is no bloom. The
    masks and biases that transformers makes for each pass are not looked at then."""
    base = model.base_model
    blocks = [module for module in base.modules() if type(module).__name__ == "BloomAttention"]
    if not blocks:
        return None
    ones = torch.ones(1, 2, dtype=torch.long, device=model.device)
    slopes = base.build_alibi_tensor(ones, base.num_heads, torch.float32).reshape(base.num_heads, 2)[:, 1].clone()  # of column 1
    for module in blocks:
        module.forward = _Attention(module, slopes, attend)
    base.build_alibi_tensor = lambda *given, **named: slopes

    def undo() -> None:
        for module in blocks:
            del module.forward
        del base.build_alibi_tensor

    return undo


class _Attention:
    """BloomAttention.forward."""

    def __init__(self, module: Any, slopes: Tensor, attend: Callable[..., Tuple[Tensor, None]]) -> None:
        self._module, self._slopes, self._attend = module, slopes, attend

    def __call__(
        self, hidden_states: Tensor, residual: Tensor, alibi: Tensor, attention_mask: Tensor, layer_past: Any, **more: Any
    ) -> Tuple[Tensor, None]:
        module = self._module
        q, k, v = module._reshape(module.query_key_value(hidden_states))
        k, v = layer_past.update(k, v, module.layer_idx)
        mixed, _ = self._attend(module, q, k, v, None, scaling=module.inv_norm_factor, slopes=self._slopes)
        return residual + module.dense(mixed.flatten(2)), None
