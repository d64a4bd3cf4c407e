"""The rest of the road on several GPUs, for multi_gpu.py: the commands a user types, on a cut of the 7B llama (two blocks, or as
many as stages less two), with figures. Rows: {what, ...}.

losses    20 steps on all GPUs as a pipeline, and on one GPU: the largest relative difference of a step's loss
killed    a rank killed with SIGKILL at step 12 of 20: seconds until the command has ended, its exit code and last line; then
          --resume: the largest relative difference of a step's loss from the unkilled run's, before and behind the checkpoint
export    the export of all ranks at the end of the training, its proof
generate  DeepSpeed's tensor-parallel generation on two GPUs and on one, fp32, greedy: whether the texts are equal
speed     export_from_ranks.py: the export of all ranks at 7B
"""

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
STEPS = 20
PARTS = ("losses", "killed", "generate", "speed")
PROMPTS = ["red green blue", "the number of one is", "two three and the answer"]


def road(bench, parts):
    """losses and killed at the same time, the rest one after another."""
    if bench.left <= 0:
        bench.add({"what": "road", "error": "no time left"})
        return
    work = bench.output.resolve().parent / "road"
    work.mkdir(parents=True, exist_ok=True)
    blocks = max(2, bench.gpus - 2)
    make(work, blocks, 128 if bench.cpu else 4096)
    environment = dict(os.environ, OMP_NUM_THREADS="1") if bench.cpu else dict(os.environ)
    if bench.cpu:
        environment["DS_ACCELERATOR"] = "cpu"
    with ThreadPoolExecutor() as pool:
        names = [name for name in ("all", "one") if "losses" in parts]
        if "killed" in parts and "all" not in names:
            names.append("all")  # what the resumed run is held against
        runs = {name: pool.submit(trained, bench, work, environment, name) for name in names}
        row = pool.submit(killed, bench, work, environment) if "killed" in parts else None
    whole = runs["all"].result() if "all" in runs else {}
    if "losses" in parts:
        losses(bench, runs["all"].result(), runs["one"].result())
    if row:
        bench.add(dict(row.result(), **apart(work / "killed", whole) if not row.result()["resumed"] else {}))
    if "generate" in parts:
        generate(bench, work, environment)
    if "speed" in parts:
        speed(bench, work, environment)


def make(work, blocks, hidden):
    sys.path.insert(0, str(ROOT))
    from benchmarks import small_llama

    small_llama.write(work, hidden, blocks, 512 if hidden > 128 else 64, 400)


def settings(bench, work, name, pipe):
    """run.yaml of a training run; -> its path."""
    long = 64 if bench.cpu else 512
    document = {
        "run": {"name": name, "out": str(work / name), "self_test": False},
        "model": {"path": str(work / "model"), "init": "random", "dtype": "fp32" if bench.cpu else "bf16"},
        "data": {"train": str(work / "train.jsonl"), "seq_len": long}, "parallel": {"pipe": pipe},
        "batch": {"micro": 2, "global": 16}, "optim": {"lr": 1e-4},
        "train": {"max_steps": STEPS, "epochs": 50, "save_every": 10, "keep": 2, "async_save": False},
    }  # fmt: skip
    if name == "all":
        document["export"] = {"dir": str(work / "export")}
    path = work / ("%s.yaml" % name)
    path.write_text(json.dumps(document))  # JSON is YAML
    return path


def command(*words):
    return [sys.executable, str(ROOT / "pipedock.py")] + [str(word) for word in words]


def ended(done):
    return (done.stderr.strip().splitlines() or [""])[-1]


