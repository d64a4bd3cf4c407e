"""run.compile on a GPU: FlexAttention and compiled blocks against the plain ones, in numbers and in speed.

    python benchmarks/compile.py --output rows.json       # about 3 minutes on one GPU

Numbers: one block, packed rows of several documents; the distance |a - b| / |b| of outputs and gradients from the plain block in
fp32, for the plain and the compiled block in fp32 and bf16. Speed: eight llama-7B (six bloom-7B) blocks with head through the
engine of training, by ``pipedock bench train``, a step of 16 micro-batches, plain and compiled; MFU as everywhere.
"""

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from bench import shapes  # noqa: E402
from bench.rows import Rows, drawn  # noqa: E402
from bench.task import Case  # noqa: E402
from bench.train import line, measured  # noqa: E402

SMALL = {
    "llama": {"model_type": "llama", "vocab_size": 100, "hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 1,
              "num_attention_heads": 8, "num_key_value_heads": 2},
    "bloom": {"model_type": "bloom", "vocab_size": 100, "hidden_size": 448, "n_layer": 1, "n_head": 7, "hidden_dropout": 0.0,
              "attention_dropout": 0.0},
}  # fmt: skip


def one_block(family, dtype, compiled, device):
    """-> output (only where no padding is) and gradients, fp32 on the CPU."""
    import torch

    from pipeline_train import families
    from pipeline_train.models import init_layer
    from pipeline_train.stages import PipeLayer

    dims = families.dims_of(SMALL[family])
    layer = PipeLayer(dims, 1, torch.float32, False, compiled)
    init_layer(layer.inner, dims, 1, seed=0)
    layer = layer.to(device, dtype)
    generator = torch.Generator().manual_seed(0)
    rows = Rows(drawn(212, 640), 640, packed=True, vocab=100).step(0, 2, 2)[0][0]
    segments, positions = rows.segments, rows.positions
    hidden = torch.randn(2, 640, dims.hidden, generator=generator).to(device, dtype).requires_grad_()
    weights = torch.randn(2, 640, dims.hidden, generator=generator).to(device, dtype) * (segments > 0)[..., None].to(device, dtype)
    out = layer((hidden, positions.to(device), segments.to(device)))[0]
    (out * weights).float().sum().backward()
    real = (segments > 0).to(device)
    found = {"output": out[real], "input's gradient": hidden.grad}
    found.update((name, parameter.grad) for name, parameter in layer.inner.named_parameters())
    return {name: value.detach().float().cpu() for name, value in found.items()}


def compare(device):
    import torch

    rows = []
    for family in SMALL:
        exact = one_block(family, torch.float32, False, device)
        for dtype in (torch.float32, torch.bfloat16):
            for compiled in (False, True):
                found = one_block(family, dtype, compiled, device)
                off = {name: float((found[name] - exact[name]).norm() / exact[name].norm().clamp_min(1e-6)) for name in exact
                       if not name.endswith("bias")}  # fmt: skip
                worst = max(off, key=off.get)
                rows.append({"family": family, "dtype": str(dtype), "compiled": compiled, "output": off["output"], "worst": worst,
                             "off": off[worst]})  # fmt: skip
                text = "%(family)s %(dtype)s compiled %(compiled)s: output off by %(output).2e, worst %(worst)s %(off).2e"
                print(text % rows[-1], flush=True)
    return rows


def speed(family, seq, micro, compiled, blocks):
    """Packed rows through the training engine, one stage; -> the bench's row."""
    model = shapes.model_of(family + "-7b", blocks)
    one = Case("ours", model, seq, micro, 16, compile=compiled, documents=drawn(212, seq))
    row = measured(one, cuda=True)
    print(line(row), flush=True)
    return row


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", required=True, type=Path)
    args = parser.parse_args()
    import torch

    cuda = torch.cuda.is_available()
    document = {"numbers": compare("cuda" if cuda else "cpu"), "speed": []}
    cases = (("llama", 1024, 4, False, 8), ("llama", 1024, 4, True, 8), ("llama", 2048, 8, True, 8), ("bloom", 1024, 4, False, 6),
             ("bloom", 1024, 4, True, 6))  # fmt: skip
    for case in cases if cuda else ():
        document["speed"].append(speed(*case))
        args.output.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    args.output.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
