"""The export that all ranks write together, beside the one made from a checkpoint, and cp of the same files.

    python benchmarks/export_from_ranks.py --ranks 2 --blocks 32 --dir /scratch --json rows.json           # GPUs
    python benchmarks/export_from_ranks.py --ranks 2 --blocks 2 --cpu                                      # CPU processes

A llama or bloom of the 7B geometry with --blocks blocks and random fp32 master weights, on --ranks stages x replicas (--data); its
bf16 export, --runs times, each fsynced; then the same export by to_hf from a checkpoint of these weights (layer files only, no
moments), and cp -r with sync. --verify proves it as well. Needs at most 4 (checkpoint) + 3 x 2 (exports) bytes per parameter below
--dir. Rows as JSON: {what, seconds, gb, gb_per_s, ...}; what was read lies in the page cache as far as that goes.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

GEOMETRY = {
    "llama": {"model_type": "llama", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008,
              "num_attention_heads": 32, "tie_word_embeddings": False},
    "bloom": {"model_type": "bloom", "vocab_size": 250880, "hidden_size": 4096, "n_head": 32, "hidden_dropout": 0.0,
              "attention_dropout": 0.0},
}  # fmt: skip
BLOCKS = {"llama": "num_hidden_layers", "bloom": "n_layer"}


def rank_main(task):
    """One rank: its stage with random master weights, the exports, then a checkpoint."""
    import torch

    from export import from_ranks
    from export.measure import peak_gib
    from pipeline_train import checkpoint, config, engine, families, manifest, masters
    from pipeline_train.leaving import leave
    from pipeline_train.plan import bounds
    from pipeline_train.weights.writing import write_file

    work, rank = Path(task["work"]), int(os.environ["RANK"])
    engine.connect(not task["cpu"], rank)
    run = config.parse({
        "run": {"out": "unused"}, "model": {"path": str(work / "run/resolved/model"), "dtype": "bf16"},
        "data": {"train": "unused", "seq_len": 128}, "parallel": {"pipe": task["pipe"], "data": task["data"]},
        "batch": {"micro": 1, "global": task["data"]},
    })  # fmt: skip
    dims = families.dims_of(families.read_config(run.model.path))
    pipe = engine.Pipeline(run, dims, bounds(dims, run.parallel.pipe, "auto", 128), cuda=not task["cpu"])
    for group in pipe.groups:
        group["params"][0].detach().normal_(0.0, 0.02)
    checkpoint.settle_ties(pipe)
    rows = []
    for _ in range(task["runs"]):
        shutil.rmtree(str(work / "run/.model.partial"), ignore_errors=True)
        torch.distributed.barrier()
        idle = peak_gib()
        written = from_ranks.write_to(pipe, str(work / "run/model"), "hf", "5GB")
        more = torch.tensor(peak_gib() - idle, device="cuda" if pipe.cuda else "cpu")
        torch.distributed.all_reduce(more, op=torch.distributed.ReduceOp.MAX)
        rows.append(dict(written, rank_host_gib_more=round(float(more), 2)))
    folder = work / "run/checkpoints/step_000001"
    folder.mkdir(parents=True, exist_ok=True)
    began, files = time.perf_counter(), {}
    for layer in pipe.stage.layers:
        wanted = layer % task["data"] == pipe.data_rank
        tensors = {name: pipe.read_whole(p, None, wanted) for name, p in masters.named(pipe, layer).items()}
        if wanted:
            files[manifest.layer_file(layer)] = write_file(folder / manifest.layer_file(layer), tensors)
        del tensors
    everyone = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, files)
    if rank == 0:
        shutil.copyfile(run.model.path + "/config.json", str(folder / "config.json"))
        files = {name: entry for part in everyone for name, entry in part.items()}
        files["config.json"] = manifest.file_entry(folder / "config.json")
        manifest.write(folder, {
            "format": manifest.FORMAT, "kind": "checkpoint", "family": dims.family, "tied": dims.tied, "layers": dims.layers,
            "step": 1, "run_name": None, "run_dtype": "bf16", "layer_dtype": "fp32", "files": files, "versions": {}, "training": {},
        })  # fmt: skip
        saved = round(time.perf_counter() - began, 2)
        device = torch.cuda.get_device_name() if pipe.cuda else "cpu"
        (work / "written.json").write_text(json.dumps({"rows": rows, "checkpoint_s": saved, "device": device}))
    torch.distributed.barrier()
    leave()


def launch(task, world):
    env = dict(os.environ, WORLD_SIZE=str(world), LOCAL_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT="29713")
    env.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // world)))
    if task["cpu"]:
        env["DS_ACCELERATOR"] = "cpu"
    command = [sys.executable, __file__, "--rank", json.dumps(task)]
    ranks = [subprocess.Popen(command, env=dict(env, RANK=str(r), LOCAL_RANK=str(r)), stdout=sys.stderr) for r in range(world)]
    try:
        while any(rank.poll() is None for rank in ranks):
            if any(rank.poll() for rank in ranks):
                break
            time.sleep(0.2)
    finally:
        for rank in ranks:
            rank.kill()
    if any(rank.wait() for rank in ranks):
        raise SystemExit("a rank failed")


def bench(work, args):
    from export import from_ranks
    from export.to_hf import to_hf

    model = work / "run/resolved/model"
    model.mkdir(parents=True)
    (model / "config.json").write_text(json.dumps(dict(GEOMETRY[args.family], **{BLOCKS[args.family]: args.blocks})))
    task = {"work": str(work), "cpu": args.cpu, "pipe": args.ranks // args.data, "data": args.data, "runs": args.runs}
    launch(task, args.ranks)
    done, export, step = json.loads((work / "written.json").read_text()), work / "run/model", work / "run/checkpoints/step_000001"
    what = {"family": args.family, "blocks": args.blocks, "pipe": task["pipe"], "data": args.data, "device": done["device"],
            "cpus": os.cpu_count()}  # fmt: skip
    rows = []

    def add(name, seconds, nbytes, **more):
        rows.append(dict(what, what=name, seconds=round(seconds, 2), gb=round(nbytes / 1e9, 2),
                         gb_per_s=round(nbytes / 1e9 / seconds, 3), **more))  # fmt: skip
        print(json.dumps(rows[-1]), flush=True)
        if args.json:
            Path(args.json).write_text("".join(json.dumps(row) + "\n" for row in rows))

    for row in done["rows"]:
        add("from the ranks", row["seconds"], row["bytes"], rank_host_gib_more=row["rank_host_gib_more"])
    began = time.perf_counter()
    from_ranks.complete(str(step), str(export), "hf")
    add("from the ranks: what lies beside the weights", time.perf_counter() - began, 0)
    nbytes = done["rows"][0]["bytes"]
    began = time.perf_counter()
    subprocess.run(["cp", "-r", str(export), str(work / "copy")], check=True)
    os.sync()
    add("cp", time.perf_counter() - began, nbytes)
    shutil.rmtree(str(work / "copy"))
    began = time.perf_counter()
    made = to_hf(str(step), str(work / "offline"))
    add("to_hf", time.perf_counter() - began, nbytes, checkpoint_s=done["checkpoint_s"])
    began, files = time.perf_counter(), sorted((work / "offline").glob("*.safetensors"))
    differing = [p.name for p in files if subprocess.run(["cmp", "-s", str(p), str(export / p.name)]).returncode]
    add("compared byte by byte", time.perf_counter() - began, nbytes, shards=made["shards"], differing=differing)
    shutil.rmtree(str(work / "offline"))
    if args.verify:
        from export.verify import verify

        proof = verify(str(step), str(export))
        add("verify", proof["seconds"], nbytes, holds=proof["holds"], relative=proof["logits"]["relative"])
    return 1 if differing else 0


def main():
    if sys.argv[1:2] == ["--rank"]:
        rank_main(json.loads(sys.argv[2]))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--family", choices=sorted(GEOMETRY), default="llama")
    parser.add_argument("--blocks", type=int, default=32)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--data", type=int, default=1, help="replicas, of these ranks")
    parser.add_argument("--runs", type=int, default=2)
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--verify", action="store_true")
    parser.add_argument("--dir", help="where to work (default: the temporary folder)")
    parser.add_argument("--json", help="rows go there as they come")
    args = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="export-", dir=args.dir))
    try:
        return bench(work, args)
    finally:
        shutil.rmtree(str(work))


if __name__ == "__main__":
    sys.exit(main())
