"""One rank of multi_gpu.py: trains one model by one engine, case after case, and prints a JSON row for each (rank 0).

    RANK=... LOCAL_RANK=... WORLD_SIZE=... MASTER_ADDR=... MASTER_PORT=... python benchmarks/multi_gpu_rank.py '<task as JSON>'

A task: {engine: pipeline | zero3 | fsdp2, model: config.json's content, batch: rows of a step, steps: timed ones, cases: [{seq,
micro, recompute, rows (of a step, where they differ), data and compile (pipeline), keep (fsdp2)}], known: rows of an earlier
process}. A case with ``best``: a sequence length, takes the rest from the fastest row of that length, as many tokens at once.

Weights are random, made on the device; every row of tokens is one document, and every token is learnt. The peers are DeepSpeed's
ZeRO stage 3 and PyTorch's fully_shard, both around transformers' own model with SDPA attention, gradient checkpointing where
``recompute`` says blocks, weights bf16 in the matmuls, AdamW in fp32.
"""

import gc
import json
import os
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

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


class OurPipeline:
    """pipe x data ranks of pipeline_train's engine."""

    def __init__(self, task, case):
        from pipeline_train import config, engine, families, plan

        world = int(os.environ["WORLD_SIZE"])
        data = case.get("data", 1)
        self.dims = families.dims_of(task["model"])
        self.rows = case.get("rows", task["batch"])
        run = config.parse({
            "run": {"out": "unused", "compile": case.get("compile", False)},
            "model": {"path": "unused", "init": "random", "dtype": "bf16"},
            "data": {"train": "unused", "seq_len": case["seq"]},
            "parallel": {"pipe": world // data, "data": data, "recompute": case["recompute"]},
            "batch": {"micro": case["micro"], "global": self.rows}, "optim": {"lr": RATE},
        })  # fmt: skip
        again = case["recompute"] == "blocks"
        boundaries = plan.bounds(self.dims, world // data, "auto", case["seq"], again)
        run.parallel.parts = plan.parts_of(boundaries)
        self.planned = plan.memory_of(run, self.dims)
        self.parts = run.parallel.parts
        self.pipe = engine.Pipeline(run, self.dims, boundaries, device().type == "cuda")
        for layer, module in self.pipe.stage.layers.items():
            for number, parameter in enumerate(module.parameters()):
                self.pipe.write_whole(parameter, self._random(parameter, 1000 * int(layer) + number))
        self.pipe.set_steps(0)
        self.stage_s = self.span = 0.0

    def _random(self, parameter, seed):
        import torch

        generator = torch.Generator(device=device()).manual_seed(seed)
        if parameter.dim() == 1:
            return torch.ones(parameter.shape, device=device())
        return torch.empty(parameter.shape, device=device()).normal_(0.0, 0.02, generator=generator)

    def use(self, case):
        pass

    def step(self, case, number):
        import torch

        pipe, mine = self.pipe, self.rows // self.pipe.config.parallel.data
        positions = torch.arange(case["seq"]).expand(case["micro"], case["seq"]).contiguous()

        def feed():
            for ids in batches(case, mine, number, self.dims.vocab, pipe.data_rank):
                yield (ids, positions, torch.ones_like(ids)), ids.roll(-1, 1)

        result = pipe.train(feed(), self.rows * case["seq"], RATE)
        self.stage_s, self.span = result.busy, result.span
        return result.loss

    def facts(self):
        stage = self.pipe.pipe_rank
        return {"plan_gib": self.planned[stage]["total"], "stage": stage, "stage_s": self.stage_s, "span": self.span,
                "parts": self.parts}  # fmt: skip


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


ENGINES = {"pipeline": OurPipeline, "fsdp2": Fsdp2, "zero3": Zero3}


built = {}  # engine name -> a peer, which serves every case


def engine_of(task, case):
    """-> (the engine, whether it has taken steps of this shape before)."""
    name = task["engine"]
    if name == "pipeline":
        return OurPipeline(task, case), False
    if name not in built:
        built[name] = ENGINES[name](task, case)
    built[name].use(case)
    return built[name], case.get("best") == case["seq"]


def measure(task, case):
    """Build, one step to warm up, then ``steps`` timed ones; -> the row (the same on every rank)."""
    import torch
    import torch.distributed as dist

    from pipeline_train import families, plan
    from pipeline_train.plan.cards import peak_flops

    cuda = device().type == "cuda"
    began = time.perf_counter()
    engine, warm = engine_of(task, case)
    build_s = time.perf_counter() - began
    if not warm:
        engine.step(case, 0)
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    seconds, losses = [], []
    for number in range(1, 1 + case.get("steps", task["steps"])):
        dist.barrier()
        if cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        losses.append(engine.step(case, number))
        if cuda:
            torch.cuda.synchronize()
        dist.barrier()
        seconds.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated() / 2**30 if cuda else 0.0
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, dict(engine.facts(), gib=round(peak, 3)))
    rows = case.get("rows", task["batch"])
    tokens, step_s = rows * case["seq"], sorted(seconds)[len(seconds) // 2]
    flops = plan.step_flops(families.dims_of(task["model"]), tokens, rows * case["seq"] * (case["seq"] + 1) // 2)
    top = peak_flops(torch.cuda.get_device_name()) * len(everyone) if cuda else 0.0
    return dict(case, engine=task["engine"], family=task["model"]["model_type"], gpus=len(everyone), rows=rows,
                card=torch.cuda.get_device_name() if cuda else "CPU", step_s=step_s, all_s=[round(s, 3) for s in seconds],
                tokens_per_s=tokens / step_s, samples_per_s=rows / step_s, mfu=flops / step_s / top if top else None,
                gib=[one["gib"] for one in everyone], ranks=everyone, loss=losses[-1], built_s=round(build_s, 1))  # fmt: skip


def best_of(known, case):
    """The case with what it leaves open filled in, as rank 0 has measured it."""
    import torch.distributed as dist

    if not case.get("best"):
        return case
    wanted = case["best"], case.get("data")
    rows = [row for row in known if "tokens_per_s" in row and (row["seq"], row.get("data")) == wanted]
    chosen = [max(rows, key=lambda row: row["tokens_per_s"])] if rows else [None]
    dist.broadcast_object_list(chosen, src=0)
    if chosen[0] is None:
        raise SystemExit("no case of seq %d has been measured" % case["best"])
    same = {key: chosen[0][key] for key in ("recompute", "keep", "compile") if key in chosen[0]}
    return dict(same, micro=chosen[0]["micro"] * case["best"] // case["seq"], **case)


def main():
    import torch
    import torch.distributed as dist

    from pipeline_train import engine

    task = json.loads(sys.argv[1])
    rank, cuda = int(os.environ["RANK"]), device().type == "cuda"
    if rank:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    engine.connect(cuda, int(os.environ["LOCAL_RANK"]))
    known = task.get("known", [])
    for number, case in enumerate(task["cases"]):
        case = best_of(known, case)
        try:
            row = measure(task, case)
        except torch.OutOfMemoryError as error:
            row = dict(case, engine=task["engine"], family=task["model"]["model_type"], error="out of memory",
                       detail=str(error).split(". ")[0])  # fmt: skip
        known.append(row)
        if rank == 0:
            print(json.dumps(dict(row, number=number)), flush=True)
        if "error" in row:
            os._exit(3)  # what the others wait for will not come: the driver starts again behind this case
        gc.collect()
        if cuda:
            torch.cuda.empty_cache()
    dist.barrier()
    os._exit(0)  # NCCL's threads need no leave


if __name__ == "__main__":
    main()
