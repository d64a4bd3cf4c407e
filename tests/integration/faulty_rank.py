"""pipeline_train.worker with one fault in it: FAULT="<rank> <step> <kind>" in the environment. Run by test_train_trouble.py."""

import os
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))


def raises(rows):
    """In place of a step's micro-batches. The last stage loads its first one behind the first stage's activations, so rank 0 is in
    the middle of its schedule then."""
    raise ValueError("planted\nin two lines")
    yield


def fail(loop, kind):
    if kind == "raise":
        loop._mine = raises
        return
    if kind == "wait":
        time.sleep(1000)  # the thread that trains; the heart beats on
    os.kill(os.getpid(), {"stop": signal.SIGSTOP, "kill": signal.SIGKILL}[kind])


def main():
    from pipeline_train import loop, worker

    rank, step, kind = os.environ["FAULT"].split()
    whole = loop.Loop._step

    def faulty(self, number, *arguments):
        if (os.environ["RANK"], number) == (rank, int(step)):
            fail(self, kind)
        return whole(self, number, *arguments)

    loop.Loop._step = faulty
    worker.main()


if __name__ == "__main__":
    main()
