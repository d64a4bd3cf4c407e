"""A server in the foreground ends with the command that started it, however that ends."""

import os
import signal
import threading

from pipeline_train.leaving import outlive

PARENT = "PIPEDOCK_SERVE_PARENT"  # process id of that command


def end_with_parent() -> None:
    """If there is one: SIGTERM to this process, as the command would have sent it, within a second of the command's end. SIGKILL
    leaves it no time to. (Linux can do that by itself, but then for the thread that started us, which may end long before.)"""
    if PARENT in os.environ:
        threading.Thread(target=_watch, args=(int(os.environ[PARENT]),), name="parent", daemon=True).start()


def _watch(parent: int) -> None:
    outlive(parent, 1.0)
    os.kill(os.getpid(), signal.SIGTERM)
