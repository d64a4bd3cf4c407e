"""The cases in which the pipeline is compared with transformers: the one list that the tests, ci/test.sh and ci/matrix.sh use.

``MATRIX``: stages {1,2,4} x replicas {1,2} x accumulation {1,4} x family x tied x packed, clipping and ZeRO-1 everywhere; explicit
and automatic stage boundaries, recomputation and both rank orders alternate over them. ``EXTRA``: what is outside that product.
``quick`` cases are in ci/test.sh: every value of every axis with every value of every other one, but for the eight processes.
"""

import itertools
from typing import Any, Dict, List, NamedTuple, Tuple

from tests.models import computed, tiny_config

STEPS, WIDTH, CLIP, VOCAB = 20, 24, 0.5, 131
BLOCKS = 4  # 6 layers
PARTS = {1: "auto", 2: (1, 5), 4: (1, 2, 2, 1)}  # an embedding alone on a stage has no norm, a head alone no block


class Case(NamedTuple):
    pipe: int
    data: int
    rows: int  # of a step
    micro: int  # rows of a micro-batch
    model: str
    packed: bool
    parts: Any = "auto"
    recompute: str = "none"
    axes: Tuple[str, str] = ("pipe", "data")
    optim: str = "adamw"
    dtype: str = "fp32"
    offload: str = ""  # "torch" or "deepspeed": whose optimizer does the step on the CPU
    quick: bool = False

    @property
    def world(self) -> int:
        return self.pipe * self.data

    @property
    def name(self) -> str:
        parts = "" if self.parts == "auto" else "-parts" + "".join(map(str, self.parts))
        optim = self.optim + ("-offload-" + self.offload if self.offload else "")
        text = "%s-%dx%d-%dof%d-%s%s" % (self.model, self.pipe, self.data, self.micro, self.rows, optim, parts)
        return "-".join([text, "packed" if self.packed else "padded", self.dtype])

    def run(self, folder: Any) -> Dict[str, Any]:
        """run.yaml; ``folder``: the model."""
        lion = self.optim == "lion"  # its steps are all of size lr, so a tenth of AdamW's
        return {
            "run": {"out": "unused"}, "model": {"path": str(folder), "dtype": self.dtype},
            "data": {"train": "unused", "seq_len": WIDTH, "pack": self.packed},
            "parallel": {"pipe": self.pipe, "data": self.data, "parts": self.parts if self.parts == "auto" else list(self.parts),
                         "recompute": self.recompute, "axes": list(self.axes),
                         "offload": bool(self.offload)},
            "batch": {"micro": self.micro, "global": self.rows},
            "optim": {"type": self.optim, "lr": 2e-4 if lion else 2e-3, "clip": CLIP, "warmup": 2},
        }  # fmt: skip


def models() -> Dict[str, Dict[str, Any]]:
    """Name -> config.json. Untied llama has biases, untied bloom a head count that is no power of two."""
    llama = {"num_hidden_layers": BLOCKS, "num_key_value_heads": 2}
    made = {
        "llama-tied": tiny_config("llama", tie_word_embeddings=True, **llama),
        "llama": tiny_config("llama", attention_bias=True, **llama),
        "bloom-tied": tiny_config("bloom", n_layer=BLOCKS),
        "bloom": tiny_config("bloom", n_layer=BLOCKS, tie_word_embeddings=False, n_head=3),
    }
    return {name: computed(config) for name, config in made.items()}


def _matrix() -> List[Case]:
    cases = []
    for place, (pipe, data) in enumerate(itertools.product((1, 2, 4), (1, 2))):
        for bits in itertools.product((0, 1), repeat=4):
            accumulate, bloom, tied, packed = bits
            rows = 8 if accumulate else 4
            # A setting and its opposite for each number of stages and replicas: over five of them, every pair of values.
            flipped = [bit ^ (place > 0 and place - 1 == axis) for axis, bit in enumerate(bits)]
            model, micro = ("bloom" if bloom else "llama") + ("-tied" if tied else ""), rows // data // (4 if accumulate else 1)
            cases.append(Case(
                pipe, data, rows, micro, model, bool(packed),
                PARTS[pipe] if (accumulate + packed + pipe // 4) % 2 == 0 else "auto",
                "blocks" if bloom == tied else "none",
                ("data", "pipe") if bloom and pipe > 1 and data > 1 else ("pipe", "data"),
                quick=len(set(flipped)) == 1 and pipe * data < 8,
            ))  # fmt: skip
    return cases


MATRIX = _matrix()
EXTRA = [
    Case(2, 1, 1, 1, "bloom", True, recompute="blocks", quick=True),  # a step of one row
    Case(2, 1, 8, 2, "bloom-tied", True, (5, 1)),
    Case(2, 1, 8, 2, "bloom", True, recompute="selective", quick=True),
    Case(1, 2, 8, 1, "llama-tied", True, recompute="selective", dtype="bf16", quick=True),
    Case(2, 4, 4, 1, "llama-tied", True, (1, 5)),  # four replicas, the last one without a learnt token
    Case(2, 1, 8, 2, "llama-tied", True, optim="lion", quick=True),
    Case(1, 1, 4, 4, "bloom", False, optim="lion"),
    Case(2, 2, 8, 1, "bloom-tied", True, optim="lion"),
    Case(2, 1, 8, 2, "llama-tied", True, (1, 5), offload="torch", quick=True),
    Case(2, 2, 8, 1, "bloom", False, offload="torch"),
    Case(2, 1, 8, 2, "llama-tied", True, optim="lion", offload="torch"),
    Case(2, 2, 8, 1, "llama-tied", True, offload="deepspeed"),
    Case(2, 1, 8, 2, "llama-tied", True, optim="lion", offload="deepspeed"),
    Case(2, 1, 8, 2, "llama-tied", True, (1, 5), "blocks", dtype="bf16", quick=True),
    Case(1, 2, 8, 1, "llama", False, dtype="bf16"),
    Case(2, 2, 8, 1, "bloom", True, (1, 5), dtype="bf16"),
    Case(4, 1, 8, 2, "bloom-tied", False, (1, 2, 2, 1), dtype="bf16"),
    Case(4, 2, 8, 1, "llama-tied", True, (1, 2, 2, 1), "blocks", dtype="bf16"),
]
