"""The two ways a verb ends badly. Standard library only; every package may import this file.

``UserError``  the user's input is wrong: one line saying what, where and what to do. Exit 2.
``RunFailed``  the input was fine, the run, conversion or proof was not. Exit 1.

Neither ever reaches the user as a traceback: ``pipedock.py`` prints the message alone.
"""

from typing import Any, Dict, Optional


class UserError(ValueError):
    """What is wrong, where, and what to do about it, in one line."""


class RunFailed(RuntimeError):
    """A run that failed or a proof that did not hold, in one line. ``document``: what --json shows beside the message."""

    def __init__(self, message: str, document: Optional[Dict[str, Any]] = None) -> None:
        super().__init__(message)
        self.document = document or {}


class Stopped(RunFailed):
    """A run that a signal has ended; what it has saved is kept."""
