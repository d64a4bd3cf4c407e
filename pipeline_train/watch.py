"""Is every rank still alive and getting on? Pure decisions from the signs on the board. Standard library only.

frozen  a rank's own heartbeat has stopped: the process is stopped, swapped out or gone from its machine
stuck   every heart beats, but no rank's training thread has done anything new
A rank that waits for others is not suspected: the signs of all of them together are looked at.
"""

from typing import Callable, Dict, List, Optional, Tuple

from .pulse import Sign

PATIENCE_S = 600.0  # between two signs where one thing may honestly take long: starting, loading, saving, packing an epoch
COMPARING = "comparing with transformers"  # selftest
PATIENT = ("starting", "joining the other ranks", "building its stage", "loading", "saving", "reading the step's rows", COMPARING)
SLACK = 5.0  # an honest pause is at most this many times the longest one so far
FIRST_S = 45.0  # from its start to a rank's first heartbeat, which comes before anything that takes long
PAUSED_S = 5.0  # a launcher that was itself not running for so long (Ctrl-Z, a laptop asleep) has seen nothing


class Watch:
    """``look`` now and then; ``now`` is a monotonic clock in seconds; ``named``: rank -> what to call it."""

    def __init__(self, hang_s: float, now: Callable[[], float], named: Callable[[int], str] = "rank {}".format) -> None:
        self.hang_s, self.now, self.named = hang_s, now, named
        self.looked = now()
        self.beats: Dict[int, Tuple[int, float]] = {}  # rank -> (number, when it was first seen)
        self.ticks: Dict[int, Tuple[int, float]] = {}
        self.longest = 0.0  # honest pause while training

    def look(self, signs: List[Sign]) -> Optional[str]:
        """-> None, or in one line why the run must end."""
        now, before = self.now(), self.looked
        self.looked = now
        if now - before > PAUSED_S:
            self.beats, self.ticks = {}, {}
        training = all(sign.steps for sign in signs) and not any(sign.doing in PATIENT for sign in signs)
        pause = now - max((when for _, when in self.ticks.values()), default=now)
        news = False
        for rank, sign in enumerate(signs):
            news = _see(self.ticks, rank, sign.ticks, now) or news
            _see(self.beats, rank, sign.beats, now)
        if news:
            self.longest = max(self.longest, pause if training else 0.0)
        return self._frozen(signs, now) or self._stuck(signs, 0.0 if news else pause, training)

    def _frozen(self, signs: List[Sign], now: float) -> Optional[str]:
        for rank, sign in enumerate(signs):
            silent = now - self.beats[rank][1]
            if silent > (self.hang_s if sign.beats else max(self.hang_s, FIRST_S)):
                return "%s has stopped answering: no sign of life for %d s. %s" % (self.named(rank), silent, _all(signs))
        return None

    def _stuck(self, signs: List[Sign], pause: float, training: bool) -> Optional[str]:
        if pause > (max(self.hang_s, SLACK * self.longest) if training else PATIENCE_S):
            return "no rank has got on for %d s. %s" % (pause, _all(signs))
        return None


def _see(seen: Dict[int, Tuple[int, float]], rank: int, number: int, now: float) -> bool:
    """Remember when a number was first seen; -> whether it is new."""
    if rank in seen and seen[rank][0] == number:
        return False
    seen[rank] = number, now
    return True


def _all(signs: List[Sign]) -> str:
    return "Last seen: " + "; ".join(
        "rank %d, after step %d: %s" % (rank, sign.steps, sign.doing or "not started") for rank, sign in enumerate(signs)
    )
