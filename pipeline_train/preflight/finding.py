"""What a check has found. Standard library only."""

from typing import Any, Dict, List, NamedTuple, Optional, Sequence

from ..errors import UserError

OK, NOTE, WARNING, FAILURE = "ok", "note", "warning", "failure"
Facts = Dict[str, Any]  # what facts.measure has measured of one node, as it travels


class Finding(NamedTuple):
    """``check``: what was looked at. ``level``: "ok", "note" (nothing to do), "warning" (a run works, but...), "failure" (it would
    not). ``said``: the measured cause. ``fix``: the command or the change that ends it. ``node``: None for all together."""

    check: str
    level: str
    said: str
    fix: str = ""
    node: Optional[int] = None

    def line(self, names: Sequence[str]) -> str:
        where = "" if self.node is None else "node %d (%s): " % (self.node, names[self.node])
        return "%s%s: %s%s" % (where, self.check, self.said, "; " + self.fix if self.fix else "")

    def document(self) -> Dict[str, Any]:
        return dict(self._asdict())


class NotReady(UserError):
    """At least one check has failed; ``document`` is what --json shows."""

    def __init__(self, document: Dict[str, Any]) -> None:
        failed = [Finding(**row).line(document["names"]) for row in document["findings"] if row["level"] == FAILURE]
        super().__init__("%d %s: %s" % (len(failed), "check failed" if len(failed) == 1 else "checks failed", "; ".join(failed)))
        self.document = document


def size(nbytes: Optional[int]) -> str:
    """ "64 MiB", "7.5 GiB"."""
    if nbytes is None:
        return "?"
    return "%.1f GiB" % (nbytes / 2**30) if nbytes >= 2**30 else "%.0f MiB" % (nbytes / 2**20)


def at(node: int, findings: List[Finding]) -> List[Finding]:
    """The same of this node."""
    return [finding._replace(node=node) for finding in findings]
