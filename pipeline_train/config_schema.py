"""What run.yaml can say: every key, its type and its default, written once."""

from typing import Any, Dict, List, Literal, Optional, Union

import msgspec
from msgspec import field


class Section(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """A section of run.yaml."""


class Run(Section):
    out: str
    name: str = ""
    seed: int = 42
    hang_s: int = 40  # a rank without a sign of life for so long ends the run
    self_test: bool = True  # once per new environment, before step 1
    compile: bool = False  # blocks, head and loss through torch.compile, on GPUs with FlexAttention
    fp8: bool = False  # of bf16 runs: the blocks' products but for the weights' gradients, on cards that have it
    trace: bool = False  # one step, instruction by instruction, into <out>/trace.json
    wandb: Union[bool, str] = False  # true, or the project's name


class Model(Section):
    path: str
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    init: Literal["pretrained", "random"] = "pretrained"


class Data(Section):
    train: str
    eval: Optional[str] = None
    seq_len: Optional[int] = None
    template: str = "auto"
    pack: bool = True
    learn: Literal["answers", "all"] = "answers"  # of records that have answers; pretrain texts are learnt whole
    on_bad: Literal["fail", "skip"] = "fail"
    over_long: Literal["truncate", "drop", "fail"] = "truncate"
    cache: Union[bool, str] = "auto"  # of encoded data: auto (in ~/.cache/pipedock/data), off (YAML reads false), or a folder


class Parallel(Section):
    pipe: int
    data: int = 1
    parts: Union[Literal["auto"], List[int]] = "auto"
    recompute: Literal["none", "selective", "blocks"] = "none"
    axes: List[str] = field(default_factory=lambda: ["pipe", "data"])
    offload: bool = False


class Batch(Section):
    micro: int = 1
    global_rows: Optional[int] = field(default=None, name="global")


class LossScale(Section):
    initial: int = 65536
    window: int = 1000
    hysteresis: int = 2
    min: float = 1.0
    max_overflows: int = 30  # in a row, then the run ends


class Optim(Section):
    type: Literal["adamw", "lion"] = "adamw"
    lr: float = 1e-5
    betas: List[float] = field(default_factory=lambda: [0.9, 0.95])
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip: float = 1.0
    warmup: int = 0
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    floor: float = 0.1
    use_triton: Union[Literal["auto"], bool] = "auto"  # Lion's step as one kernel on a GPU
    loss_scale: LossScale = field(default_factory=LossScale)


class Train(Section):
    epochs: int = 1
    max_steps: Optional[int] = None
    save_every: Optional[int] = None  # None: at the end only
    eval_every: Optional[int] = None  # None: at the end only
    keep: int = 3
    async_save: bool = True  # write checkpoints behind the next steps, where the host's memory holds a copy of them
    log_every: int = 1


class Export(Section):
    dir: str
    target: Literal["hf", "tgi-0.8", "tgi-3", "vllm"] = "hf"


class Serve(Section):
    engine: Literal["embedded", "tgi", "vllm"] = "embedded"
    version: Optional[str] = None
    shards: int = 1
    port: int = 8082


class RunConfig(Section):
    run: Run
    model: Model
    data: Data
    parallel: Parallel
    batch: Batch = field(default_factory=Batch)
    optim: Optim = field(default_factory=Optim)
    train: Train = field(default_factory=Train)
    deepspeed: Dict[str, Any] = field(default_factory=dict)
    export: Optional[Export] = None
    serve: Optional[Serve] = None

    @property
    def world(self) -> int:
        """Processes (GPUs) of the run: pipe x data."""
        return self.parallel.pipe * self.parallel.data

    @property
    def rows_per_step(self) -> int:
        """Packed rows of one optimizer step over all data-parallel ranks."""
        if self.batch.global_rows is not None:
            return self.batch.global_rows
        return self.batch.micro * self.parallel.data * 8

    @property
    def micro_batches(self) -> int:
        """M, the micro-batches of one step on each data-parallel rank."""
        return self.rows_per_step // (self.batch.micro * self.parallel.data)


# DeepSpeed keys that are derived from ours: two places for one fact would let them disagree.
OWNED = {
    "train_batch_size": "batch.global",
    "train_micro_batch_size_per_gpu": "batch.micro",
    "gradient_accumulation_steps": "batch.global and batch.micro",
    "fp16": "model.dtype and optim.loss_scale",
    "bf16": "model.dtype",
    "bfloat16": "model.dtype",
    "gradient_clipping": "optim.clip",
    "optimizer": "optim",
    "scheduler": "optim.schedule",
    "steps_per_print": "train.log_every",
}
