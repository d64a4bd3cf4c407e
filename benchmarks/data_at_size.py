"""Data at size: ``pipedock data`` on a large JSONL file beside ``datasets.map`` with the same tokenizer doing the same work.

    python benchmarks/data_at_size.py --model FOLDER --records RECORDS.json --mb 200 --python PYTHON --out benchmarks/results/NAME

Runs in an environment of its own that has ``datasets`` and the same transformers and tokenizers as pipedock's, which is PYTHON. The
file is made of the records' own instructions with answers put together from their paragraphs, so lengths and words are theirs and
hardly a record comes twice. Three things are run, one after another, as often as --rounds says, each in processes of its own:

    pipedock   validation, prompt and prompt + answer tokenized, learnt spans, files, hashes, packing
    same work  datasets.map, batched, num_proc = cores: chat template rendered, prompt and prompt + answer tokenized, labels
    text only  datasets.map, batched: only the rendered text tokenized; no labels, so less work than the other two

Seconds are from start to end of the command, loading included; CPU seconds are of all its processes. Memory is sampled: PSS, summed
over the command's processes (shared pages count once), and RSS, likewise summed (they count once for each process).
"""

import argparse
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CONFIG = """run: {out: OUT}
model: {path: MODEL}
parallel: {pipe: 1}
data: {train: TRAIN, seq_len: SEQ, cache: CACHE}
"""


def make(path: Path, records: str, megabytes: float) -> None:
    given = json.loads(Path(records).read_text(encoding="utf-8"))
    pieces = [piece for record in given for piece in record["output"].split("\n\n") if piece]
    chosen = random.Random(0)
    written = 0
    with path.open("w", encoding="utf-8") as file:
        while written < megabytes * 1e6:
            record = chosen.choice(given)
            count = record["output"].count("\n\n") + 1
            record = dict(record, output="\n\n".join(chosen.choice(pieces) for _ in range(count)))
            line = json.dumps(record, ensure_ascii=False) + "\n"
            file.write(line)
            written += len(line.encode("utf-8"))


def peer(path: str, model: str, processes: int, labels: bool, cache: str) -> None:
    """What a user of datasets would write; runs in a process of its own."""
    import datasets
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)

    def encode(batch):
        asked, whole = [], []
        for instruction, given, output in zip(batch["instruction"], batch["input"], batch["output"]):
            user = [{"role": "user", "content": instruction if not given else instruction + "\n\n" + given}]
            prompt = tokenizer.apply_chat_template(user, tokenize=False, add_generation_prompt=True)
            asked.append(prompt)
            whole.append(prompt + output + "<|im_end|>")
        ids = tokenizer(whole, add_special_tokens=False, return_attention_mask=False)["input_ids"]
        if not labels:
            return {"input_ids": ids}
        prompts = tokenizer(asked, add_special_tokens=False, return_attention_mask=False)["input_ids"]
        return {"input_ids": ids, "labels": [[-100] * len(p) + i[len(p) :] for p, i in zip(prompts, ids)]}

    data = datasets.load_dataset("json", data_files=path, split="train", cache_dir=cache)
    data = data.map(encode, batched=True, num_proc=processes, remove_columns=data.column_names)
    print(json.dumps({"records": len(data), "first": sum(len(i) for i in data[:1000]["input_ids"])}))


def tree(pid: int):
    """A process and all below it."""
    children = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        children.setdefault(parent, []).append(int(stat.parent.name))
    found, todo = [], [pid]
    while todo:
        found.append(todo.pop())
        todo += children.get(found[-1], [])
    return found


def memory(pid: int):
    """(PSS, RSS) in bytes, summed over the tree."""
    total = [0, 0]
    for one in tree(pid):
        try:
            lines = Path("/proc/%d/smaps_rollup" % one).read_text().splitlines()
        except OSError:
            continue
        for line in lines:
            for place, name in enumerate(("Pss:", "Rss:")):
                if line.startswith(name):
                    total[place] += int(line.split()[1]) * 1024
    return total


