"""Parts of a block computed again in the backward pass: what is kept is the block's input alone, or with it what products and
attention gave ("selective": the rest, norms, rotations and activation functions, is cheap; arXiv 2205.05198 names the idea)."""

import functools
import logging
from typing import Any, Callable

import torch
from torch.utils import checkpoint as checkpoints

KEPT = ("aten::mm", "aten::addmm", "pipedock::fp8_product", "flex_attention")  # and every kind of scaled_dot_product_attention
FUSED = "aten::_scaled_dot_product"
# torch.compile warns that a selective block must not write in place into what came from outside; ours do not.
logging.getLogger("torch._higher_order_ops.wrap").addFilter(lambda record: "context_fn is passed" not in record.getMessage())


def whole(block: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """``block`` with only its inputs kept. No dropout anywhere, so the random state need not be replayed."""
    return functools.partial(checkpoints.checkpoint, block, use_reentrant=False, preserve_rng_state=False)


def selective(block: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """``block`` with its inputs and the outputs of its products and of its attention kept. Needs compat.check_selective."""
    return functools.partial(whole(block), context_fn=_contexts)


def _contexts() -> Any:
    return checkpoints.create_selective_checkpoint_contexts(_policy)


def _policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> Any:
    name = operator.name()
    keep = name in KEPT or name.startswith(FUSED)
    return checkpoints.CheckpointPolicy.MUST_SAVE if keep else checkpoints.CheckpointPolicy.PREFER_RECOMPUTE
