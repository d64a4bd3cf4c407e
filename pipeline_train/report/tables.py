"""Sections that are tables: saves, data, proofs, starts."""

from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

from ..config_schema import RunConfig
from . import facts
from .curves import Curves, finite
from .words import count, duration, text

MOST_ROWS = 50
MOST_CHARACTERS = 2000  # of one cell


def table(rows: Sequence[Tuple[str, Any]]) -> str:
    """Names and values; "" when there are none."""
    if not rows:
        return ""
    cells = "".join("<tr><th scope=row>%s</th><td>%s</td></tr>" % (text(name), text(shown(value))) for name, value in rows)
    return "<table>%s</table>" % cells


def shown(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int) and abs(value) < 10**18:
        return count(value)
    return str(value)[:MOST_CHARACTERS]


def wide(heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    head = "".join("<th scope=col>%s</th>" % text(name) for name in heads)
    body = "".join("<tr>%s</tr>" % "".join("<td>%s</td>" % text(shown(cell)) for cell in row) for row in rows)
    return '<table class="wide"><tr>%s</tr>%s</table>' % (head, body)


def seconds(value: Any) -> str:
    number = finite(value)
    return "-" if number is None else "%.2f" % number


def saves_section(curves: Curves) -> str:
    if not curves.saves:
        return ""
    stalls = [s for s in (finite(save.get("stall_s", save.get("seconds"))) for save in curves.saves) if s is not None]
    parts = []
    if stalls:
        line = "%d saves; training stood still for %s in all, %.2f s a save on average, %.2f s at most."
        parts.append("<p>%s</p>" % text(line % (len(curves.saves), duration(sum(stalls)), sum(stalls) / len(stalls), max(stalls))))
    rows = [
        (save["step"], seconds(save.get("seconds")), seconds(save.get("stall_s")), save.get("asynchronous"), save.get("path"))
        for save in curves.saves[-MOST_ROWS:]
    ]
    shown_rows = wide(("step", "seconds", "stall, s", "behind the next steps", "folder"), rows)
    parts.append("<details><summary>The last %d</summary>%s</details>" % (len(rows), shown_rows))
    return "".join(parts)


def data_section(out: Path) -> str:
    """data/train.json and eval.json beside each other."""
    found = {which: facts.document(out / "data" / (which + ".json")) for which in ("train", "eval")}
    found = {which: statistics for which, statistics in found.items() if statistics}
    if not found:
        return ""
    names: List[str] = []
    flat = {which: flatten(statistics) for which, statistics in found.items()}
    for rows in flat.values():
        names += [name for name in rows if name not in names]
    rows_shown = [[name] + [flat[which].get(name) for which in flat] for name in names[:MOST_ROWS]]
    parts = [wide([""] + list(flat), rows_shown)]
    for which, statistics in found.items():
        for key, what in (("warnings", "warnings"), ("bad_lines", "records left out")):
            lines = statistics.get(key)
            if isinstance(lines, list) and lines:
                items = "".join("<li>%s</li>" % text(str(line)[:MOST_CHARACTERS]) for line in lines[:MOST_ROWS])
                parts.append("<p>%s, %s:</p><ul>%s</ul>" % (text(which), what, items))
    return "".join(parts)


def flatten(document: Dict[str, Any], prefix: str = "") -> Dict[str, Any]:
    """Nested objects as "lengths.mean": value; lists, hashes and the tokenizer's description are left out."""
    out: Dict[str, Any] = {}
    for key, value in document.items():
        if isinstance(value, dict) and key != "codec" and prefix.count(".") < 2:
            out.update(flatten(value, "%s%s." % (prefix, key)))
        elif not isinstance(value, (list, dict)) and key != "hash":
            out[prefix + str(key)] = float("%.4g" % value) if isinstance(value, float) else value
    return out


def proofs_section(out: Path, run: Optional[RunConfig]) -> str:
    parts = []
    test = facts.document(out / "resolved" / "self_test.json")
    if test:
        verdict = "passed" if test.get("ok") is True else "NOT passed"
        parts.append("<h3>Self-test of this installation against transformers: %s</h3>" % verdict)
        parts.append(table(list(flatten({"worst relative difference": test.get("worst"), "seconds": test.get("seconds")}).items())))
    if run is not None and run.export is not None:
        proof = facts.document(Path(run.export.dir) / "proof.json")
        if proof:
            parts.append(proof_table(out, proof, run.export.dir))
    return "".join(parts)


def proof_table(out: Path, proof: Dict[str, Any], where: str) -> str:
    verdict = "holds" if proof.get("holds") is True else "does NOT hold"
    flat = flatten(proof)
    rows = [
        ("export", where), ("checkpoint", proof.get("checkpoint")), ("step", proof.get("step")), ("dtype", proof.get("dtype")),
        ("tensors compared", flat.get("tensors.compared")), ("logits, relative difference", flat.get("logits.relative")),
        ("tolerance", proof.get("tolerance")),
    ]  # fmt: skip
    failures = proof.get("failures")
    if isinstance(failures, list) and failures:
        rows.append(("failures", "; ".join(str(failure) for failure in failures)))
    return "<h3>Proof that the export is the model that was trained: it %s</h3>%s" % (verdict, table(rows))


def starts_section(out: Path) -> str:
    known = facts.sessions(out)[-MOST_ROWS:]
    rows = [(s.get("began"), s.get("step"), s.get("ended"), s.get("state"), s.get("line")) for s in known]
    return wide(("began", "after step", "ended", "how", "why"), rows) if rows else ""
