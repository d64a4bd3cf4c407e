"""run.compile on a GPU: FlexAttention and compiled blocks against the plain ones, in numbers and in speed.

    python benchmarks/compile.py --output rows.json       # about 3 minutes on one GPU

Numbers: one block, packed rows of several documents; the distance |a - b| / |b| of outputs and gradients from the plain block in
fp32, for the plain and the compiled block in fp32 and bf16. Speed: eight llama-7B (six bloom-7B) blocks with head through the
engine of training, by plan_memory.py's build, a step of 16 micro-batches, plain and compiled; MFU as everywhere.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

SMALL = {
    "llama": {"model_type": "llama", "vocab_size": 100, "hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 1,
              "num_attention_heads": 8, "num_key_value_heads": 2},
    "bloom": {"model_type": "bloom", "vocab_size": 100, "hidden_size": 448, "n_layer": 1, "n_head": 7, "hidden_dropout": 0.0,
              "attention_dropout": 0.0},
}  # fmt: skip
DOCUMENT = 212  # tokens of alpaca's mean sample


def packed(rows, length, generator):
    """segments and positions[B,T] of rows filled with documents of about DOCUMENT tokens, with a little padding."""
    import torch

    segments, positions = torch.zeros(rows, length, dtype=torch.int64), torch.zeros(rows, length, dtype=torch.int64)
    for row in range(rows):
        start, number = 0, 1
        while start < length - 20:
            end = min(length, start + int(torch.randint(20, 2 * DOCUMENT - 20, (1,), generator=generator)))
            segments[row, start:end], positions[row, start:end] = number, torch.arange(end - start)
            start, number = end, number + 1
    return segments, positions


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
    segments, positions = packed(2, 640, generator)
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


def speed(family, seq, micro, compiled, blocks, steps=3, micro_batches=16):
    """Packed rows through the training engine, one stage."""
    import torch

    from benchmarks import plan_memory
    from pipeline_train import families, plan
    from pipeline_train.plan.cards import peak_flops

    base = dict(plan_memory.LLAMA if family == "llama" else plan_memory.BLOOM)
    base["num_hidden_layers" if family == "llama" else "n_layer"] = blocks
    pipe = plan_memory.build(plan_memory.case(base, seq, micro), micro_batches, compiled)
    pairs = tokens = 0

    def batches(number):
        nonlocal pairs, tokens
        generator = torch.Generator().manual_seed(number)
        pairs = tokens = 0
        for _ in range(micro_batches):
            segments, positions = packed(micro, seq, generator)
            ids = torch.randint(3, 30000, (micro, seq), generator=generator)
            pairs += int((positions + 1)[segments > 0].sum())
            tokens += int((segments > 0).sum())
            yield (ids, positions, segments), ids.roll(-1, 1).masked_fill(segments == 0, -100)

    seconds, began = [], time.perf_counter()
    for number in range(steps + 1):
        prepared = list(batches(number))
        torch.cuda.synchronize()
        start = time.perf_counter()
        loss = pipe.train(iter(prepared), tokens, 1e-5).loss
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    step_s = sorted(seconds[1:])[steps // 2]
    flops = plan.step_flops(families.dims_of(base), tokens, pairs)
    return {"family": family, "blocks": blocks, "seq": seq, "micro": micro, "compiled": compiled, "step_s": step_s,
            "tokens_per_s": tokens / step_s, "mfu": flops / step_s / peak_flops(torch.cuda.get_device_name()), "loss": loss,
            "first_step_s": seconds[0], "all_s": time.perf_counter() - began, "card": torch.cuda.get_device_name(),
            "gib": torch.cuda.max_memory_allocated() / 2**30}  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", required=True, type=Path)
    parser.add_argument("--speed", metavar="FAMILY,SEQ,MICRO,COMPILED,BLOCKS", help="only this one, in this process")
    args = parser.parse_args()
    if args.speed:
        family, seq, micro, compiled, blocks = args.speed.split(",")
        print(json.dumps(speed(family, int(seq), int(micro), compiled == "1", int(blocks))), flush=True)
        os._exit(0)
    import torch

    cuda = torch.cuda.is_available()
    document = {"numbers": compare("cuda" if cuda else "cpu"), "speed": []}
    for case in (
        ("llama,1024,4,0,8", "llama,1024,4,1,8", "llama,2048,8,1,8", "bloom,1024,4,0,6", "bloom,1024,4,1,6") if cuda else ()
    ):
        import subprocess

        env = dict(os.environ, RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="29577")
        done = subprocess.run([sys.executable, __file__, "--output", "-", "--speed", case], env=env, capture_output=True, text=True)
        lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
        row = json.loads(lines[-1]) if lines else {"case": case, "error": done.stderr.strip().splitlines()[-1:]}
        document["speed"].append(row)
        print(json.dumps(row), flush=True)
        if not lines:
            print(done.stderr[-3000:], flush=True)
        args.output.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    args.output.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
