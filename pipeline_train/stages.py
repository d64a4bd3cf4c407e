"""The stages of the pipeline: which layers a rank builds, what travels between two of them, what the last one computes.

    stage 0 takes (ids, positions, segments), each [B,T] int64
    the wire is   (hidden[B,T,D] float, positions[B,T] int64, segments[B,T] int64)
    the last stage gives logits[B,T,V]

Exactly one float tensor crosses a boundary: DeepSpeed sends a gradient back for every float it sent forward.
"""

from typing import Any, Callable, Dict, List, Optional, Sequence, Set, Tuple

import torch
from deepspeed import comm as dist
from deepspeed.runtime.pipe.module import LayerSpec, PipelineModule
from deepspeed.runtime.pipe.topology import ProcessTopology

from .families import FAMILIES
from .families.base import Dims
from .models import build_layer, recompute
from .models.loss import token_loss

Wire = Tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class Latest:
    """What was last made of a tensor. All blocks of a stage take something made of the same one."""

    def __init__(self) -> None:
        self.known: Tuple[Any, Any, Any] = (None, None, None)

    def of(self, tensor: torch.Tensor, how: Any, make: Callable[[], Any]) -> Any:
        """``make()``, unless it was called for this very tensor and an equal ``how`` the last time."""
        if self.known[0] is not tensor or self.known[1] != how:
            self.known = tensor, how, make()
        return self.known[2]


MASKS, PLACES = Latest(), Latest()


class PipeLayer(torch.nn.Module):
    """A layer on the wire. ``inner`` is the family's module; its state_dict keys are the slot names.

    ``again``: what of a block the backward pass computes once more, parallel.recompute.
    ``compiled``: through torch.compile (one graph serves all blocks), on a GPU with FlexAttention; the loss, too (``Stage.loss``).
    """

    def __init__(self, dims: Dims, layer: int, dtype: torch.dtype, again: str, compiled: bool = False) -> None:
        super().__init__()
        self.kind = dims.kind_of(layer)
        self.again = again if self.kind == "block" else "none"
        self.compiled = compiled and self.kind != "embed"
        self.dims = dims
        self.inner = build_layer(dims, layer).to(dtype)
        # torch.compile must see what to keep of a block; to run all of it again is nothing to the graph.
        chosen = recompute.selective(self.inner.forward) if self.again == "selective" else self.inner.forward
        self.faster: Optional[Callable[..., Any]] = torch.compile(chosen, dynamic=False) if self.compiled else None

    def forward(self, wire: Wire) -> Any:
        first, positions, segments = wire
        block = self._block()
        if self.kind == "head":
            return block(first)
        if self.kind == "embed":
            return block(first), positions, segments
        seen, places = self._seen(first, segments), self._places(first, positions)
        return block(first, places, seen), positions, segments

    def _block(self) -> Callable[..., Any]:
        block = self.faster or self.inner
        if not torch.is_grad_enabled() or self.again == "none":
            return block
        if self.again == "blocks":
            return recompute.whole(block)
        return block if self.faster else recompute.selective(block)

    def _seen(self, hidden: torch.Tensor, segments: torch.Tensor) -> Any:
        """What attention takes: the segments, or FlexAttention's mask of them."""
        if not self.compiled:
            return segments
        from .models import flex  # not in the pinned stack

        if not flex.takes(hidden, self.dims.head_dim):
            return segments
        return MASKS.of(segments, None, lambda: flex.mask_of(segments))

    def _places(self, hidden: torch.Tensor, positions: torch.Tensor) -> Any:
        """What attention takes: the positions, or what the family makes of them."""
        make = getattr(self.inner, "places", None)
        if make is None or not self.compiled:
            return positions
        return PLACES.of(positions, (self.dims, hidden.dtype), lambda: make(positions, hidden.dtype))


class TiedGradient:
    """What DeepSpeed's tied reduction looks at: ``weight.grad``, or ``weight._hp_grad`` with its bf16 optimizer. Ours may be
    in a third place (``grad_accum``), so the engine gets the gradient itself under both names."""

    def __init__(self, gradient: torch.Tensor) -> None:
        self.grad = self._hp_grad = gradient


