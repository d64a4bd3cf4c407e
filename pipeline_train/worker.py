"""One rank: ``python -m pipeline_train.worker --out OUT --total-steps N [--resume CHECKPOINT]``, started by launch.py.

Everything else comes from OUT/resolved and from RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT. An error is written as
one line to OUT/logs/rank_<RANK>.error, with its traceback on stderr, which is OUT/logs/rank_<RANK>.log.
"""

import argparse
import contextlib
import ctypes
import faulthandler
import importlib
import json
import logging
import os
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any, Callable, Dict, Optional

from .leaving import leave
from .pulse import Pulse

PARENT = "PIPEDOCK_PARENT"  # process id of the launcher
PROGRESS = "PIPEDOCK_PROGRESS"  # file descriptor that rank 0 writes progress to, one JSON object per line
HOLD_S = 5.0  # longer than the launcher takes to ask the others for their stacks


def die_with_parent() -> None:
    """However the launcher ends, SIGKILL included, its ranks end too (Linux; elsewhere only an orderly end is passed on)."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the launcher decides what it means
    if sys.platform.startswith("linux"):
        set_death_signal = 1  # PR_SET_PDEATHSIG, prctl(2)
        ctypes.CDLL(None).prctl(set_death_signal, signal.SIGKILL)
    if PARENT in os.environ and os.getppid() != int(os.environ[PARENT]):
        os._exit(1)  # it died before the line above


def listen(pulse: Pulse, stacks: Path) -> None:
    """SIGTERM: save and stop, SIGUSR1: save and go on, whichever rank gets it and however often; all ranks agree on the step
    (see instructions.Watched). SIGUSR2: the stacks of all threads into ``stacks``, also while the process waits in C."""
    signal.signal(signal.SIGTERM, lambda number, frame: pulse.board.wish_stop())
    signal.signal(signal.SIGUSR1, lambda number, frame: pulse.board.wish_save())
    faulthandler.register(signal.SIGUSR2, file=open(str(stacks), "w"), all_threads=True)


class Phases:
    """What the time before the first step goes into: ``end`` names what has passed since the last call, in ``seconds``."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.seconds: Dict[str, float] = {}
        self.clock, self.last = clock, clock()

    def end(self, name: str) -> None:
        now = self.clock()
        self.seconds[name], self.last = round(now - self.last, 3), now


def answer_for(folder: Path, work: Callable[[Pulse], Dict[str, Any]]) -> None:
    """All of this process: ``work`` -> the summary that rank 0 gives the launcher. Stacks and errors go into ``folder``."""
    rank, pulse = int(os.environ["RANK"]), Pulse.inherited()
    die_with_parent()
    listen(pulse, folder / ("rank_%d.stacks" % rank))
    pulse.start_beating()
    pulse.tick("starting")
    try:
        summary = work(pulse)
    except Exception as error:  # noqa: BLE001 - the process boundary: whatever it was, the launcher shows its one line
        traceback.print_exc()
        line = " ".join(str(error).split()) or type(error).__name__
        pulse.fail(line)
        with contextlib.suppress(OSError):  # a full disk; the launcher has the line already, if a little shorter
            (folder / ("rank_%d.error" % rank)).write_text(line[:1000] + "\n", encoding="utf-8")
            sys.stderr.flush()
        time.sleep(HOLD_S)  # leaving now would break the others' connections: they could not show any more where they were
        os._exit(1)  # not sys.exit: a communication thread may wait for a rank that is gone
    if rank == 0:
        report({"done": summary})
    leave()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--run", required=True, help="its configuration's name in OUT/resolved")
    parser.add_argument("--total-steps", required=True, type=int)
    parser.add_argument("--resume", type=Path)
    parser.add_argument(
        "--finish", metavar="MODULE:FUNCTION", help="called by all ranks with their Pipeline when they have trained"
    )
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s", stream=sys.stderr)
    answer_for(args.out / "logs", lambda pulse: train(args.out, args.run, args.total_steps, args.resume, pulse, args.finish))


def report(message: Dict[str, Any]) -> None:
    os.write(int(os.environ[PROGRESS]), (json.dumps(message) + "\n").encode())


def train(out: Path, file: str, total: int, resume: Any, pulse: Pulse, finish: Optional[str] = None) -> Dict[str, Any]:
    """Build this rank's stage, fill it, run the loop; -> the summary, with what ``finish`` returns under "finish"."""
    phases = Phases()
    import torch

    from . import checkpoint, config, engine, families
    from .data.feed import Feed
    from .loop import Loop
    from .plan import bounds
    from .sinks import open_metrics

    run = config.load(out / "resolved" / file)
    rank, local = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
    cuda = os.environ.get("DS_ACCELERATOR") != "cpu"
    torch.manual_seed(run.run.seed)
    phases.end("libraries")
    pulse.tick("joining the other ranks")
    engine.connect(cuda, local)
    phases.end("joining")
    pulse.tick("building its stage")
    dims = families.dims_of(families.read_config(str(out / "resolved" / "model")))
    seq_len = run.data.seq_len
    assert seq_len is not None, "the launcher resolves it"
    pipe = engine.Pipeline(run, dims, bounds(dims, run.parallel.pipe, run.parallel.parts, seq_len), cuda, pulse)
    phases.end("stage")
    logging.getLogger("pipedock").info("rank %d: stage %d, replica %d, layers %s", rank, pipe.pipe_rank, pipe.data_rank,
                                       list(pipe.stage.layers))  # fmt: skip
    if rank == 0:
        (out / "resolved" / "deepspeed.json").write_text(json.dumps(pipe.settings, indent=1) + "\n", encoding="utf-8")
    options: Dict[str, Any] = {"seq_len": seq_len, "rows_per_step": run.rows_per_step, "seed": run.run.seed, "pack": run.data.pack}
    facts = json.loads((out / "resolved" / "data.json").read_text(encoding="utf-8"))
    options["pad_id"] = facts.pop("pad_id")
    feed = Feed.open(out / "data", "train", **options)
    eval_feed = Feed.open(out / "data", "eval", **options) if run.data.eval is not None else None
    phases.end("data")
    done = 0
    if resume is None:
        checkpoint.start(pipe)
    else:
        done = checkpoint.load(pipe, resume)
    phases.end("weights")
    metrics = open_metrics(run, out, done, report) if rank == 0 else None
    loop = Loop(pipe, out, feed, eval_feed, total, facts, metrics, report if rank == 0 else None, phases)
    try:
        summary = loop.run(done)
    finally:
        if metrics is not None:
            metrics.close()
    if finish is not None and not summary.get("stopped"):
        module, name = finish.split(":")
        summary["finish"] = getattr(importlib.import_module(module), name)(pipe)
    torch.distributed.barrier()  # nobody leaves while another one still needs it
    return summary


if __name__ == "__main__":
    main()
