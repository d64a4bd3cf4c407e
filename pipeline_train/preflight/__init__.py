"""``pipedock preflight``: can these machines run this, found out before anything starts. train on several nodes runs it first.

finding    what a check says: level, measured cause, the command that ends it      machine    versions, shm, ulimits, disk, memory
gpus       cards, drivers, room on them                                             wires      interface, ports
clocks     how far apart                                                            bandwidth  real ranks (probe) that talk
need       what a run takes of a node                                               together   all of it, on all nodes

A check is a function from facts, as they are measured and travel, to findings.
"""

from .finding import Finding, NotReady
from .together import Task, allotted, alone, check_nodes, check_run, meet, preflight

__all__ = ["Finding", "NotReady", "Task", "allotted", "alone", "check_nodes", "check_run", "meet", "preflight"]
