"""What the pipeline is measured against in multi_gpu_rank.py: DeepSpeed's ZeRO stage 3 and PyTorch's fully_shard, both around
transformers' own model with SDPA attention, gradient checkpointing where ``recompute`` says blocks, weights bf16 in the matmuls,
AdamW in fp32.
"""

import os

RATE = 1e-5


def device():
    import torch

    return torch.device("cuda" if os.environ.get("DS_ACCELERATOR") != "cpu" else "cpu")


def batches(case, rows, step, vocab, rank=0):
    """``rows`` rows as micro-batches: ids[B,T]."""
    import torch

    generator = torch.Generator().manual_seed(1000 * step + rank)
    for _ in range(rows // case["micro"]):
        yield torch.randint(3, min(vocab, 30000), (case["micro"], case["seq"]), generator=generator)


def fill(parameters):
    """Random weights, the same on every replica; norms near one."""
    import torch

    with torch.no_grad():
        for number, parameter in enumerate(parameters):
            generator = torch.Generator(device=parameter.device).manual_seed(number)
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.02, generator=generator)
            else:
                parameter.fill_(1.0)


class Peer:
    """transformers' model of the same geometry, sharded over all ranks; rows split evenly among them."""

    def __init__(self, task, case):
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        self.task, self.world = task, int(os.environ["WORLD_SIZE"])
        model = dict(task["model"])
        config = AutoConfig.for_model(model.pop("model_type"), **model)
        config.use_cache = False
        self.model = self._sharded(lambda: AutoModelForCausalLM.from_config(config, torch_dtype=torch.float32), case)
        self.model.train()

    def use(self, case):
        """The same model for another case."""
        if case["recompute"] == "blocks":
            self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        else:
            self.model.gradient_checkpointing_disable()

    def micro_batches(self, case, number):
        rows = case.get("rows", self.task["batch"]) // self.world
        for ids in batches(case, rows, number, self.task["model"]["vocab_size"], int(os.environ["RANK"])):
            yield ids.to(device()), rows // case["micro"]

    def facts(self):
        return {}


class Fsdp2(Peer):
    """torch.distributed.fsdp.fully_shard around every block and the whole; fp32 shards, bf16 compute, fp32 reduction, AdamW fused
    where the device has it. With ``keep``, weights and gradients stay whole on every rank between the micro-batches of a step:
    less communication for more memory."""

    def _sharded(self, make, case):
        import torch
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        with torch.device("meta"):
            model = make()
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        decoder = getattr(model, "transformer", None) or model.model
        for block in decoder.h if hasattr(decoder, "h") else decoder.layers:
            fully_shard(block, mp_policy=policy)
        fully_shard(model, mp_policy=policy)
        model.to_empty(device=device())
        fill(p.to_local() for p in model.parameters())
        _buffers_again(model, make)
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, fused=device().type == "cuda")
        return model

    def step(self, case, number):
        import torch

        total, done = torch.zeros((), device=device()), 0
        for ids, parts in self.micro_batches(case, number):
            done += 1
            if case.get("keep"):
                self.model.set_requires_gradient_sync(done == parts)
                self.model.set_reshard_after_backward(done == parts)
            loss = self.model(input_ids=ids, labels=ids).loss / parts
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(total)


def _buffers_again(model, make):
    """What ``to_empty`` left unset beside the weights (the rotary frequencies), from a model of one block."""
    import copy

    small = copy.deepcopy(model.config)
    small.num_hidden_layers = 1
    from transformers import AutoModelForCausalLM

    reference = dict(AutoModelForCausalLM.from_config(small).named_buffers())
    for name, buffer in model.named_buffers():
        buffer.copy_(reference[name].to(buffer.device))


class Zero3(Peer):
    """deepspeed.initialize with ZeRO stage 3, its own AdamW (fused), overlapping communication."""

    def _sharded(self, make, case):
        import deepspeed
        import torch

        rows, micro = case.get("rows", self.task["batch"]), case["micro"]
        settings = {
            "train_micro_batch_size_per_gpu": micro, "gradient_accumulation_steps": rows // self.world // micro,
            "bf16": {"enabled": True}, "gradient_clipping": 1.0, "steps_per_print": 2**31 - 1,
            "zero_optimization": {"stage": 3, "overlap_comm": True, "contiguous_gradients": True,
                                  "stage3_prefetch_bucket_size": 5e7, "stage3_param_persistence_threshold": 1e5},
            "optimizer": {"type": "AdamW", "params": {"lr": RATE, "torch_adam": True, "fused": device().type == "cuda"}},
        }  # fmt: skip
        with deepspeed.zero.Init(config_dict_or_path=settings):
            model = make()
        for number, parameter in enumerate(model.parameters()):
            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
                if int(os.environ["RANK"]) == 0:
                    generator = torch.Generator(device=parameter.device).manual_seed(number)
                    with torch.no_grad():
                        if parameter.dim() > 1:
                            parameter.normal_(0.0, 0.02, generator=generator)
                        else:
                            parameter.fill_(1.0)
        self.engine = deepspeed.initialize(model=model, model_parameters=list(model.parameters()), config=settings)[0]
        return model

    def use(self, case):
        super().use(case)
        self.engine.set_train_micro_batch_size(case["micro"])
        self.engine.set_train_batch_size(case.get("rows", self.task["batch"]))

    def step(self, case, number):
        import torch

        total = torch.zeros((), device=device())
        for ids, parts in self.micro_batches(case, number):
            loss = self.engine(input_ids=ids, labels=ids).loss
            self.engine.backward(loss)
            self.engine.step()
            total += loss.detach() / parts
        return float(total)
