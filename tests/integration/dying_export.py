"""What test_train_export.py lets the ranks call instead of export.from_ranks.write: the export, in the middle of which they die."""

import os
import signal

from export import from_ranks, placed

CALL = __name__ + ":write"
put, calls = placed.put, []


def some(file, place, data):
    calls.append(place)
    if len(calls) > 4:
        os.kill(os.getpid(), signal.SIGKILL)
    return put(file, place, data)


def write(pipe):
    placed.put = some
    return from_ranks.write(pipe)
