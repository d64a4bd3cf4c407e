"""The thread in which a model computes."""

import queue
import threading
from concurrent.futures import Future, wait
from typing import Callable, Optional, TypeVar

T = TypeVar("T")
NAME = "model"  # of the thread


class Worker:
    """Does what it is given, one thing after the other, and ends with the process.

    From its loading on a model runs in one thread only: every thread that computes gets OpenMP threads of its own, and as soon as
    there are more of them than cores, GNU's let none wait for the others without falling asleep. On two cores a step took 40 ms
    where it took 20 in the only thread that had ever computed.
    """

    def __init__(self) -> None:
        self._work: queue.SimpleQueue[Optional[Callable[[], object]]] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=NAME, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while (work := self._work.get()) is not None:
            work()

    def do(self, work: Callable[[], T]) -> T:
        """Wait for it -> what it returns; raises what it raises."""
        done: Future[T] = Future()

        def attempt() -> None:
            try:
                done.set_result(work())
            except BaseException as error:  # noqa: BLE001 - it is raised where it is waited for
                done.set_exception(error)

        self._work.put(attempt)
        while not wait([done], timeout=0.5).done:
            pass  # a signal that came just before a wait does not end it: Ctrl-C is seen between two
        return done.result()

    def end_with(self, work: Callable[[], object]) -> None:
        """The last thing that it does; nobody waits for it."""
        self._work.put(work)
        self._work.put(None)

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def join(self, timeout: float) -> None:
        """At most ``timeout`` seconds."""
        self._thread.join(timeout)
