"""One rank of a real DeepSpeed pipeline that works through a list of cases; run by test_train_equals_hf.py.

Reads FOLDER/cases.json: [{"name", "run": <run.yaml as a dictionary>, "steps", "offload"}, ...]. Leaves
FOLDER/<name>.<rank>.pt: what selftest.piped measures, the evaluated loss, weight decays and, for each layer of the rank, every
parameter's final weight as a whole tensor.
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
    result["weights"], result["decays"] = selftest.read_all(pipe), decays(pipe)
    result["settled"] = drift_and_settle(pipe) if pipe.stage.tied_weight is not None else None
    resumes = case["offload"] or run.optim.type == "lion"
    result["repeated"] = repeated(pipe, folder / case["name"], rows_of, case["steps"]) if resumes else None
    torch.save(result, str(folder / ("%s.%d.pt" % (case["name"], rank))))


def repeated(pipe, out, rows_of, step):
    """Save, train one step, go back to what was saved and train it again -> the weights and moments after each."""
    import torch.distributed

    from pipeline_train import checkpoint, selftest
    from pipeline_train.loop import micro_batches

    (out / "resolved" / "model").mkdir(parents=True, exist_ok=True)
    saver = checkpoint.Saver(pipe, out, {})
    saver.save(step)
    saver.finish()
    found = []
    for _ in range(2):
        rows = rows_of(step)
        batches = micro_batches(rows, pipe.config.batch.micro, pipe.data_rank, pipe.config.parallel.data)
        pipe.train(batches, rows.learnt_tokens, 1e-4)
        found.append([selftest.read_all(pipe, part) for part in (None,) + pipe.moments])
        if len(found) == 1:
            torch.distributed.barrier()
            assert checkpoint.load(pipe, checkpoint.folder(out, step)) == step
    return found


def decays(pipe):
    """ "<layer>/<slot>" -> the weight decay of the optimizer's group that holds it on this rank."""
    from pipeline_train import checkpoint

    held = {
        "%d/%s" % (layer, name): p._hp_mapping for layer in pipe.stage.layers for name, p in checkpoint.named(pipe, layer).items()
    }
    return {name: pipe.groups[place.param_group_index]["weight_decay"] for name, place in held.items() if place is not None}


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
