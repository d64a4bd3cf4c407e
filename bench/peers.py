"""What our pipeline is measured against, all around transformers' own model: alone on one GPU, PyTorch's fully_shard, DeepSpeed's
ZeRO stage 3. A row is one document and padding; on the right, where causal attention never looks, so fast kernels need no mask.

Every peer gets what favours it: the fastest precision that people train in, fused AdamW, one compiled graph.
"""

from typing import Any, Dict, List

import torch

from .rows import Counts, MicroBatch
from .task import RATE, Case
from .values import fill

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class Peer:
    """transformers' model of the case's geometry. ``use``: the same model for another case."""

    packs = False

    def __init__(self, case: Case, device: torch.device) -> None:
        import torch.distributed as dist

        self.case, self.device = case, device
        self.world = dist.get_world_size() if dist.is_initialized() else 1
        self.replica = dist.get_rank() if dist.is_initialized() else 0
        self.optimizer: Any = None
        self.model: Any = self._built(case)
        self.model.train()
        self.use(case)

    def _built(self, case: Case) -> Any:
        raise NotImplementedError

    def use(self, case: Case) -> None:
        if case.recompute == "blocks":
            self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        else:
            self.model.gradient_checkpointing_disable()
        self.case = case

    def step(self, batches: List[MicroBatch], counts: Counts) -> float:
        """One optimizer step on this rank's micro-batches; -> the mean of their losses."""
        total = torch.zeros((), device=self.device)
        for number, batch in enumerate(batches, 1):
            self._begin(number == len(batches))
            loss = self._loss(batch) / len(batches)
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(total)

    def _begin(self, last: bool) -> None:
        """Before a micro-batch; ``last``: of the step."""

    def facts(self) -> Dict[str, Any]:
        return {}

    def _loss(self, batch: MicroBatch) -> torch.Tensor:
        return self.model(input_ids=batch.ids.to(self.device), labels=batch.labels.to(self.device), use_cache=False).loss


def empty_model(case: Case, dtype: torch.dtype, attention: str = "sdpa") -> Any:
    """transformers' model for causal language modelling, its weights wherever torch.device says."""
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = dict(case.model)
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    config.use_cache = False
    if config.model_type == "bloom":
        attention = "eager"  # transformers has no other for it
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        return AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    finally:
        torch.set_default_dtype(before)


class Hf(Peer):
    """The model alone in one process: weights, gradients and AdamW's state in the case's dtype, no fp32 copy."""

    attention, compiled = "sdpa", False

    def _built(self, case: Case) -> Any:
        with torch.device(self.device):
            model = empty_model(case, DTYPES[case.dtype], self.attention)
        fill(model.parameters())
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, fused=self.device.type == "cuda")
        if self.compiled:
            model.compile(dynamic=False)
        return model


class HfCompiled(Hf):
    """The same through torch.compile."""

    compiled = True


class HfEager(Hf):
    """The same with attention spelled out."""

    attention = "eager"


class Fsdp2(Peer):
    """torch.distributed.fsdp.fully_shard around every block and the whole; fp32 shards, bf16 compute, fp32 reduction, AdamW fused
    where the device has it. With ``keep``, weights and gradients stay whole on every rank between the micro-batches of a step:
    less communication for more memory."""

    compiled = False

    def _built(self, case: Case) -> Any:
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        with torch.device("meta"):
            model = empty_model(case, torch.float32)
        policy = MixedPrecisionPolicy(param_dtype=DTYPES[case.dtype], reduce_dtype=torch.float32)
        decoder = getattr(model, "transformer", None) or model.model
        blocks = decoder.h if hasattr(decoder, "h") else decoder.layers
        for number, block in enumerate(blocks):
            if self.compiled:  # inside what is sharded: gathering and scattering stay outside the graph
                torch._dynamo.config.cache_size_limit = 64  # graphs: one for each shape that a process measures
                blocks[number] = block = torch.compile(block, dynamic=False)
            fully_shard(block, mp_policy=policy)
        fully_shard(model, mp_policy=policy)
        model.to_empty(device=self.device)
        fill(parameter.to_local() for parameter in model.parameters())
        _buffers_again(model, case)
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, fused=self.device.type == "cuda")
        return model

    def _begin(self, last: bool) -> None:
        if self.case.keep:
            self.model.set_requires_gradient_sync(last)
            self.model.set_reshard_after_backward(last)


class Fsdp2Compiled(Fsdp2):
    """The same, every block through torch.compile."""

    compiled = True


def _buffers_again(model: Any, case: Case) -> None:
    """What ``to_empty`` left unset beside the weights (the rotary frequencies), from a model of one block."""
    from dataclasses import replace

    key = "n_layer" if "n_layer" in case.model else "num_hidden_layers"
    small = empty_model(replace(case, model=dict(case.model, **{key: 1})), torch.float32)
    reference = dict(small.named_buffers())
    for name, buffer in model.named_buffers():
        buffer.copy_(reference[name.replace("_orig_mod.", "")].to(buffer.device))


class Zero3(Peer):
    """deepspeed.initialize with ZeRO stage 3, AdamW fused where the device has it, overlapping communication."""

    def _built(self, case: Case) -> Any:
        import deepspeed
        import torch._dynamo  # transformers imports it, and it checks Tensor.__new__, which zero.Init replaces

        settings: Dict[str, Any] = {
            "train_micro_batch_size_per_gpu": case.micro, "gradient_accumulation_steps": case.rows // self.world // case.micro,
            "gradient_clipping": 1.0, "steps_per_print": 2**31 - 1,
            "zero_optimization": {"stage": 3, "overlap_comm": True, "contiguous_gradients": True,
                                  "stage3_prefetch_bucket_size": 5e7, "stage3_param_persistence_threshold": 1e5},
            "optimizer": {"type": "AdamW", "params": {"lr": RATE, "torch_adam": True, "fused": self.device.type == "cuda"}},
        }  # fmt: skip
        if case.dtype != "fp32":
            settings[case.dtype] = {"enabled": True}
        with deepspeed.zero.Init(config_dict_or_path=settings):
            model = empty_model(case, torch.float32)
        for parameter in model.parameters():
            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
                if self.replica == 0:
                    fill([parameter])
        self.engine = deepspeed.initialize(model=model, model_parameters=list(model.parameters()), config=settings)[0]
        return model

    def use(self, case: Case) -> None:
        super().use(case)
        self.engine.set_train_micro_batch_size(case.micro)
        self.engine.set_train_batch_size(case.rows)

    def step(self, batches: List[MicroBatch], counts: Counts) -> float:
        total = torch.zeros((), device=self.device)
        for batch in batches:
            loss = self.engine(input_ids=batch.ids.to(self.device), labels=batch.labels.to(self.device), use_cache=False).loss
            self.engine.backward(loss)
            self.engine.step()
            total += loss.detach() / len(batches)
        return float(total)
