"""One rank of a real DeepSpeed pipeline that works through a list of cases; run by test_train_equals_hf.py.

Reads FOLDER/cases.json: [{"name", "run": <run.yaml as a dictionary>, "steps"}, ...]. The rows of every step are
``make_rows``, the same for every rank and for the reference. Leaves FOLDER/<name>.<rank>.pt: losses, grad_norms, and for each
layer of the rank the first step's gradient (after clipping) and the final weight of every parameter, all whole tensors.
"""

import json
import os
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from pipeline_train.data.feed import StepRows  # noqa: E402


def make_rows(step: int, rows: int, width: int, vocab: int) -> StepRows:
    """Packed rows: 1 to 3 samples each, the last of several rows empty, 10 to 90 % of a sample's tokens learnt."""
    random = np.random.default_rng(step)
    ids = random.integers(3, vocab, (rows, width))
    positions, segments = np.zeros((rows, width), np.int64), np.zeros((rows, width), np.int64)
    targets = np.full((rows, width), -100, np.int64)
    for row in range(max(1, rows - 1)):
        end = 0
        for segment in range(1, int(random.integers(2, 5))):
            length = int(random.integers(2, width // 3))
            place = slice(end, end + length)
            positions[row, place], segments[row, place] = np.arange(length), segment
            learnt = random.random(length) < random.uniform(0.1, 0.9)
            targets[row, place] = np.where(learnt, random.integers(3, vocab, length), -100)
            end += length
    learnt_tokens = int((targets != -100).sum())
    return StepRows(ids, positions, segments, targets, int((segments > 0).sum()), learnt_tokens, 0, [0])


def run_case(case, folder, rank):
    import torch

    from pipeline_train import checkpoint, config, engine, families
    from pipeline_train.loop import micro_batches
    from pipeline_train.plan import bounds

    run = config.parse(case["run"])
    dims = families.dims_of(families.read_config(run.model.path))
    edges = bounds(dims, run.parallel.pipe, run.parallel.parts, run.data.seq_len)
    pipe = engine.Pipeline(run, dims, edges, cuda=False)
    checkpoint.start(pipe)
    losses, norms, gradients = [], [], {}
    beta = run.optim.betas[0]
    for step in range(case["steps"]):
        rows = make_rows(step, run.rows_per_step, run.data.seq_len, dims.vocab)
        batches = micro_batches(rows, run.batch.micro, pipe.data_rank, run.parallel.data)
        result = pipe.train(batches, rows.learnt_tokens, engine.learning_rate(run.optim, step, case["steps"]))
        losses.append(result.loss)
        norms.append(result.grad_norm)
        if step == 0:  # the first moment started at zero
            gradients = {
                "%d/%s" % (layer, name): pipe.read_whole(p, "exp_avg") / (1 - beta)
                for layer in pipe.stage.layers
                for name, p in checkpoint.named(pipe, layer).items()
            }
    rows = make_rows(1000, run.rows_per_step, run.data.seq_len, dims.vocab)
    evaluated = pipe.evaluate(micro_batches(rows, run.batch.micro, pipe.data_rank, run.parallel.data), rows.learnt_tokens)
    weights = {
        "%d/%s" % (layer, name): pipe.read_whole(p)
        for layer in pipe.stage.layers
        for name, p in checkpoint.named(pipe, layer).items()
    }
    result = {"losses": losses, "norms": norms, "gradients": gradients, "weights": weights, "evaluated": evaluated}
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
