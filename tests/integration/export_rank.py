"""One rank of a real pipeline that trains, saves and exports, case after case; run by test_export_from_ranks.py.

Reads FOLDER/cases.json: [{"name", "run": <run.yaml as a dictionary>, "exports": [[target, shard size], ...]}, ...]. Leaves
FOLDER/<name>/checkpoints, rank 0's FOLDER/<name>/written.json, and what from_ranks.write_to leaves for
FOLDER/<name>/untrained/model, before the first step, and for FOLDER/<name>/<target>-<shard size>/model.
"""

import json
import os
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

STEPS = 2


def run_case(case, folder):
    import torch.distributed

    from export import from_ranks
    from pipeline_train import checkpoint, config, engine, families, selftest
    from pipeline_train.plan import bounds

    run = config.parse(case["run"])
    dims = families.dims_of(families.read_config(run.model.path))
    edges = bounds(dims, run.parallel.pipe, run.parallel.parts, run.data.seq_len)
    pipe = engine.Pipeline(run, dims, edges, cuda=False)
    checkpoint.start(pipe)
    from_ranks.write_to(pipe, str(folder / "untrained" / "model"), "hf", "70KB")

    def rows_of(step):
        return selftest.make_rows(step, run.rows_per_step, run.data.seq_len, dims.vocab, run.data.pack)

    selftest.piped(pipe, rows_of, STEPS)
    for group in pipe.groups:  # what rounding and adding zeros may treat otherwise
        flat = group["params"][0].detach()
        flat[::7], flat[::11], flat[::13] = -0.0, -1e-40, 70000.0
    if torch.distributed.get_rank() == 0:
        shutil.copytree(run.model.path, str(folder / "resolved" / "model"))
    torch.distributed.barrier()
    saver = checkpoint.Saver(pipe, folder, {})
    saver.save(STEPS)
    saver.finish()
    written = [
        from_ranks.write_to(pipe, str(folder / ("%s-%s" % (target, size)) / "model"), target, size)
        for target, size in case["exports"]
    ]
    if torch.distributed.get_rank() == 0:
        (folder / "written.json").write_text(json.dumps(written))


def main():
    import torch.distributed

    from pipeline_train import engine
    from pipeline_train.worker import leave

    folder = Path(sys.argv[1])
    engine.connect(False, int(os.environ["RANK"]))
    for case in json.loads((folder / "cases.json").read_text()):
        run_case(case, folder / case["name"])
    torch.distributed.barrier()
    leave()


if __name__ == "__main__":
    main()
