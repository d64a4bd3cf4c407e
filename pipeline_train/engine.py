"""Our keys and the user's ``deepspeed:`` section -> a running DeepSpeed pipeline engine."""

import math
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import deepspeed
import torch

from . import accumulate, compat
from .config_schema import RunConfig
from .families.base import Dims
from .instructions import Watched
from .manifest import MOMENTS
from .models import layers
from .optimizer import build as optimizer_of
from .optimizer import set_step
from .plan.memory import REDUCE_BUCKET
from .pulse import Pulse
from .stages import Stage, parameter_groups, topology_of

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
NEVER = 2**31 - 1  # steps_per_print must be an int in every version

MicroBatch = Tuple[
    Tuple[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor
]  # (ids, positions, segments), targets: [B,T] int64


def connect(cuda: bool, local_rank: int) -> None:
    """Join the other ranks (RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT in the environment): nccl on GPUs, gloo on CPUs."""
    if cuda:
        torch.cuda.set_device(local_rank)
    else:
        compat.quiet_cpu_ops()
    deepspeed.init_distributed("nccl" if cuda else "gloo", auto_mpi_discovery=False, verbose=False)


def deepspeed_config(config: RunConfig, cuda: bool) -> Dict[str, Any]:
    """The dict DeepSpeed gets. ``config.model.dtype`` must be resolved. The user's section is merged in last: config.py has
    refused the keys that are ours."""
    optim, dtype = config.optim, config.model.dtype
    ours = {
        "train_batch_size": config.rows_per_step,
        "train_micro_batch_size_per_gpu": config.batch.micro,
        "gradient_accumulation_steps": config.micro_batches,
        "gradient_clipping": optim.clip,  # 1.0 in 0.19, 0 in 0.9 when left out
        "steps_per_print": NEVER,
        # Stage 0 clips an fp32 pipeline by the norm of each stage alone.
        # A pipeline reduces once per step, so collecting gradients in a bucket during the backward pass only costs.
        "zero_optimization": {"stage": 1, "reduce_bucket_size": REDUCE_BUCKET, "contiguous_gradients": False},
        "zero_allow_untested_optimizer": True,  # lion-pytorch
    }  # type: Dict[str, Any]
    if dtype == "bf16":
        ours["bf16"] = {"enabled": True}
        ours["data_types"] = {"grad_accum_dtype": "fp32"}
    elif dtype == "fp16":
        scale = optim.loss_scale
        ours["fp16"] = {
            "enabled": True,
            "loss_scale": 0,  # dynamic
            "initial_scale_power": int(math.log2(scale.initial)),
            "loss_scale_window": scale.window,
            "hysteresis": scale.hysteresis,
            "min_loss_scale": scale.min,
        }
    if config.parallel.offload:
        ours["zero_optimization"]["offload_optimizer"] = {"device": "cpu", "pin_memory": cuda}
        ours["zero_force_ds_cpu_optimizer"] = False  # torch's will do where DeepSpeed's does not build
    return merged(ours, config.deepspeed)


def merged(base: Dict[str, Any], over: Dict[str, Any]) -> Dict[str, Any]:
    """``over`` wins, section by section."""
    out = dict(base)
    for key, value in over.items():
        out[key] = merged(out[key], value) if isinstance(value, dict) and isinstance(out.get(key), dict) else value
    return out


class StepResult(NamedTuple):
    """``loss``: mean over the step's learnt tokens. ``grad_norm``: before clipping, over all stages; None when not finite or when
    the step was skipped (0.9.2 would still give the step's before).
    ``skipped``: an fp16 overflow, the weights did not move. ``busy``, ``span``: seconds of this rank, see instructions.Clock.
    ``scale``: the loss scale of this step, None when not training in fp16."""

    loss: float
    grad_norm: Optional[float]
    skipped: bool
    busy: float
    span: float
    scale: Optional[float]


class Pipeline:
    """One rank of the running pipeline.

    ``stage``: this rank's layers. ``pipe_rank``, ``data_rank``: its coordinates. ``engine``: DeepSpeed's.
    ``groups``: the optimizer's groups; the parameters in them are the flat fp32 master partitions of ZeRO-1.
    Parameters are NaN until checkpoint.load or checkpoint.start has filled them.
    """

    def __init__(self, config: RunConfig, dims: Dims, boundaries: Sequence[int], cuda: bool, pulse: Optional[Pulse] = None) -> None:
        parallel = config.parallel
        topology = topology_of(parallel.axes, parallel.pipe, parallel.data)
        self.config, self.dims, self.cuda = config, dims, cuda
        self.stage = Stage(dims, boundaries, topology, DTYPES[config.model.dtype], parallel.recompute, config.run.compile)
        where = topology.get_coord(self.stage.global_rank)
        self.pipe_rank, self.data_rank = int(where.pipe), int(where.data)
        groups = parameter_groups(self.stage, config.optim.weight_decay)
        optimizer = optimizer_of(groups, config.optim, cuda, parallel.offload)
        self.settings = deepspeed_config(config, cuda)
        self.engine = deepspeed.initialize(
            model=self.stage, optimizer=optimizer, model_parameters=groups, config=self.settings, dist_init_required=False
        )[0]
        compat.clip_fp32(self.engine.optimizer, deepspeed.__version__)
        compat.stop_timing(self.engine)
        if config.model.dtype == "bf16" and not parallel.offload:
            if compat.has_custom_ops():
                accumulate.into_sums(self.engine.optimizer, self.stage, self.stage.blocks if config.run.fp8 else ())
            # Without replicas there is nothing to average, but DeepSpeed would still round the fp32 sums to bf16 and back.
            self.engine.pipeline_enable_backward_allreduce = parallel.data > 1
        self.watched = Watched(self.engine, pulse or Pulse.inherited(), cuda, fp16=config.model.dtype == "fp16")
        if self.loss_scaler is not None:
            self.loss_scaler.raise_error_at_min_scale = False  # loss_scale.OverflowLimit says it better

    @property
    def base_optimizer(self) -> Any:
        """The optimizer inside ZeRO's wrapper; its state is keyed by the flat fp32 partitions."""
        return self.engine.optimizer.optimizer

    @property
    def groups(self) -> List[Dict[str, Any]]:
        return self.base_optimizer.param_groups

    @property
    def moments(self) -> Tuple[str, ...]:
        return MOMENTS[self.config.optim.type]

    @property
    def loss_scaler(self) -> Any:
        """DeepSpeed's dynamic loss scaler, None when not training in fp16."""
        return getattr(self.engine.optimizer, "loss_scaler", None) if self.config.model.dtype == "fp16" else None

    def _aim(self, learnt_tokens: int) -> None:
        # DeepSpeed divides by the micro-batches and averages over the replicas: this factor makes the result the sum over the
        # step's learnt tokens divided by their number, however they are spread over micro-batches.
        parallel = self.config.micro_batches * self.config.parallel.data
        self.stage.loss_factor = parallel / max(1, learnt_tokens)

    def train(self, batches: Iterator[MicroBatch], learnt_tokens: int, rate: float) -> StepResult:
        """One optimizer step on this replica's M micro-batches; ``learnt_tokens`` counts the whole step, all replicas.

        Raises instructions.NotFinite, on every rank and with all weights as they were, unless the run is fp16."""
        self._aim(learnt_tokens)
        if self.config.run.fp8:
            layers.fp8.forget()  # the last step, or a checkpoint, has changed the weights
        for group in self.groups:
            group["lr"] = rate
        scale = float(self.loss_scaler.cur_scale) if self.loss_scaler is not None else None
        loss = float(self.engine.train_batch(self._sent(batches)))
        norm = float(self.engine.get_global_grad_norm() or 0.0)
        skipped = bool(getattr(self.engine.optimizer, "overflow", False))
        busy, span = self.watched.clock.take()
        return StepResult(loss, norm if math.isfinite(norm) and norm >= 0 and not skipped else None, skipped, busy, span, scale)

    def _sent(self, batches: Iterator[MicroBatch]) -> Iterator[MicroBatch]:
        """The micro-batches on this rank's device. DeepSpeed would copy them from memory that is not pinned, and wait."""
        if not self.cuda:
            return batches
        device = torch.device("cuda", torch.cuda.current_device())

        def sent(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.pin_memory().to(device, non_blocking=True)

        return (((sent(ids), sent(places), sent(segments)), sent(targets)) for (ids, places, segments), targets in batches)

    def evaluate(self, batches: Iterator[MicroBatch], learnt_tokens: int) -> float:
        """Mean loss over one step's learnt tokens, no gradients."""
        self._aim(learnt_tokens)
        loss = float(self.engine.eval_batch(self._sent(batches)))
        self.watched.clock.take()
        return loss

    def _piece(self, parameter: torch.nn.Parameter) -> Optional[Tuple[torch.Tensor, slice, slice]]:
        """(the flat fp32 partition, where this parameter's piece lies in it, which elements of the parameter that is), or
        None when another replica holds all of it. From the address tables that ZeRO-1 hangs on every parameter."""
        mapping = parameter._hp_mapping  # type: ignore[attr-defined]
        if mapping is None:
            return None
        flat = self.groups[mapping.param_group_index]["params"][0]
        inside, of = mapping.get_hp_fragment_address(), mapping.lp_fragment_address
        return flat, slice(inside.start, inside.start + inside.numel), slice(of.start, of.start + of.numel)

    def read_whole(self, parameter: torch.nn.Parameter, moment: Optional[str] = None, wanted: bool = True) -> torch.Tensor:
        """The fp32 master weight, or one of its moments, as a whole tensor on the CPU. All replicas must call it together; one
        that has no use for the value says so (not ``wanted``) and is spared the way off the device."""
        self.watched.pulse.tick("saving")
        whole = torch.zeros(parameter.numel(), dtype=torch.float32, device=parameter.device)
        piece = self._piece(parameter)
        if piece is not None:
            flat, inside, of = piece
            source = flat if moment is None else self.base_optimizer.state[flat][moment]
            whole[of] = source.detach()[inside].to(whole.device)
        if self.config.parallel.data > 1:
            torch.distributed.all_reduce(whole, group=parameter._dp_group)  # type: ignore[attr-defined]
        return whole.view(parameter.shape).cpu() if wanted else whole

    def pieces(self, layer: int, size: int) -> Iterator[Tuple[str, int, torch.Tensor]]:
        """(slot name, number of the first element, values) of the fp32 master weights of a layer of this rank, as far as this
        replica holds them: the replicas' pieces together are what read_whole gives, bit by bit. Flat, at most ``size`` elements at
        once, where the optimizer keeps them; not to be written to. No other rank is needed."""
        for name, parameter in self.stage.layers[layer].named_parameters():
            piece = self._piece(parameter)
            if piece is None:
                continue
            flat, inside, of = piece
            values = flat.detach()[inside]
            for start in range(0, len(values), size):
                part = values[start : start + size]
                # read_whole adds the others' zeros, which makes 0.0 of -0.0
                yield name, of.start + start, part + 0.0 if self.config.parallel.data > 1 else part

    def write_whole(self, parameter: torch.nn.Parameter, value: torch.Tensor, moment: Optional[str] = None) -> None:
        """The reverse of read_whole; a weight also goes, rounded to the run's dtype, into the parameter itself."""
        self.write(parameter, 0, value.reshape(parameter.shape).reshape(-1), moment)

    def write(self, parameter: torch.nn.Parameter, begin: int, part: torch.Tensor, moment: Optional[str] = None) -> None:
        """As ``write_whole``, of the flat elements from ``begin`` on. A weight travels to the device once."""
        self.watched.pulse.tick("loading")
        piece, end = self._piece(parameter), begin + len(part)
        here = part.to(parameter.device) if moment is None else part
        if moment is None:
            parameter.detach().view(-1)[begin:end].copy_(here)
        if piece is not None:
            flat, inside, of = piece
            target = (flat if moment is None else self.base_optimizer.state[flat][moment]).detach()[inside]
            first, last = max(begin, of.start), min(end, of.stop)
            if first < last:
                values = here if target.device == here.device else part  # offload: they need not come back
                target[first - of.start : last - of.start].copy_(values[first - begin : last - begin])

    def set_steps(self, step: int) -> None:
        """Zero moments and ``step`` as the step counter of every group. Needed before step 1 too: 0.9.2 makes a step on zero
        gradients while it starts."""
        for group in self.groups:
            flat = group["params"][0]
            state = self.base_optimizer.state[flat]
            for moment in self.moments:
                state[moment] = torch.zeros_like(flat, requires_grad=False)
            set_step(self.base_optimizer, group, state, step)