def steps_of(out):
    """step -> loss, of the last time it was done."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines() if line.endswith("}")]
    return {line["step"]: line["loss"] for line in lines if line["kind"] == "step"}


def farthest(a, b, steps):
    missing = [step for step in steps if step not in a or step not in b]
    return None if missing else max(abs(a[step] - b[step]) / abs(b[step]) for step in steps)


def trained(bench, work, environment, name):
    """The run on all GPUs or on one; -> {pipe, code, seconds, last: the last line, steps: losses}."""
    pipe, began = bench.gpus if name == "all" else 1, time.monotonic()
    words = command("train", "--config", settings(bench, work, name, pipe))
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    row = {"pipe": pipe, "code": done.returncode, "seconds": round(time.monotonic() - began, 1), "last": ended(done)}
    if done.returncode:
        bench.add({"what": "run", "failed": name, "stderr": done.stderr[-2000:], **row})
        return row
    if name == "all":
        proof = json.loads((work / "export" / "proof.json").read_text())
        said = [line for line in done.stderr.splitlines() if "GB/s" in line]
        bench.add({"what": "export", "proved": proof["holds"], "said": said[-3:]})
    return dict(row, steps=steps_of(work / name))


def apart(out, whole):
    """Of a killed and resumed run from the unkilled one, up to the checkpoint that it went on from, and behind: two runs on GPUs
    may differ without any kill."""
    if "steps" not in whole:
        return {}
    steps, half = steps_of(out), STEPS // 2
    return {"before_the_kill": farthest(steps, whole["steps"], range(1, half + 1)),
            "resumed_steps": farthest(steps, whole["steps"], range(half + 1, STEPS + 1))}  # fmt: skip


def losses(bench, whole, one):
    if "steps" in whole and "steps" in one:
        a, b = whole["steps"], one["steps"]
        runs = [{key: value for key, value in run.items() if key != "steps"} for run in (whole, one)]
        bench.add({"what": "losses", "runs": runs, "first": a[1], "last": a[STEPS], "farthest": farthest(a, b, a)})


def killed(bench, work, environment):
    path, out = settings(bench, work, "killed", bench.gpus), work / "killed"
    process = subprocess.Popen(command("train", "--config", path), env=environment, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not ((out / "metrics.jsonl").is_file() and max(steps_of(out), default=0) >= 12):
        time.sleep(0.02)
    victim = subprocess.run(["pgrep", "-P", str(process.pid), "-f", "pipeline_train.worker"], capture_output=True, text=True)
    ranks = [int(number) for number in victim.stdout.split()]
    began = time.monotonic()
    if ranks:
        os.kill(ranks[-1], signal.SIGKILL)
    stderr = process.communicate()[1]
    row = {"what": "killed", "ranks": len(ranks), "seconds": round(time.monotonic() - began, 2), "code": process.returncode,
           "last": (stderr.strip().splitlines() or [""])[-1], "steps": max(steps_of(out), default=0)}  # fmt: skip
    words = command("train", "--config", path, "--resume")
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    return dict(row, resumed=done.returncode, resumed_last=ended(done))


def generate(bench, work, environment):
    texts, row = {}, {"what": "generate"}
    (work / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    for number in (2, 1):
        launcher = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc_per_node",
            str(number),
            "--master_port",
            str(29700 + number),
        ]
        done = subprocess.run(
            launcher + ["-m", "serve.ds_generate", "--model", str(work / "export"), "--prompts", str(work / "prompts.txt"),
                        "--max-new-tokens", "24", "--dtype", "fp32"],
            env=environment, capture_output=True, text=True, check=False, cwd=str(ROOT),
        )  # fmt: skip
        rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
        texts[number] = [one["ids"] for one in rows]
        row["gpus %d" % number] = {
            "code": done.returncode,
            "prompts": len(rows),
            "tokens_per_s": [one["tokens_per_s"] for one in rows],
        }
        if done.returncode:
            row["stderr"] = done.stderr[-1500:]
    bench.add(dict(row, equal=bool(texts[1]) and texts[1] == texts[2]))


def speed(bench, work, environment):
    if bench.left < 60:
        bench.add({"what": "export speed", "error": "no time left"})
        return
    path = work / "export.json"
    words = [sys.executable, str(ROOT / "benchmarks" / "export_from_ranks.py"), "--ranks", str(bench.gpus), "--runs", "1", "--dir",
             str(work), "--json", str(path), "--blocks", "2" if bench.cpu else "32"] + (["--cpu"] if bench.cpu else [])  # fmt: skip
    row = {"what": "export speed"}
    try:
        done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=bench.left, check=False)
        row.update(code=done.returncode, last=ended(done))
    except subprocess.TimeoutExpired:
        row["error"] = "no time left"
    rows = path.read_text().splitlines() if path.is_file() else []
    bench.add(dict(row, rows=[json.loads(line) for line in rows]))
