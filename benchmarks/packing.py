"""How well rows are filled, how long packing takes, and what a step of the feed costs, near or far.

    python benchmarks/packing.py --records RECORDS.json --model FOLDER --samples 1e7 --out benchmarks/results/NAME

Part one packs the records (alpaca or any other) as training would at each --seq-len. Part two packs that many synthetic lengths (a
log-normal, mean 200, cut at 2048), then asks for the 64 rows of steps near and far; memory is the process's highest resident size.
"""

import argparse
import json
import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline_train import config  # noqa: E402
from pipeline_train.data import packing  # noqa: E402
from pipeline_train.data.encode import TextCodec  # noqa: E402
from pipeline_train.data.feed import Feed, prepare  # noqa: E402


def megabytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def real(records: str, model: str, seq_len: int) -> dict:
    codec = TextCodec.load(model)
    run = config.parse({"run": {"out": "x"}, "model": {"path": model}, "data": {"train": records}, "parallel": {"pipe": 1}})
    with tempfile.TemporaryDirectory() as folder:
        found = prepare(run, codec, "train", Path(folder), seq_len)
        options = {"rows_per_step": 8, "seed": 42, "pad_id": 0}
        packed = Feed.open(folder, "train", seq_len=seq_len, pack=True, **options)
        alone = Feed.open(folder, "train", seq_len=seq_len, pack=False, **options)
        return {"seq_len": seq_len, "samples": found["samples"], "mean": found["lengths"]["mean"], "rows": packed.rows,
                "efficiency": round(packed.efficiency(), 4), "efficiency_unpacked": round(alone.efficiency(), 4)}  # fmt: skip


def synthetic(samples: int) -> dict:
    lengths = np.clip(np.random.default_rng(0).lognormal(5.0, 0.8, samples).astype(np.int32), 1, 2048)
    before, begun = megabytes(), time.perf_counter()
    packed = packing.pack(lengths, 2048)
    row = {"samples": samples, "rows": packed.rows, "pack_s": round(time.perf_counter() - begun, 1)}
    row.update(
        efficiency=round(packing.efficiency(int(lengths.sum()), packed.rows, 2048), 4), mb_before=before, mb_peak=megabytes()
    )
    for name, epoch, first in (("first", 0, 0), ("late", 2, packed.rows - 64), ("epoch_1e9", 10**9, packed.rows // 2)):
        times = []
        for number in range(50):
            begun = time.perf_counter()
            packed.some(42, epoch + number, first, first + 64)
            times.append(time.perf_counter() - begun)
        row["ms_64_rows_%s" % name] = round(1000 * sorted(times)[25], 3)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", required=True)
    parser.add_argument("--model", required=True, help="an HF folder with a tokenizer")
    parser.add_argument("--seq-len", type=int, nargs="+", default=[1024, 2048, 4096])
    parser.add_argument("--samples", type=float, nargs="+", default=[1e5, 1e6, 1e7])
    parser.add_argument("--out", help="results: OUT.json gets the rows, OUT.md the page")
    args = parser.parse_args()
    parts = {
        "records": [real(args.records, args.model, seq_len) for seq_len in args.seq_len],
        "synthetic": [synthetic(int(n)) for n in args.samples],
    }
    lines = ["# Packing", ""]
    for name, rows in parts.items():
        lines += [name, "", "| %s |" % " | ".join(rows[0]), "|" + "---|" * len(rows[0])]
        lines += ["| %s |" % " | ".join(str(value) for value in row.values()) for row in rows] + [""]
    if args.out:
        Path(args.out + ".json").write_text(json.dumps(parts, indent=1) + "\n", encoding="utf-8")
        Path(args.out + ".md").write_text("\n".join(lines), encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
