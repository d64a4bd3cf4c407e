"""Two ranks in which losses and gradients go wrong at planned steps; run by test_train_trouble.py.

``planted_rank.py FOLDER`` leaves FOLDER/<case>.<rank>.json: what Pipeline.train returned or raised at every step, whether the
weights moved, and the loss scale afterwards. Reads FOLDER/run.json, a run.yaml as a dictionary.
"""

import json
import os
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

from tests.integration.pipeline_rank import make_rows  # noqa: E402


class Planted:
    """A pipeline whose first matrix on rank ``where`` has a gradient of ``value`` at the steps of ``at``; in bf16, where autograd
    sees no gradients of matrices, its first vector."""

    def __init__(self, run, dims, edges, where, value, at):
        from pipeline_train import checkpoint, engine

        self.pipe = engine.Pipeline(run, dims, edges, cuda=False)
        checkpoint.start(self.pipe)
        self.rank, self.step, self.at = dist.get_rank(), 0, at
        self.parameters = [p for module in self.pipe.stage.layers.values() for p in module.parameters()]
        first = next(p for p in self.parameters if p.dim() == (1 if run.model.dtype == "bf16" else 2))
        if self.rank == where:
            first.register_hook(lambda gradient: torch.full_like(gradient, value) if self.step in self.at else gradient)

    def go(self, steps):
        """-> one entry per step: [loss or what was raised, gradient norm, skipped, did any weight move, loss scale]."""
        from pipeline_train.instructions import NotFinite
        from pipeline_train.loop import micro_batches

        seen = []
        for _ in range(steps):
            rows = make_rows(self.step, self.pipe.config.rows_per_step, 24, self.pipe.dims.vocab)
            before = [p.detach().clone() for p in self.parameters]
            try:
                result = self.pipe.train(micro_batches(rows, 1, 0, 1), rows.learnt_tokens, 1e-3)
                entry = [result.loss, result.grad_norm, result.skipped]
            except NotFinite as error:
                entry = [str(error), None, None]
            moved = any(not torch.equal(a, b) for a, b in zip(before, self.parameters))
            scaler = self.pipe.loss_scaler
            seen.append(entry + [moved, None if scaler is None else scaler.cur_scale])
            self.step += 1
        return seen

    def moments(self):
        return [self.pipe.read_whole(p, "exp_avg") for p in self.parameters]


def as_fp16(planted, scale, window, hysteresis, least):
    """fp16 needs a GPU; its scaler, and all that DeepSpeed's ZeRO-1 does around it, does not."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

    scaler = DynamicLossScaler(init_scale=scale, scale_window=window, min_scale=least, delayed_shift=hysteresis,
                               consecutive_hysteresis=False, raise_error_at_min_scale=False)  # fmt: skip
    planted.pipe.engine.optimizer.loss_scaler = scaler
    planted.pipe.config.model.dtype = "fp16"
    planted.pipe.watched.fp16 = True


def stopped_and_resumed(made, out, model):
    """The storm, saved after 5 steps and gone on with by another pipeline, whose scaler begins elsewhere."""
    from pipeline_train import checkpoint

    if dist.get_rank() == 0:
        (out / "resolved").mkdir(parents=True)
        shutil.copytree(model, str(out / "resolved" / "model"))
    dist.barrier()
    first, rest = made(), made()
    as_fp16(first, 1024.0, 2, 2, 256.0)
    seen = first.go(5)
    saver = checkpoint.Saver(first.pipe, out, {})
    saver.save(5)
    saver.finish()
    as_fp16(rest, 65536.0, 2, 2, 256.0)
    rest.step = checkpoint.load(rest.pipe, checkpoint.folder(out, 5))
    return seen + rest.go(4)


def infinite_loss(logits, targets):
    """The gradient of this is zero everywhere."""
    return logits.float().sum() * 0.0 + float("inf")


def main():
    from pipeline_train import config, engine, families
    from pipeline_train.plan import bounds
    from pipeline_train.worker import leave

    folder = Path(sys.argv[1])
    engine.connect(False, int(os.environ["LOCAL_RANK"]))
    raw = json.loads((folder / "run.json").read_text())
    dims = families.dims_of(families.read_config(raw["model"]["path"]))

    def make(where, value, at, dtype="fp32", clip=0.5):
        run = config.parse(json.loads((folder / "run.json").read_text()))
        run.model.dtype, run.optim.clip = dtype, clip
        return Planted(run, dims, bounds(dims, 2, "auto", 24), where, value, at)

    def keep(name, seen):
        (folder / ("%s.%d.json" % (name, dist.get_rank()))).write_text(json.dumps(seen))

    keep("plain", make(0, 0.0, []).go(4))
    keep("nan-fp32", make(0, float("nan"), [1]).go(2))
    if (folder / "bf16").exists():
        keep("inf-bf16", make(1, float("inf"), [1], "bf16").go(2))
    broken = make(0, 0.0, [])
    broken.go(1)
    broken.pipe.engine.loss_model = broken.pipe.engine.module.loss_fn = infinite_loss
    keep("loss", broken.go(1))
    calm = make(0, 0.0, [])
    as_fp16(calm, 1024.0, 1000, 1, 1.0)
    keep("fp16-calm", calm.go(4))
    stormy = make(1, float("inf"), [1, 2, 3])
    as_fp16(stormy, 1024.0, 2, 2, 256.0)
    keep("fp16-storm", stormy.go(9))
    keep("fp16-resumed", stopped_and_resumed(lambda: make(1, float("inf"), [1, 2, 3]), folder / "run", raw["model"]["path"]))
    free = make(0, 0.0, [], clip=0.0)
    free.go(4)
    doubling = make(0, 0.0, [], clip=0.0)
    as_fp16(doubling, 1024.0, 1, 1, 1.0)
    keep("fp16-doubling", doubling.go(4))
    keep("moments", [float((a - b).abs().max() / a.abs().max()) for a, b in zip(free.moments(), doubling.moments())])
    dist.barrier()
    leave()


if __name__ == "__main__":
    main()
