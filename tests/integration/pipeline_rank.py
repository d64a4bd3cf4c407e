"""One rank of a real DeepSpeed pipeline that works through a list of cases; run by test_train_equals_hf.py.

Reads FOLDER/cases.json: [{"name", "run": <run.yaml as a dictionary>, "steps", "offload"}, ...]. Leaves FOLDER/<name>.<rank>.pt: what
selftest.piped measures, the evaluated loss and, for each layer of the rank, every parameter's final weight as a whole tensor.
"""

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from pipeline_train.selftest import make_rows  # noqa: E402

EVALUATED = 1000  # the step whose rows are evaluated at the end


def run_case(case, folder, rank):
    import torch

    from pipeline_train import checkpoint, config, engine, families, selftest
    from pipeline_train.loop import micro_batches
    from pipeline_train.plan import bounds

    if case["offload"] == "torch":
        os.environ["CXX"] = "/no/compiler"
    else:
        os.environ.pop("CXX", None)
    run = config.parse(case["run"])
    dims = families.dims_of(families.read_config(run.model.path))
    edges = bounds(dims, run.parallel.pipe, run.parallel.parts, run.data.seq_len)
    pipe = engine.Pipeline(run, dims, edges, cuda=False)
    checkpoint.start(pipe)
    if case["offload"]:
        module = type(pipe.base_optimizer).__module__
        assert module.startswith("deepspeed.") == (case["offload"] == "deepspeed"), module

    def rows_of(step):
        return make_rows(step, run.rows_per_step, run.data.seq_len, dims.vocab, run.data.pack)

    result = selftest.piped(pipe, rows_of, case["steps"])
    rows = rows_of(EVALUATED)
    batches = micro_batches(rows, run.batch.micro, pipe.data_rank, run.parallel.data)
    result["evaluated"] = pipe.evaluate(batches, rows.learnt_tokens)
    result["weights"] = selftest.read_all(pipe)
    result["settled"] = drift_and_settle(pipe) if pipe.stage.tied_weight is not None else None
    torch.save(result, str(folder / ("%s.%d.pt" % (case["name"], rank))))


def drift_and_settle(pipe):
    """Spoil the head's copy as another order of summation would, let a save's first act repair it, -> weight and moments."""
    from pipeline_train import checkpoint

    weight, parts = pipe.stage.tied_weight, (None,) + pipe.moments
    if weight.ds_pipe_replicated:
        for part in parts:
            pipe.write_whole(weight, pipe.read_whole(weight, part) + 1e-3, part)
    checkpoint.settle_ties(pipe)
    return [pipe.read_whole(weight, part) for part in parts] + [weight.detach().clone()]


def main():
    import torch.distributed

    from pipeline_train import engine
    from pipeline_train.worker import leave

    folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
    engine.connect(False, rank)
    for case in json.loads((folder / "cases.json").read_text()):
        run_case(case, folder, rank)
    torch.distributed.barrier()
    leave()


if __name__ == "__main__":
    main()
