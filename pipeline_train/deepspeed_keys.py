"""Which keys of the ``deepspeed:`` section are passed on: those that change a run's speed or noise, never what it computes."""

import difflib
from typing import Any, Callable, Dict

from .errors import UserError

TOP = (
    "zero_optimization", "wall_clock_breakdown", "dump_state", "tensorboard", "csv_monitor", "flops_profiler", "comms_logger",
    "activation_checkpointing", "memory_breakdown", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer",
    "communication_data_type",
)  # fmt: skip
KINDS = {
    "true or false": lambda v: isinstance(v, bool),
    "a positive whole number": lambda v: not isinstance(v, bool) and isinstance(v, (int, float)) and v >= 1 and v == v // 1,
    "a section": lambda v: isinstance(v, dict),
}  # type: Dict[str, Callable[[Any], bool]]
ZERO = {
    "stage": "a positive whole number", "reduce_bucket_size": "a positive whole number",
    "allgather_bucket_size": "a positive whole number", "overlap_comm": "true or false", "allgather_partitions": "true or false",
    "reduce_scatter": "true or false", "contiguous_gradients": "true or false",
    "use_multi_rank_bucket_allreduce": "true or false", "offload_param": "a section",
}  # fmt: skip
# Keys with more to say than that they are unknown.
REFUSED = {
    "zero_optimization.round_robin_gradients": "deals the gradients out in another order than checkpoints are addressed in, so "
    "weights would be saved and filled wrongly; remove it",
    "zero_optimization.offload_optimizer": "is set from parallel.offload; remove it here and use that key",
    "torch_autocast": "changes the arithmetic; remove it and use model.dtype",
    "data_types": "changes the arithmetic; remove it, gradients are summed in fp32 already",
    "prescale_gradients": "changes how gradients are averaged; remove it",
    "gradient_predivide_factor": "changes how gradients are averaged; remove it",
}


def check(section: Dict[str, Any], where: str, say: Callable[[str], None]) -> None:
    """Raises UserError naming the first key that is not performance-only. ``say`` takes a line about a key without effect."""
    for key, value in section.items():
        _known(key, TOP, key, where)
        if key == "communication_data_type" and value not in (None, "fp32"):
            raise UserError("%s: deepspeed.%s: %r changes the arithmetic; remove it, or use fp32" % (where, key, value))
    zero = section.get("zero_optimization", {})
    for name, value in zero.items():
        key = "zero_optimization.%s" % name
        _known(name, tuple(ZERO), key, where)
        if name == "stage" and value == 0 and not isinstance(value, bool):
            raise UserError("%s: deepspeed.%s: 0 clips every pipeline stage by its own gradient norm; use 1" % (where, key))
        if not KINDS[ZERO[name]](value):
            raise UserError("%s: deepspeed.%s: expected %s, got %r" % (where, key, ZERO[name], value))
    if "offload_param" in zero:
        say("deepspeed.zero_optimization.offload_param: has no effect below stage 3")
    if "activation_checkpointing" in section:
        say("deepspeed.activation_checkpointing: has no effect; parallel.recompute says what is computed again")


def _known(name: Any, allowed: Any, key: str, where: str) -> None:
    if key in REFUSED:
        raise UserError("%s: deepspeed.%s: %s" % (where, key, REFUSED[key]))
    if name not in allowed:
        near = difflib.get_close_matches(str(name), allowed, 1)
        hint = 'did you mean "%s"?' % near[0] if near else "pipedock passes on: %s" % ", ".join(allowed)
        raise UserError("%s: deepspeed.%s: is not passed on to DeepSpeed; %s" % (where, key, hint))
