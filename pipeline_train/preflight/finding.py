"""What a check has found."""

from typing import Any, Dict, List, NamedTuple, Optional, Sequence

from ..errors import UserError
from ..identity import nodes

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

    def document(self) -> Dict[str, Any]:
        return dict(self._asdict())


class NotReady(UserError):
    """At least one check has failed; ``document`` is what --json shows."""

    everywhere = True  # every node says the same

    def __init__(self, document: Dict[str, Any]) -> None:
        failed = lines([Finding(**row) for row in document["findings"]], FAILURE, document["names"])
        super().__init__("%d %s: %s" % (len(failed), "check failed" if len(failed) == 1 else "checks failed", "; ".join(failed)))
        self.document = document


def lines(findings: Sequence[Finding], level: str, names: Sequence[str]) -> List[str]:
    """One for each finding of this level; what several nodes have in common is said once."""
    shared: Dict[Finding, List[int]] = {}
    for finding in findings:
        if finding.level == level:
            where = shared.setdefault(finding._replace(node=None), [])
            where += [] if finding.node is None else [finding.node]
    return [
        "%s%s: %s%s" % (nodes(where, names) + ": " if where else "", one.check, one.said, "; " + one.fix if one.fix else "")
        for one, where in shared.items()
    ]


def size(nbytes: Optional[int]) -> str:
    """ "64 MiB", "7.5 GiB"."""
    if nbytes is None:
        return "?"
    return "%.1f GiB" % (nbytes / 2**30) if nbytes >= 2**30 else "%.0f MiB" % (nbytes / 2**20)


def at(node: int, findings: List[Finding]) -> List[Finding]:
    """The same of this node."""
    return [finding._replace(node=node) for finding in findings]
