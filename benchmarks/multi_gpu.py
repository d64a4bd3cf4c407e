"""A pipeline over all GPUs of one machine against ZeRO-3 and FSDP2, and the rest of the road on them.

    python benchmarks/multi_gpu.py --output rows.json                  # everything; a rehearsal on CPU processes: --cpu 2
    python benchmarks/multi_gpu.py --output rows.json --only llama     # several parts: llama:pipeline+fsdp2,road:killed+speed
    python benchmarks/multi_gpu.py --output rows.json --minutes 9      # what does not fit into the time is said and left out
    ... --only llama:zero3 --cases '{"zero3": [{"seq": 2048, "micro": 4, "recompute": "none"}]}'

llama and bloom: 7B geometry, random weights, bf16, a step of 128 rows of 1024 and of 2048 tokens. The pipeline is P = all GPUs with
D = 1 (pipeline, and pipeline-fp8 with run.fp8), and P = half of them with D = 2 (pipeline2). Each is tuned first on a quarter of
the rows (multi_gpu_cases.py): the peers over micro-batches, with and without recomputation, FSDP2 also with weights kept whole
during a step, and with every block through torch.compile (fsdp2-compiled); the pipeline over what its plan lets in. The best is
then measured on the whole step, and weights kept whole at once: they pay once a step. --cases names the cases of an engine instead
(what an earlier call found to be best); rows, where a case names none, are those of a whole step. What is tuned are 7B; llama-13b
is measured as well, with --cases that let in what such a card can hold. All of it runs in
multi_gpu_rank.py, which says what the peers are; road is multi_gpu_road.py.
"""

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from bench import shapes  # noqa: E402
from benchmarks import multi_gpu_cases, multi_gpu_road  # noqa: E402

SMALL = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 4, "n_layer": 4,
         "num_attention_heads": 4, "n_head": 4}  # fmt: skip
SILENT_S = 150.0  # between two rows


