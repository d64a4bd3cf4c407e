"""How fast a stage gets its weights from a model folder, beside ``cat`` of the same files to /dev/null.

    python benchmarks/read_weights.py                                        # llama-7b's geometry, 1 block
    python benchmarks/read_weights.py --model bloom-7b --blocks 2 --dtype bf16

One stage through the real engine; timed is what masters.start does but for zeroing the optimizer's moments: read, rounded to
the run's dtype into the parameters, and in fp32 into the optimizer's partitions. In turns, ``--rounds`` of each, first with the
files out of the page cache (posix_fadvise), then with them in it.
Prints one JSON row per turn, then the medians' ratios: cat's seconds over ours.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Dict, List

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from bench import shapes  # noqa: E402
from pipeline_train import config, families, plan  # noqa: E402
from pipeline_train.network import free_port  # noqa: E402


def pipeline(folder: Path, dtype: str) -> Any:
    import torch

    from pipeline_train import engine

    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    cuda = torch.cuda.is_available()
    engine.connect(cuda, 0)
    run = config.parse({
        "run": {"out": "-"}, "model": {"path": str(folder), "dtype": dtype}, "data": {"train": "-", "seq_len": 1024},
        "parallel": {"pipe": 1}, "batch": {"micro": 1, "global": 1},
    })  # fmt: skip
    dims = families.dims_of(families.read_config(str(folder)))
    return engine.Pipeline(run, dims, plan.bounds(dims, 1, "auto", 1024), cuda)


def forget(files: List[str]) -> None:
    """The page cache lets go of them."""
    for name in files:
        descriptor = os.open(name, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def turn(what: str, cold: bool, files: List[str], pipe: Any) -> Dict[str, Any]:
    from pipeline_train import masters

    if cold:
        forget(files)
    pipe.set_steps = lambda steps: None
    began = time.perf_counter()
    if what == "cat":
        subprocess.run(["cat", *files], check=True, stdout=subprocess.DEVNULL)
    else:
        masters.start(pipe)
        if pipe.cuda:
            import torch

            torch.cuda.synchronize()
    took, size = time.perf_counter() - began, sum(os.path.getsize(name) for name in files)
    return {
        "what": what,
        "cold": cold,
        "seconds": round(took, 3),
        "gib": round(size / 2**30, 3),
        "gb_per_s": round(size / 1e9 / took, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="llama-7b")
    parser.add_argument("--blocks", type=int, default=1)
    parser.add_argument("--dtype", default="bf16")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    from bench.convert import make

    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as name:
        folder = Path(name) / "model"
        make(folder, shapes.model_of(args.model, args.blocks))
        files = [str(path) for path in sorted(folder.glob("*.safetensors"))]
        pipe = pipeline(folder, args.dtype)
        rows = [turn(what, cold, files, pipe) for cold in (True, False) for _ in range(args.rounds) for what in ("cat", "ours")]
    for row in rows:
        print(json.dumps(row))
    for cold in (True, False):
        cat, ours = (
            statistics.median(row["seconds"] for row in rows if (row["what"], row["cold"]) == (what, cold))
            for what in ("cat", "ours")
        )
        print(json.dumps({"what": "cat over ours", "cold": cold, "ratio": round(cat / ours, 3)}))


if __name__ == "__main__":
    main()
