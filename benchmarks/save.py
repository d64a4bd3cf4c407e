"""What a save costs: how long training waits, and how fast the bytes come to the disk, beside cp of the same bytes.

    python benchmarks/save.py                                   # one GPU: 8 blocks of hidden 2048, bf16
    python benchmarks/save.py --hidden 512 --blocks 4           # a CPU

Trains through ``pipedock train`` with train.async_save true and false in turns, saves after every ``--every`` steps, and after
each run copies its last checkpoint with cp and fsyncs the copy. Then the writer alone on 256 MiB: ours, which hashes what it
writes, and the safetensors library's save_file with a second reading for the hash; cpu_s is what a busy machine does not change.

Prints one JSON row per save, copy and file; the medians go to stderr. step_s and step_s_beside_a_save: the medians of the steps
during which no save was under way, and of the others.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Callable, Dict, List, Set

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import small_llama  # noqa: E402
from pipeline_train import metrics  # noqa: E402


def prepare(folder: Path, args: argparse.Namespace) -> None:
    """A small llama, what it learns, and run.yaml."""
    small_llama.write(folder, args.hidden, args.blocks, args.seq_len, 4 * args.steps * args.rows)
    run = {
        "run": {"out": "-", "self_test": False}, "model": {"path": str(folder / "model"), "init": "random"},
        "data": {"train": str(folder / "train.jsonl"), "seq_len": args.seq_len},
        "parallel": {"pipe": args.pipe, "data": args.data}, "batch": {"global": args.rows},
        "train": {"max_steps": args.steps, "epochs": 9, "save_every": args.every, "keep": 1},
    }  # fmt: skip
    (folder / "run.yaml").write_text(json.dumps(run))


def train(folder: Path, behind: bool) -> List[Dict[str, Any]]:
    """-> a row per save."""
    out = folder / "out"
    code = "import sys; sys.path.insert(0, %r); import pipedock; sys.exit(pipedock.main())" % str(ROOT)
    command = [sys.executable, "-c", code, "train", "--config", str(folder / "run.yaml"), "--set", "run.out=%s" % out]
    subprocess.run(command + ["--set", "train.async_save=%s" % str(behind).lower()], check=True, stdout=subprocess.DEVNULL)
    lines = metrics.read(out / "metrics.jsonl")
    steps = [line for line in lines if line["kind"] == "step"]
    busy: Set[int] = set()
    under_way = 0
    for line in lines:  # a save's line comes when it is complete
        if line["kind"] == "save":
            busy.update(range(line["step"] + 1, under_way + 1))
        elif line["kind"] == "step":
            under_way = line["step"]
    seconds = {name: [s["step_s"] for s in steps[1:] if (s["step"] in busy) == wanted] for name, wanted in
               (("step_s", False), ("step_s_beside_a_save", True))}  # fmt: skip
    size = sum(path.stat().st_size for path in newest(out).iterdir())
    return [
        dict(
            what="save", asynchronous=line["asynchronous"], step=line["step"], gib=round(size / 2**30, 3), seconds=line["seconds"],
            stall_s=line["stall_s"], mb_per_s=round(size / 1e6 / line["seconds"], 1),
            **{name: round(statistics.median(values), 4) if values else None for name, values in seconds.items()},
        )
        for line in lines if line["kind"] == "save"
    ]  # fmt: skip


def newest(out: Path) -> Path:
    return sorted((out / "checkpoints").glob("step_*"))[-1]


def copy(folder: Path) -> Dict[str, Any]:
    """cp and fsync of the newest checkpoint."""
    source, target = newest(folder / "out"), folder / "copy"
    size = sum(path.stat().st_size for path in source.iterdir())
    began = time.perf_counter()
    subprocess.run(["cp", "-r", str(source), str(target)], check=True)
    subprocess.run(["sync"] + [str(path) for path in target.iterdir()], check=True)
    seconds = time.perf_counter() - began
    shutil.rmtree(str(target))
    return {"what": "cp", "gib": round(size / 2**30, 3), "seconds": round(seconds, 3), "mb_per_s": round(size / 1e6 / seconds, 1)}


def writers(folder: Path) -> List[Dict[str, Any]]:
    """One file of sixteen tensors, on disk and hashed."""
    import torch
    from safetensors.torch import save_file

    from pipeline_train import checkpoint_folder, manifest
    from pipeline_train.weights.writing import write_file

    def theirs(path: Path, tensors: Dict[str, Any]) -> None:
        save_file(tensors, str(path))
        checkpoint_folder.sync(path)
        manifest.file_entry(path)

    tensors = {"t%d" % n: torch.randn(4096, 1024) for n in range(16)}
    rows: List[Dict[str, Any]] = []
    ways: Dict[str, Callable[[Path, Dict[str, Any]], Any]] = {"writer": write_file, "save_file and hash": theirs}
    for name, write in list(ways.items()) * 3:
        wall, cpu = time.perf_counter(), time.process_time()
        write(folder / "x.safetensors", tensors)
        seconds = (round(time.perf_counter() - wall, 3), round(time.process_time() - cpu, 3))
        rows.append({"what": name, "gib": 0.25, "seconds": seconds[0], "cpu_s": seconds[1]})
    return rows


def median(rows: List[Dict[str, Any]], key: str) -> float:
    return statistics.median(row[key] for row in rows if row[key] is not None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("hidden", 2048), ("blocks", 8), ("seq-len", 512), ("rows", 8), ("steps", 12), ("every", 4), ("pipe", 1),
                        ("data", 1), ("rounds", 2)):  # fmt: skip
        parser.add_argument("--" + name, type=int, default=value)
    parser.add_argument("--folder", help="where to write; the disk that is measured (default: the temporary folder)")
    args = parser.parse_args()
    rows: List[Dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        prepare(folder, args)
        for _ in range(args.rounds):
            for behind in (True, False):
                rows += train(folder, behind)
                rows.append(copy(folder))
                shutil.rmtree(str(folder / "out"))
        rows += writers(folder)
    for row in rows:
        print(json.dumps(row), flush=True)
    saves = [row for row in rows if row["what"] == "save" and row["step"] < args.steps]  # the run waits for its last one
    for behind in (True, False):
        mine = [row for row in saves if row["asynchronous"] == behind]
        if mine:
            figures = "stall %.3f s, on disk after %.3f s, %.0f MB/s"
            figures %= tuple(median(mine, key) for key in ("stall_s", "seconds", "mb_per_s"))
            print("async_save %-5s  %s" % (str(behind).lower(), figures), file=sys.stderr)
    for name in ("writer", "save_file and hash"):
        mine = [row for row in rows if row["what"] == name]
        print(
            "%-18s 0.25 GiB in %.3f s, %.3f s of a core" % (name, median(mine, "seconds"), median(mine, "cpu_s")), file=sys.stderr
        )
    copies = [row for row in rows if row["what"] == "cp"]
    print("cp and fsync      %.3f s, %.0f MB/s; %.2f GiB, %d cores, load %.1f" % (
        median(copies, "seconds"), median(copies, "mb_per_s"), copies[0]["gib"], os.cpu_count() or 0,
        os.getloadavg()[0]),
        file=sys.stderr)  # fmt: skip


if __name__ == "__main__":
    main()
