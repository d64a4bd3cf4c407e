"""Conversion and proof of a 7B geometry: speed against ``cp`` of the same files in the same run, and peak memory.

    python benchmarks/convert.py --family bloom --blocks 30 --dir /scratch --json out.json

Makes a synthetic bf16 model of that many blocks of the 7B size (bloom: hidden 4096, vocabulary 250880, tied; llama: 11008, 32000),
then in a process of its own each: cp, from-hf, to-hf, cp again (the first is slower on a machine whose memory is new), and, with
--verify, verify layer by layer. Removes what it made.
Peak memory is VmHWM of the process less that of one which only imports the same libraries. A tied head is read once and written
twice, and a conversion also hashes what it writes (from-hf) or reads (to-hf): cpu_s says what that costs on a busy machine.
"""

import argparse
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Dict, List

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from export import targets  # noqa: E402
from export.shards import plan, write_index  # noqa: E402
from pipeline_train import families  # noqa: E402
from pipeline_train.weights.writing import Item, TensorFile  # noqa: E402

CONFIGS: Dict[str, Dict[str, Any]] = {
    "bloom": {"model_type": "bloom", "vocab_size": 250880, "hidden_size": 4096, "n_head": 32, "torch_dtype": "bfloat16"},
    "llama": {
        "model_type": "llama", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32,
        "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    },
}  # fmt: skip
CALL = "; ".join((
    "import sys; sys.path.insert(0, %r)" % str(ROOT),
    "import json, time; from export.measure import peak_gib; from export.from_hf import from_hf; from export.to_hf import to_hf",
    "from export.verify import verify; start, cpu = time.perf_counter(), time.process_time(); %s",
    "print(json.dumps([time.perf_counter() - start, peak_gib(), time.process_time() - cpu]))",
))  # fmt: skip
NOISE = torch.empty(1 << 22).normal_(generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()


def make(folder: Path, family_name: str, blocks: int) -> int:
    """A folder of random weights as save_pretrained would shard them; -> bytes."""
    folder.mkdir(parents=True)
    config = dict(CONFIGS[family_name], **{"n_layer" if family_name == "bloom" else "num_hidden_layers": blocks})
    (folder / "config.json").write_text(json.dumps(config))
    family, dims = families.family_of(config), families.dims_of(config)
    names = targets.exported(targets.find("hf"), family, dims)
    items = [Item(name, "BF16", slot.size(dims)) for name, _, slot in names if not (dims.tied and slot.hf == family.tied[1])]
    shards = plan(items, 5 * 10**9)
    for name, shard in shards:
        with TensorFile(folder / name, shard) as file:
            for item in shard:
                left = item.nbytes // 2
                file.write(item.name, (NOISE[: min(len(NOISE), left - start)] for start in range(0, left, len(NOISE))))
    write_index(folder, shards)
    return sum(item.nbytes for item in items)


def measured(call: str) -> List[float]:
    """[seconds, peak GiB, CPU seconds] of a call in a process of its own."""
    done = subprocess.run([sys.executable, "-c", CALL % call], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    return list(json.loads(done.stdout.strip().splitlines()[-1]))


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def bench(work: Path, args: argparse.Namespace) -> List[Dict[str, Any]]:
    model, rows = work / "hf", []
    nbytes = make(model, args.family, args.blocks)
    idle = measured("import transformers")[1]
    what = {"family": args.family, "blocks": args.blocks, "gb": round(nbytes / 1e9, 2)}
    for name, call, source in (
        ("cp", None, model),
        ("from-hf", "from_hf(%r, %r)" % (str(model), str(work / "layers")), model),
        ("to-hf", "to_hf(%r, %r)" % (str(work / "layers"), str(work / "x")), work / "layers"),
        ("cp", None, model),
    ):
        os.sync()  # what others wrote is not ours to wait for
        start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
        if call is None:
            subprocess.run(["cp", "-r", str(model), str(work / "copy")], check=True)
            os.sync()
            seconds, peak = time.perf_counter() - start, idle
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
            shutil.rmtree(str(work / "copy"))
        else:
            seconds, peak, cpu = measured(call)
        read = size(source)
        rows.append(dict(what, what=name, seconds=round(seconds, 2), gb_per_s=round(read / 1e9 / seconds, 3),
                         cpu_s=round(cpu, 2), peak_gib_over_imports=round(peak - idle, 2)))  # fmt: skip
        print(json.dumps(rows[-1]), flush=True)
    if args.verify:
        seconds, peak, _ = measured("verify(%r, %r, whole=False)" % (str(work / "layers"), str(work / "x")))
        rows.append(
            dict(what, what="verify, layer by layer", seconds=round(seconds, 2), peak_gib_over_imports=round(peak - idle, 2))
        )
        print(json.dumps(rows[-1]), flush=True)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--family", choices=sorted(CONFIGS), default="bloom")
    parser.add_argument("--blocks", type=int, default=30)
    parser.add_argument(
        "--dir", default=None, help="where to work; needs four times the model's size (default: the temporary folder)"
    )
    parser.add_argument("--verify", action="store_true")
    parser.add_argument("--json", default=None)
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was made is removed
    work = Path(tempfile.mkdtemp(prefix="convert-", dir=args.dir))
    try:
        rows = bench(work, args)
    finally:
        shutil.rmtree(str(work))
    if args.json:
        Path(args.json).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
