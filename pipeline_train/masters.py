"""The fp32 master weights and moments of a rank by layer and parameter name: filled, read, and made equal where tied.

With ZeRO-1 each replica holds a piece of every master weight; Pipeline.read_whole puts them together.
"""

import logging
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Dict, Iterable, Iterator, List, Optional, Sequence, Tuple

import torch
import torch.distributed as dist
from safetensors import safe_open

from . import manifest, manifest_values
from .models import build_layer, init_layer
from .weights import Source, open_source

if TYPE_CHECKING:
    from .engine import Pipeline

log = logging.getLogger("pipedock")
PIECE = 1 << 24  # numbers looked at together, on a card that may be full
Place = Tuple[str, torch.nn.Parameter, Optional[str]]  # name in the file, and which moment of the parameter (None: the weight)


def named(pipe: "Pipeline", layer: int) -> Dict[str, torch.nn.Parameter]:
    """Slot name -> parameter of a layer of this rank; a shared tied weight appears in both layers."""
    return dict(pipe.stage.layers[layer].named_parameters())


def start(pipe: "Pipeline") -> None:
    """Fill this rank's layers from model.path, or from scratch when model.init is random. Only its own layers are read."""
    if pipe.config.model.init == "pretrained":
        _read(pipe, open_source(pipe.config.model.path))
    else:
        for layer in pipe.stage.layers:
            fresh = build_layer(pipe.dims, layer)
            init_layer(fresh, pipe.dims, layer, pipe.config.run.seed)
            values = fresh.state_dict()
            for name, parameter in named(pipe, layer).items():
                pipe.write_whole(parameter, values[name])
    pipe.set_steps(0)


def _read(pipe: "Pipeline", source: Source) -> None:
    """Piece by piece: memory that was just used takes the next one, where a whole tensor's would be new, page after page. Several
    tensors at once: while one is copied the disk gives the next."""

    def fill(place: Tuple[int, str, torch.nn.Parameter]) -> None:
        layer, name, parameter = place
        begin = 0
        for part in source.pieces(layer, name):
            pipe.write(parameter, begin, part)
            begin += len(part)

    if pipe.dims.layers - 1 in pipe.stage.layers:
        source.check_tied()
    places = [(layer, *item) for layer in pipe.stage.layers for item in named(pipe, layer).items()]
    with ThreadPoolExecutor(source.threads) as pool:
        for _ in pool.map(fill, places):  # raises what went wrong
            pass


def load(pipe: "Pipeline", path: Path) -> int:
    """Fill weights, moments, step counters and loss scaler from a checkpoint; -> the number of steps it has done."""
    document = manifest.read(path)
    state = document["training"]
    pipe.set_steps(state["optimizer_steps"])
    for layer in pipe.stage.layers:
        parameters = named(pipe, layer)
        with safe_open(str(path / manifest.layer_file(layer)), framework="pt") as file:
            for name, parameter in parameters.items():
                pipe.write_whole(parameter, file.get_tensor(name))
        with safe_open(str(path / manifest.optim_file(layer)), framework="pt") as file:
            for name, parameter in parameters.items():
                for moment in pipe.moments:
                    pipe.write_whole(parameter, file.get_tensor("%s::%s" % (name, moment)), moment)
    if pipe.loss_scaler is not None:
        for key, value in state["loss_scaler"].items():
            setattr(pipe.loss_scaler, key, value)
    return int(document["step"])


def settle_ties(pipe: "Pipeline") -> None:
    """Give the head's copy the embedding's values where they differ.

    They do not differ with one or two replicas. With more, an all-reduce may add the replicas up in another order on the
    last stage than on the first, and a gradient then differs in its last bit; DeepSpeed's optimizer for the CPU
    (parallel.offload) rounds the last few elements of a partition otherwise than the rest."""
    stage = pipe.stage
    if stage.tied_weight is None:
        return
    mine = [pipe.read_whole(stage.tied_weight, moment) for moment in (None,) + pipe.moments]
    first = pipe.stage.topology().get_rank(pipe=0, data=pipe.data_rank)
    for moment, value in zip((None,) + pipe.moments, mine):
        theirs = value.clone().to(stage.tied_weight.device)
        dist.broadcast(theirs, src=first, group=stage.tied_group)
        off = int((theirs.cpu() != value).sum())
        if off:
            log.warning("tied copies: %d elements of %s differed and were made equal", off, moment or "the weight")
            pipe.write_whole(stage.tied_weight, theirs.cpu(), moment)


def not_finite(pipe: "Pipeline", most: int = 10) -> str:
    """The names of the weights that hold NaN or Inf, of all ranks together, which all must ask; "" where none does."""
    mine = [
        "%s of layer %d" % (name, layer)
        for layer, module in pipe.stage.layers.items()
        for name, values in module.named_parameters()
        if not all(bool(torch.isfinite(part).all()) for part in values.detach().reshape(-1).split(PIECE))
    ]
    everyone: List[List[str]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(everyone, mine)
    found = sorted({name for names in everyone for name in names})
    return ", ".join(found[:most]) + (", ... (%d more)" % (len(found) - most) if len(found) > most else "")


def writers(pipe: "Pipeline", ranks: Optional[Sequence[int]] = None) -> List[int]:
    """The replicas of this stage that share the writing of its files: all, or those among ``ranks`` (a node's), so that every
    node with a replica of the stage has its files."""
    replicas = range(pipe.config.parallel.data)
    if ranks is None:
        return list(replicas)
    topology = pipe.stage.topology()
    return [replica for replica in replicas if topology.get_rank(pipe=pipe.pipe_rank, data=replica) in ranks]


def writes(pipe: "Pipeline", layer: int, among: Sequence[int]) -> bool:
    """Whether this replica is the one ``among`` the writers that writes the layer's files."""
    return among[layer % len(among)] == pipe.data_rank


def files(pipe: "Pipeline", layers: Iterable[int], among: Sequence[int]) -> Iterator[Tuple[str, Dict[str, torch.Tensor]]]:
    """Those files of ``layers`` that this replica writes: name, tensors. All replicas of a stage must ask for the same layers
    together: each holds a piece of every tensor."""
    for layer in layers:
        mine, parameters = writes(pipe, layer, among), named(pipe, layer)
        weights = _whole(pipe, mine, [(name, p, None) for name, p in parameters.items()])
        if mine:
            yield manifest.layer_file(layer), weights
        places = [("%s::%s" % (name, moment), p, moment) for name, p in parameters.items() for moment in pipe.moments]
        moments = _whole(pipe, mine, places)
        if mine:
            yield manifest.optim_file(layer), moments


def _whole(pipe: "Pipeline", wanted: bool, places: Iterable[Place]) -> Dict[str, torch.Tensor]:
    """Name -> tensor; nothing where they are not wanted, though other replicas may want them."""
    tensors = {}
    for name, parameter, moment in places:
        value = pipe.read_whole(parameter, moment, wanted)
        if wanted:
            tensors[name] = value
    return tensors


def optimizer_steps(pipe: "Pipeline") -> int:
    state = pipe.base_optimizer.state[pipe.groups[0]["params"][0]]
    return int(state.get("step", 0))


def scaler_state(pipe: "Pipeline") -> Dict[str, Any]:
    return {key: getattr(pipe.loss_scaler, key) for key in manifest_values.SCALER if hasattr(pipe.loss_scaler, key)}
