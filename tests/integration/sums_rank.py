"""One rank that trains a bf16 model twice, with accumulate.into_sums and without; run by test_accumulate.py.

``sums_rank.py CASE.json OUT`` reads {"raw": a model's config, "run": a run.yaml as a dictionary} and leaves in OUT.<rank>, for
both ways, losses and norms of its steps, weights and moments at the end, the parameters that had a gradient left when the
optimizer stepped, and whether any gradient sum that it was given had more digits than bf16.
"""

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch  # noqa: E402

STEPS = 3


def trained(case, fused):
    from pipeline_train import accumulate, config, engine, families, plan, selftest
    from pipeline_train.loop import micro_batches

    whole = accumulate.into_sums
    accumulate.into_sums = whole if fused else lambda optimizer, model, blocks: None
    run, dims = config.parse(case["run"]), families.dims_of(case["raw"])
    pipe = engine.Pipeline(run, dims, plan.bounds(dims, run.parallel.pipe, "auto", run.data.seq_len), cuda=False)
    accumulate.into_sums = whole
    from pipeline_train import masters

    masters.start(pipe)
    step, precise, kept = pipe.base_optimizer.step, [], set()

    def watched(*args):
        gradients = [p.grad for group in pipe.groups for p in group["params"]]
        precise.append(any(bool((g != g.bfloat16().float()).any()) for g in gradients))
        kept.update(name for name, p in pipe.stage.named_parameters() if p.grad is not None)
        return step(*args)

    pipe.base_optimizer.step = watched
    seen = []
    for number in range(STEPS):
        rows = selftest.make_rows(number, run.rows_per_step, run.data.seq_len, dims.vocab)
        result = pipe.train(micro_batches(rows, run.batch.micro, pipe.data_rank, run.parallel.data), rows.learnt_tokens, 1e-3)
        seen.append((result.loss, result.grad_norm))
    values = [selftest.read_all(pipe, part) for part in (None,) + pipe.moments]
    return {"steps": seen, "values": values, "kept": sorted(kept), "precise": any(precise)}


def main():
    from pipeline_train import engine

    case = json.loads(Path(sys.argv[1]).read_text())
    engine.connect(False, 0)
    torch.save([trained(case, fused) for fused in (True, False)], "%s.%s" % (sys.argv[2], os.environ["RANK"]))


if __name__ == "__main__":
    main()
