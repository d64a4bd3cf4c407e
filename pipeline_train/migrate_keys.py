"""The keys of gdGPT's training config, taken one by one; and its DeepSpeed sections, as far as run.yaml's deepspeed: has them."""

from typing import Any, Dict, List

from . import deepspeed_keys
from .config_reading import exponents
from .errors import UserError

# DeepSpeed's own sections that mean the same under run.yaml's deepspeed: key.
PASSED = ("wall_clock_breakdown", "dump_state", "tensorboard", "csv_monitor", "flops_profiler", "comms_logger")
MISSING = object()


class Old:
    """The old mapping, consumed key by key."""

    def __init__(self, raw: Dict[str, Any], where: str) -> None:
        self.raw = raw
        self.where = where
        self.taken = set()  # type: set
        self.notes = []  # type: List[Dict[str, str]]

    def take(self, path: str, default: Any = None) -> Any:
        """The value at a dotted path; marks it (and all below it) as carried over."""
        self.taken.add(path)
        node = self.raw  # type: Any
        for name in path.split("."):
            node = node.get(name, MISSING) if isinstance(node, dict) else MISSING
            if node is MISSING:
                return default
        return default if node is None else node

    def need(self, path: str, kind: type) -> Any:
        value = self.take(path)
        if not isinstance(value, kind):
            raise UserError(
                "%s: %s: expected %s, got %r; is this a gdGPT training config?" % (self.where, path, kind.__name__, value)
            )
        return value

    def number(self, path: str, default: float) -> float:
        value = self.take(path, default)
        try:
            return float(value)
        except (TypeError, ValueError):
            raise UserError("%s: %s: expected a number, got %r" % (self.where, path, value)) from None

    def note(self, key: str, text: str) -> None:
        self.notes.append({"key": key, "note": text})

    def left(self) -> List[str]:
        """Dotted paths of the leaves that nobody took."""
        return [p for p in _leaves(self.raw, "") if not any(p == t or p.startswith(t + ".") for t in self.taken)]


def deepspeed_section(old: Old, parallel: Dict[str, Any]) -> Dict[str, Any]:
    """What goes under run.yaml's deepspeed:; what `train` would refuse is left out with a note. May set ``parallel``'s offload."""
    zero = old.take("zero_optimization", {})
    if not isinstance(zero, dict):
        raise UserError("%s: zero_optimization: expected a section, got %r" % (old.where, zero))
    passed = {"zero_optimization": _zero(old, exponents(zero), parallel)} if zero else {}
    passed.update({key: old.take(key) for key in PASSED if key in old.raw})
    if old.take("activation_checkpointing", MISSING) is not MISSING:
        old.note(
            "activation_checkpointing", "left out, torch's recomputation has none of it: use_grad_ckpt became parallel.recompute"
        )
    return passed


def _zero(old: Old, rest: Dict[str, Any], parallel: Dict[str, Any]) -> Dict[str, Any]:
    offload = rest.pop("offload_optimizer", None)
    if isinstance(offload, dict) and offload.get("device", "none") != "none":
        if offload["device"] != "cpu":
            old.note("zero_optimization.offload_optimizer.device", "%s became cpu memory" % offload["device"])
        parallel["offload"] = True
    if rest.pop("cpu_offload", False) is True:
        old.note("zero_optimization.cpu_offload", "became parallel.offload")
        parallel["offload"] = True
    if rest.get("stage") == 0:
        old.note("zero_optimization.stage", "0 became 1: a pipeline at 0 clips every stage by its own gradient norm")
        rest["stage"] = 1
    if "offload_param" in rest:
        old.note("zero_optimization.offload_param", "kept, without effect: DeepSpeed applies it in stage 3 only")
    for key in list(rest):
        try:
            deepspeed_keys.check({"zero_optimization": {key: rest[key]}}, "", lambda line: None)
        except UserError as error:
            old.note("zero_optimization.%s" % key, "left out: %s" % str(error).split(": ", 2)[2])
            del rest[key]
    return rest


def _leaves(node: Any, prefix: str) -> List[str]:
    if not isinstance(node, dict) or not node:
        return [prefix] if prefix else []
    return [leaf for key, value in node.items() for leaf in _leaves(value, "%s.%s" % (prefix, key) if prefix else str(key))]
