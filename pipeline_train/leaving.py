"""How processes end that cannot end in Python's own way, or that must not outlive another. Standard library only."""

import logging
import os
import sys
import time


def leave(code: int = 0) -> None:
    """End this process now; everything is written. Python's own end takes apart what still computes or communicates in threads of
    C++, and that aborts now and then ("terminate called without an active exception": seen with gloo after the last step of a
    training or a generation, and with torch in the thread that loads a model)."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def outlive(parent: int, every: float) -> None:
    """Come back when the process ``parent`` is no longer this one's parent; looked at every so many seconds."""
    while os.getppid() == parent:
        time.sleep(every)