def measured(command, folder: Path):
    """Run a command; -> its seconds, CPU seconds, peak memory and last line."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    begun = time.monotonic()
    peak = [0, 0]
    with (folder / "out").open("wb") as out:
        running = subprocess.Popen(command, stdout=out, cwd=str(folder), env=dict(os.environ, TOKENIZERS_PARALLELISM="false"))
        done = threading.Event()

        def sample():
            while not done.wait(0.5):
                peak[:] = map(max, peak, memory(running.pid))

        watch = threading.Thread(target=sample)
        watch.start()
        code = running.wait()
        seconds = time.monotonic() - begun
        done.set()
        watch.join()
    if code:
        sys.exit("%s ended with %d" % (command, code))
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    said = json.loads((folder / "out").read_text(encoding="utf-8").strip().splitlines()[-1])
    return {
        "seconds": round(seconds, 1),
        "cpu_s": round(cpu, 1),
        "peak_pss_mb": peak[0] // 10**6,
        "peak_rss_mb": peak[1] // 10**6,
    }, said


def one(name: str, args, path: Path, folder: Path):
    size = path.stat().st_size
    shutil.rmtree(str(folder / "cache"), ignore_errors=True)
    load = os.getloadavg()[0]
    if name == "pipedock":
        values = {"OUT": folder / "run", "MODEL": args.model, "TRAIN": path, "SEQ": 2048, "CACHE": folder / "cache"}
        text = CONFIG
        for key, value in values.items():
            text = text.replace(key, str(value))
        (folder / "run.yaml").write_text(text, encoding="utf-8")
        command = [args.python, str(ROOT / "pipedock.py"), "data", "--config", "run.yaml", "--json"]
    else:
        command = [
            sys.executable,
            __file__,
            "--peer",
            name,
            "--model",
            args.model,
            "--data",
            str(path),
            "--cache",
            str(folder / "cache"),
        ]
    row, said = measured(command, folder)
    facts = {key: said[key] for key in ("records", "tokens", "packing_efficiency", "rows") if key in said}
    row.update(what=name, mb=round(size / 1e6, 1), mb_per_s=round(size / row["seconds"] / 1e6, 2),
               mb_per_cpu_s=round(size / row["cpu_s"] / 1e6, 2), load_before=round(load, 1), **facts)  # fmt: skip
    print(json.dumps(row), file=sys.stderr)
    return row


def page(rows, machine: str) -> str:
    lines = ["# Data at size", "", machine, "", "| what | MB | s | MB/s | CPU s | MB per CPU s | PSS, MB | RSS, MB | load |",
             "|---|---|---|---|---|---|---|---|---|"]  # fmt: skip
    keys = ("what", "mb", "seconds", "mb_per_s", "cpu_s", "mb_per_cpu_s", "peak_pss_mb", "peak_rss_mb", "load_before")
    return "\n".join(lines + ["| %s |" % " | ".join(str(row[key]) for key in keys) for row in rows]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="an HF folder whose chat template ends turns with <|im_end|>")
    parser.add_argument("--records", help="a JSON list of alpaca records")
    parser.add_argument("--mb", type=float, default=5000)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--only", default="pipedock,same work,text only")
    parser.add_argument("--python", default=sys.executable, help="the Python that has pipedock's packages")
    parser.add_argument("--out", help="results: OUT.json gets the rows, OUT.md the page")
    parser.add_argument("--note", default="", help="about the machine, for the page")
    parser.add_argument("--data", help="an existing file instead of a made one")
    parser.add_argument("--peer", help=argparse.SUPPRESS)
    parser.add_argument("--cache", help=argparse.SUPPRESS)
    args = parser.parse_args()
    processes = len(os.sched_getaffinity(0))
    if args.peer:
        peer(args.data, args.model, processes, args.peer == "same work", args.cache)
        return
    with tempfile.TemporaryDirectory(prefix="data-at-size-") as scratch:
        folder = Path(scratch)
        path = Path(args.data).resolve() if args.data else folder / "data.jsonl"
        if not args.data:
            make(path, args.records, args.mb)
        rows = [one(name, args, path, folder) for _ in range(args.rounds) for name in args.only.split(",")]
    machine = "%d cores. %s" % (processes, args.note)
    if args.out:
        Path(args.out + ".json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
        Path(args.out + ".md").write_text(page(rows, machine), encoding="utf-8")
    print(page(rows, machine))


if __name__ == "__main__":
    main()