class Stage(PipelineModule):
    """One rank's slice [bounds[s], bounds[s+1]) of the layers.

    ``layers``: layer index -> the family's module, for the layers of this rank.
    ``loss_factor``: set before every step; micro-batch loss = sum of cross entropy over learnt tokens x loss_factor.
    ``group_pad``: two elements per data-parallel rank, zero for ever, see ``parameter_groups``.

    A tied head is a layer with its own copy of the embedding. DeepSpeed's TiedLayerSpec would put the norm beside it into
    the tied module and not count it in the gradient norm; here only the one tensor is tied: the gradients of both copies are
    summed before the optimizer step, so both take the same step and stay equal. With one stage both are one Parameter.
    """

    def __init__(
        self,
        dims: Dims,
        boundaries: Sequence[int],
        topology: ProcessTopology,
        dtype: torch.dtype,
        again: str,
        compiled: bool = False,
    ) -> None:
        # _partition_layers runs inside the base constructor and reads this.
        self.boundaries = list(boundaries)
        self.loss_factor = 0.0
        self.compiled = compiled
        specs = [LayerSpec(PipeLayer, dims, layer, dtype, again, compiled) for layer in range(dims.layers)]
        super().__init__(layers=specs, topology=topology, loss_fn=self.loss, partition_method="explicit")
        self.dims = dims
        mine = range(self._local_start, self._local_stop)
        self.layers: Dict[int, torch.nn.Module] = {layer: getattr(self, str(layer)).inner for layer in mine}
        pad = torch.zeros(2 * topology.get_dim("data"), dtype=dtype, device=next(self.parameters()).device)
        self.group_pad = torch.nn.Parameter(pad)
        self.tied_weight: Optional[torch.nn.Parameter] = None
        self.tied_group = None
        if dims.tied:
            self._tie(topology)

    @property
    def blocks(self) -> List[torch.nn.Module]:
        return [module for layer, module in self.layers.items() if self.dims.kind_of(layer) == "block"]

    def _partition_layers(self, method: str = "explicit") -> None:
        """DeepSpeed's methods cannot take a list of layer counts in any version; this is the hook they would go through."""
        self.parts = self.boundaries
        stage = self._topo.get_coord(self.global_rank).pipe
        self._set_bounds(start=self.parts[stage], stop=self.parts[stage + 1])

    def _tie(self, topology: ProcessTopology) -> None:
        first, last = 0, topology.get_dim("pipe") - 1
        embed, head = tied_slots(self.dims)
        if first == last:
            owner, name = _owner(self.layers[self.dims.layers - 1], head)
            setattr(owner, name, dict(self.layers[0].named_parameters())[embed])
            return
        if 0 in self.layers:
            self.tied_weight = dict(self.layers[0].named_parameters())[embed]
        elif self.dims.layers - 1 in self.layers:
            self.tied_weight = dict(self.layers[self.dims.layers - 1].named_parameters())[head]
            self.tied_weight.ds_pipe_replicated = True  # type: ignore[attr-defined]
        for replica in range(topology.get_dim("data")):
            ranks = [topology.get_rank(pipe=first, data=replica), topology.get_rank(pipe=last, data=replica)]
            group = dist.new_group(ranks=ranks)  # every rank takes part in making every group
            if self.global_rank in ranks:
                self.tied_group = group

    def get_tied_weights_and_groups(self) -> List[Tuple[TiedGradient, Any]]:
        """Called by DeepSpeed once per step, before the data-parallel reduction; it sums each gradient over its group."""
        if self.tied_weight is None:
            return []
        places = (getattr(self.tied_weight, name, None) for name in ("_hp_grad", "grad_accum", "grad"))
        gradient = next(g for g in places if g is not None)
        return [(TiedGradient(gradient), self.tied_group)]

    def loss(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """logits[B,T,V], targets[B,T] (-100: not learnt) -> scalar fp32."""
        return token_loss(logits, targets, self.loss_factor, self.compiled)


def tied_slots(dims: Dims) -> Tuple[str, str]:
    """Slot names of the embedding and the head that are one tensor when Dims.tied."""
    family = FAMILIES[dims.family]
    names = {slot.hf: slot.name for slot in family.slots}
    return names[family.tied[0]], names[family.tied[1]]


def _owner(module: torch.nn.Module, slot: str) -> Tuple[torch.nn.Module, str]:
    """("a.b.weight") -> (module a.b, "weight")."""
    path = slot.split(".")
    for name in path[:-1]:
        module = getattr(module, name)
    return module, path[-1]


def parameter_groups(stage: Stage, weight_decay: float) -> List[Dict[str, Any]]:
    """Two groups on every stage: matrices (decayed), then biases and norms (not decayed).

    ZeRO-1 reduces the gradient norm once per group, so a stage with one group (an embedding alone) would leave the others
    waiting for its second reduction for ever; there the pad, which never has a gradient, stands in.
    """
    matrices: List[torch.nn.Parameter] = []
    vectors: List[torch.nn.Parameter] = []
    seen: Set[int] = set()
    for module in stage.layers.values():
        for parameter in module.parameters():
            if id(parameter) not in seen:  # tied on one stage
                seen.add(id(parameter))
                (matrices if parameter.dim() > 1 else vectors).append(parameter)
    pad = [stage.group_pad]
    return [
        {"params": matrices or pad, "weight_decay": weight_decay},
        {"params": vectors or pad, "weight_decay": 0.0},
    ]


def topology_of(axes: Sequence[str], pipe: int, data: int) -> ProcessTopology:
    """Rank layout: the last axis varies fastest, so ["pipe", "data"] puts the replicas of a stage beside each other."""
    sizes = {"pipe": pipe, "data": data}
    return ProcessTopology(axes=list(axes), dims=[sizes[axis] for axis in axes])
