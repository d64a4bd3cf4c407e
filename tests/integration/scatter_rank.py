"""One of two ranks, each on a node of its own, that save without a shared disk, gather, and go on at another layout; run by
test_scattered.py.

Reads FOLDER/model and FOLDER/port; its node's run is FOLDER/<node>/out, the shared one FOLDER/shared/out. Leaves FOLDER/<rank>.pt
and node a's checkpoint before and after gather: FOLDER/part/step_000002, FOLDER/gathered/step_000002.
At the end both save step 4, and node b is killed when node a's folder has its name already and node b's has not.
"""

import os
import shutil
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from pipeline_train.place import PLACE, Place  # noqa: E402

WIDTH, ROWS, RATE = 24, 4, 2e-3
LAYERS = 5


def run_of(folder, pipe, data):
    from pipeline_train import config

    return config.parse({
        "run": {"out": "unused"}, "model": {"path": str(folder / "model"), "dtype": "fp32"},
        "data": {"train": "unused", "seq_len": WIDTH}, "parallel": {"pipe": pipe, "data": data},
        "batch": {"micro": 1, "global": ROWS}, "optim": {"lr": RATE}, "train": {"keep": 1},
    })  # fmt: skip


def pipeline(folder, pipe, data):
    from pipeline_train import engine, families
    from pipeline_train.plan import bounds

    run = run_of(folder, pipe, data)
    dims = families.dims_of(families.read_config(run.model.path))
    return engine.Pipeline(run, dims, bounds(dims, pipe, "auto", WIDTH), cuda=False)


def step(pipe, number):
    """One step on the rows of this number -> the loss."""
    from pipeline_train.loop import micro_batches
    from pipeline_train.selftest import make_rows

    rows = make_rows(number, ROWS, WIDTH, pipe.dims.vocab)
    batches = micro_batches(rows, 1, pipe.data_rank, pipe.config.parallel.data)
    return pipe.train(batches, rows.learnt_tokens, RATE).loss


def everything(pipe):
    from pipeline_train import selftest

    return [selftest.read_all(pipe, part) for part in (None,) + pipe.moments]


def save(pipe, out, number, shared=False):
    from pipeline_train import checkpoint

    place = os.environ.pop(PLACE)
    if not shared:
        os.environ[PLACE] = place
    saver = checkpoint.Saver(pipe, out, {"data": "d"})
    saver.save(number)
    saver.finish()
    os.environ[PLACE] = place


def work(folder, rank):
    import torch
    import torch.distributed as dist

    from pipeline_train import checkpoint, gather, scattered
    from pipeline_train.control import Channel
    from pipeline_train.errors import UserError

    place, said = Place.inherited(), {"refused": ""}
    out = folder / place.nodes[place.node].name / "out"
    stages = pipeline(folder, 2, 1)
    checkpoint.start(stages)
    said["losses"] = [step(stages, number) for number in (0, 1)]
    save(stages, folder / "shared" / "out", 2, shared=True)
    save(stages, out, 2)
    said["third"], said["after"] = step(stages, 2), everything(stages)
    dist.barrier()
    checkpoint.load(stages, checkpoint.folder(out, 2))
    said["third again"], said["after again"] = step(stages, 2), everything(stages)
    try:
        scattered.check_layout(checkpoint.folder(out, 2), scattered.layers_here(run_of_layout(folder), place))
    except UserError as error:
        said["refused"] = str(error)
    said["had"] = sorted(path.name for path in checkpoint.folder(out, 2).iterdir())
    keep(folder / "part", out)
    channel = Channel.open(rank, 2, "127.0.0.1", int((folder / "port").read_text()), place.nodes[rank].name, 60.0, print)
    said["gathered"] = gather.bring(channel, out, print, everywhere=True)
    channel.close()
    keep(folder / "gathered", out)
    scattered.check_layout(checkpoint.folder(out, 2), list(range(LAYERS)))
    replicas = pipeline(folder, 1, 2)
    checkpoint.load(replicas, checkpoint.folder(out, 2))
    said["other layout"] = step(replicas, 2)
    save(replicas, out, 3)
    said["replica has"] = sorted(path.name for path in checkpoint.folder(out, 3).iterdir())
    torch.save(said, str(folder / ("%d.pt" % rank)))
    dist.barrier()
    if place.node == 1:
        kill_between(checkpoint.folder(folder / "a" / "out", 4))
    save(stages, out, 4)


def keep(folder, out):
    """For the test: later saves delete step 2."""
    if Place.inherited().node == 0:
        shutil.copytree(str(out / "checkpoints" / "step_000002"), str(folder / "step_000002"))


def run_of_layout(folder):
    """One stage, two replicas; the parts as prepare resolves them."""
    run = run_of(folder, 1, 2)
    run.parallel.parts = [LAYERS]
    return run


def kill_between(others):
    """This process ends when its own folder is about to get its name and the other node's has it."""
    from pipeline_train import checkpoint_folder

    def publish(final):
        while not others.exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)

    checkpoint_folder.publish = publish


def main():
    import torch

    from pipeline_train import engine
    from pipeline_train.worker import leave

    torch.manual_seed(0)
    folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
    engine.connect(False, 0)
    work(folder, rank)
    leave()


if __name__ == "__main__":
    main()
