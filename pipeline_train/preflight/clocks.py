"""How far the clocks of the nodes are apart: node 0 asks every other one for its time, as NTP does."""

import time
from typing import Any, Callable, Dict, List, Sequence

from ..control import Channel
from .finding import FAILURE, OK, WARNING, Finding

ROUNDS = 5
PAUSE_S = 0.02
APART_S = 2.0  # more makes logs and file times of the nodes confusing
FAR_S = 60.0  # more breaks what rests on time: certificates, Kerberos, caches of network file systems
Sample = List[float]  # [sent, the other's time, received]


def measure(channel: Channel, now: Callable[[], float] = time.time) -> List[List[Sample]]:
    """All nodes call it. At node 0 samples of each other node (none of itself), elsewhere []."""
    if channel.node:
        while channel.receive(0)[0].get("time", False):
            channel.send(0, {"time": now()})
        return []
    found: List[List[Sample]] = [[]]
    for node in range(1, channel.nodes):
        samples = []
        for _ in range(ROUNDS):
            sent = now()
            channel.send(node, {"time": True})
            samples.append([sent, float(channel.receive(node)[0]["time"]), now()])
            time.sleep(PAUSE_S)
        channel.send(node, {"time": False})
        found.append(samples)
    return found


def skew(samples: Sequence[Sample]) -> Dict[str, Any]:
    """{"ahead": seconds that the other's clock is before node 0's, "within": how sure that is, "stands": its clock does not run}.
    The sample with the shortest way there and back is the surest."""
    sent, theirs, received = min(samples, key=lambda sample: sample[2] - sample[0])
    passed, ran = samples[-1][0] - samples[0][2], samples[-1][1] - samples[0][1]
    return {"ahead": theirs - (sent + received) / 2, "within": (received - sent) / 2, "stands": passed > 0 and ran < passed / 4}


def check(clocks: Sequence[Sequence[Sample]]) -> List[Finding]:
    """``clocks``: samples by node, empty where there are none."""
    found, most = [], 0.0
    for node, samples in enumerate(clocks):
        if not samples:
            continue
        seen = skew(samples)
        ahead, sure = seen["ahead"], max(0.0, abs(seen["ahead"]) - seen["within"])
        most = max(most, sure)
        said = "%.1f s %s node 0's" % (abs(ahead), "ahead of" if ahead > 0 else "behind")
        fix = "sudo timedatectl set-ntp true (or sudo chronyc makestep); in a container, on its host"
        if seen["stands"]:
            found.append(Finding("clock", FAILURE, "stands still, %s" % said, fix, node))
        elif sure > APART_S:
            found.append(Finding("clock", FAILURE if sure > FAR_S else WARNING, said, fix, node))
    return found or [Finding("clock", OK, "at most %.3f s apart" % most)]