class Bench:
    """``gpus`` ranks at a time, rows into ``output``."""

    def __init__(self, gpus, output, minutes, cpu):
        self.gpus, self.output, self.cpu = gpus, output, cpu
        self.deadline = time.monotonic() + 60 * minutes
        self.rows = []
        self.port = 29600

    @property
    def left(self):
        return self.deadline - time.monotonic()

    def add(self, row):
        self.rows.append(row)
        self.output.write_text(json.dumps(self.rows, indent=1) + "\n", encoding="utf-8")
        print(shown(row), flush=True)

    def model(self, family):
        known = shapes.model_of(multi_gpu_cases.MODELS[family])
        return {key: SMALL.get(key, value) for key, value in known.items()} if self.cpu else known

    def train(self, engine, family, cases, until_failure=False, positions=4096, **task):
        """-> the rows of the cases, in order; after a failure the others go on in new processes, but for the hopeless ones."""
        model = self.model(family)
        if model["model_type"] == "llama":
            model["max_position_embeddings"] = positions
        task.update(engine=engine, family=family, model=model, cases=list(cases))
        found = []
        while task["cases"]:
            if self.left < 45:
                self.add({"engine": engine, "family": family, "skipped": len(task["cases"]), "error": "no time left"})
                break
            # An engine of DeepSpeed's never gives its memory back: one process for each.
            cases = task["cases"][:1] if engine == "pipeline" else task["cases"]
            new = self._ranks(dict(task, cases=cases, known=found))
            found += new
            task["cases"] = multi_gpu_cases.worthwhile(found, task["cases"][len(new) :])
            if until_failure and "error" in new[-1]:
                break
        return found

    def _ranks(self, task):
        """One set of processes, until they have done all cases or one has failed; -> a row for each case tried."""
        self.port += 1
        rows, processes = [], []
        for rank in range(self.gpus):
            env = dict(os.environ, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(self.gpus), MASTER_ADDR="127.0.0.1",
                       MASTER_PORT=str(self.port), OMP_NUM_THREADS="8")  # fmt: skip
            if self.cpu:
                env.update(DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1")
            log = open(str(self.output) + ".rank%d.log" % rank, "a")
            command = [sys.executable, str(ROOT / "benchmarks" / "multi_gpu_rank.py"), json.dumps(task)]
            processes.append(
                subprocess.Popen(command, env=env, stdout=subprocess.PIPE if rank == 0 else log, stderr=log, text=True)
            )
        last, ended = [time.monotonic()], threading.Event()

        def watch():
            while not ended.wait(1.0):
                dead = any(process.poll() not in (None, 0) for process in processes)
                if dead or time.monotonic() - last[0] > SILENT_S or self.left < 0:
                    time.sleep(2.0 if dead else 0.0)
                    for process in processes:
                        process.kill()
                    return

        threading.Thread(target=watch, daemon=True).start()
        for line in processes[0].stdout:
            if line.startswith("{"):
                last[0] = time.monotonic()
                rows.append(json.loads(line))
                self.add(rows[-1])
        for process in processes:
            process.wait()
        ended.set()
        if len(rows) < len(task["cases"]) and not (rows and "error" in rows[-1]):
            failed = task["cases"][len(rows)]
            who = {"engine": task["engine"], "family": task["family"]}
            rows.append(dict(failed, error="ended or silent, see the log", **who))
            self.add(rows[-1])
        return rows


def shown(row):
    if "what" in row:
        return json.dumps(row)
    what = "%-8s %-5s" % (row.get("engine"), row.get("family"))
    what += "".join(
        " %s %s" % (key, row[key]) for key in ("seq", "data", "micro", "recompute", "keep", "compile", "fp8", "rows") if key in row
    )
    if "error" in row:
        return "%s: %s" % (what, row["error"])
    plan = ["%.1f" % rank["plan_gib"] for rank in row["ranks"] if "plan_gib" in rank]
    return "%s: %.0f tokens/s, MFU %s, step %.2f s, GiB %s%s, built in %.0f s" % (
        what, row["tokens_per_s"], "%.3f" % row["mfu"] if row["mfu"] else "-", row["step_s"], row["gib"],
        " (plan %s)" % ", ".join(plan) if plan else "", row["built_s"],
    )  # fmt: skip


def compare(bench, family, batch, seqs, wanted, given):
    """The ``wanted`` engines in turn: tuned on a quarter of the rows, then the best on all of them; or the ``given`` cases."""
    for engine in wanted:
        cases = given.get(engine) or multi_gpu_cases.tuning(engine, *seqs, batch, bench.gpus)
        positions = max([4096] + [case["seq"] for case in cases])
        engine = "pipeline" if engine in multi_gpu_cases.OURS else engine
        bench.train(engine, family, cases, batch=batch, steps=1, positions=positions)


def longest(bench, family, batch):
    """How long a row may be before memory ends, one row a micro-batch, blocks recomputed: the peers' lengths in turn (the first one
    only makes their optimizer's state), then the pipeline from the first that they both could not do. Its rows are of several
    documents, because attention to a whole row takes minutes; memory does not depend on it."""
    seqs = (64, 128, 256) if bench.cpu else (8192, 65536, 131072, 163840)
    case = {"micro": 1, "recompute": "blocks", "rows": batch, "steps": 1}
    reached = seqs[0]
    for engine in ("fsdp2", "zero3"):
        cases = [dict(case, seq=seq, warm=seq > seqs[0]) for seq in seqs]
        rows = bench.train(engine, family, cases, batch=batch, steps=1, until_failure=True, positions=seqs[-1])
        reached = max([reached] + [row["seq"] for row in rows if "tokens_per_s" in row])
    cases = []
    for seq in [seq for seq in seqs if seq > reached] or [2 * seqs[-1]]:
        document = min(16384, seq // 4)
        cases.append(dict(case, seq=seq, warm=True, data=1, compile=True, documents=[[document, document]] * (seq // document)))
    bench.train("pipeline", family, cases, batch=batch, steps=1, until_failure=True, positions=cases[-1]["seq"])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", required=True, type=Path, help="rows as JSON, as they come; logs and road/ are made beside it")
    parser.add_argument(
        "--only", type=multi_gpu_cases.parts, default="llama,bloom,road,longest-llama", metavar="PARTS",
        help="in this order: %(default)s; of one its own parts, such as llama:pipeline+fsdp2 or road:killed+speed",
    )  # fmt: skip
    parser.add_argument("--minutes", type=float, default=25.0, help="what does not begin before is left out; default %(default)s")
    parser.add_argument("--cases", type=multi_gpu_cases.given, default={}, help="of an engine, as JSON, instead of tuning it")
    parser.add_argument("--cpu", type=int, metavar="N", help="a rehearsal: tiny models on N CPU processes")
    args = parser.parse_args()
    if args.cpu is None:
        import torch

        gpus = torch.cuda.device_count()
    else:
        gpus = args.cpu
    if gpus < 2:
        parser.error("a pipeline needs two GPUs, here are %d; a rehearsal on CPU processes: --cpu 2" % gpus)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    bench = Bench(gpus, args.output, args.minutes, args.cpu is not None)
    for name, wanted in args.only:
        if name == "road":
            multi_gpu_road.road(bench, wanted or multi_gpu_road.PARTS)
        elif name.startswith("longest-"):
            longest(bench, name[len("longest-") :], 2)
        else:
            seqs = (64, 128) if bench.cpu else (1024, 2048)
            compare(bench, name, 64 if bench.cpu else 128, seqs, wanted or multi_gpu_cases.ENGINES, args.cases)
    return int(not any("error" not in row and "failed" not in row for row in bench.rows))


if __name__ == "__main__":
    sys.exit(main())
