"""The ancestor's way: DeepSpeed's own PipelineModule around transformers' own layers, one padded document a row, DeepSpeed's AdamW
with its ZeRO-1. Loss: transformers' shifted cross entropy in fp32.
"""

from typing import Any, Dict, List, Tuple

import torch
from torch import nn
from torch.nn import functional as F

from pipeline_train.models.loss import IGNORE

from .peers import DTYPES, Peer, empty_model
from .rows import Counts, MicroBatch
from .task import RATE, Case
from .values import fill

Wire = Tuple[torch.Tensor, torch.Tensor]  # hidden[B,T,D], mask[B,T] int64


class Embed(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        decoder = decoder_of(model)
        self.embed = decoder.word_embeddings if hasattr(decoder, "word_embeddings") else decoder.embed_tokens
        self.norm = getattr(decoder, "word_embeddings_layernorm", nn.Identity())

    def forward(self, wire: Wire) -> Wire:
        ids, mask = wire
        return self.norm(self.embed(ids)), mask


class LlamaBlock(nn.Module):
    def __init__(self, model: Any, number: int) -> None:
        super().__init__()
        self.block, self.rotary = model.model.layers[number], model.model.rotary_emb

    def forward(self, wire: Wire) -> Wire:
        hidden, mask = wire
        positions = torch.arange(hidden.shape[1], device=hidden.device)[None]
        out = self.block(hidden, attention_mask=None, position_embeddings=self.rotary(hidden, positions))
        return out[0] if isinstance(out, tuple) else out, mask


class BloomBlock(nn.Module):
    def __init__(self, model: Any, number: int) -> None:
        super().__init__()
        self.block, self.heads = model.transformer.h[number], model.config.n_head

    def forward(self, wire: Wire) -> Wire:
        from transformers.models.bloom.modeling_bloom import build_alibi_tensor

        hidden, mask = wire
        length = hidden.shape[1]
        least = torch.finfo(hidden.dtype).min
        causal = torch.full((length, length), least, dtype=hidden.dtype, device=hidden.device).triu(1)[None, None]
        out = self.block(hidden, build_alibi_tensor(mask, self.heads, hidden.dtype), causal)
        return out[0] if isinstance(out, tuple) else out, mask


class Head(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        decoder = decoder_of(model)
        self.norm = decoder.ln_f if hasattr(decoder, "ln_f") else decoder.norm
        vocab, hidden = model.lm_head.weight.shape
        self.head = nn.Linear(hidden, vocab, bias=False)  # its own: a stage may have no embedding to share

    def forward(self, wire: Wire) -> torch.Tensor:
        return self.head(self.norm(wire[0]))


def decoder_of(model: Any) -> Any:
    return getattr(model, "transformer", None) or model.model


def loss_of(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """logits[B,T,V], labels[B,T], not shifted."""
    return F.cross_entropy(logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORE)


class Ancestor(Peer):
    """``case.pipe`` stages of about as many parameters each."""

    def _built(self, case: Case) -> Any:
        import deepspeed
        from deepspeed.runtime.pipe.module import PipelineModule

        with torch.device(self.device):
            model = empty_model(case, DTYPES[case.dtype])
            block = BloomBlock if case.model["model_type"] == "bloom" else LlamaBlock
            count = len(decoder_of(model).h if block is BloomBlock else decoder_of(model).layers)
            layers = [Embed(model)] + [block(model, number) for number in range(count)] + [Head(model)]
        again = 1 if case.recompute == "blocks" else 0
        stage = PipelineModule(layers=layers, num_stages=case.pipe, loss_fn=loss_of, partition_method="parameters",
                               activation_checkpoint_interval=again)  # fmt: skip
        del model  # other stages' layers
        stage.to(DTYPES[case.dtype])
        fill(stage.parameters())
        settings: Dict[str, Any] = {
            "train_micro_batch_size_per_gpu": case.micro, "gradient_accumulation_steps": case.micro_batches,
            "train_batch_size": case.rows, "gradient_clipping": 1.0, "steps_per_print": 2**31 - 1,
            "zero_optimization": {"stage": 1}, "zero_allow_untested_optimizer": True,
        }  # fmt: skip
        if case.dtype != "fp32":
            settings[case.dtype] = {"enabled": True}
        optimizer = torch.optim.AdamW(stage.parameters(), lr=RATE, fused=self.device.type == "cuda")
        self.engine = deepspeed.initialize(model=stage, optimizer=optimizer, config=settings)[0]
        return stage

    def use(self, case: Case) -> None:
        self.case = case
        self.replica = self.engine.grid.get_data_parallel_rank()

    def step(self, batches: List[MicroBatch], counts: Counts) -> float:
        feed = (((batch.ids, (batch.segments > 0).long()), batch.labels) for batch in batches)
        return float(self.engine.train_batch(feed))
