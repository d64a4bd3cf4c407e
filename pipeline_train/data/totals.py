"""What all blocks of a data file have given together, and what of it is said."""

import hashlib
import json
from typing import Any, Dict, List, Optional

import numpy as np

from ..errors import UserError
from .block_encoder import LOST_SHOWN, Encoded
from .records import SHOWN, listing

COUNTED = ("truncated", "dropped", "continued", "nothing_to_learn")
UNUSED_SHOWN = 8
MOST = {"bad": SHOWN, "too_long": SHOWN, "lost": LOST_SHOWN}


class Totals:
    """Counts, the first messages and the histogram of lengths. Independent of the file's name: what is kept in a cache serves the
    same bytes under another one."""

    def __init__(self, seq_len: int, on_bad: str) -> None:
        self.seq_len, self.on_bad = seq_len, on_bad
        self.counts: Dict[str, int] = {}
        self.shown: Dict[str, List[str]] = {name: [] for name in MOST}
        self.lengths = np.zeros(seq_len + 1, np.int64)  # samples of each length

    @property
    def failed(self) -> bool:
        """Nothing more is kept: the rest of the file is only looked through."""
        return self.on_bad == "fail" and self["bad"] > 0

    def __getitem__(self, name: str) -> int:
        return self.counts.get(name, 0)

    def add(self, counts: Dict[str, int], shown: Dict[str, List[str]], lengths: np.ndarray) -> None:
        for name, number in counts.items():
            self.counts[name] = self[name] + number
        for name, lines in shown.items():
            self.shown[name] = (self.shown[name] + lines)[: MOST[name]]
        self.lengths += np.bincount(lengths, minlength=self.seq_len + 1)

    def add_checked(self, part: Encoded) -> None:
        """A block behind the first bad record. One that was in work already may have asked the template, the first bad one of its
        own then; how many processes there are must not be seen in what is said."""
        refused = part.counts.get("refused", 0)
        counts = {"records": part.counts["records"] + refused, "bad": part.counts["bad"] - refused}
        self.add(counts, {"bad": part.shown["bad"][refused:]}, np.zeros(0, np.int64))

    def check(self, path: str, over_long: str) -> None:
        """Raises UserError: bad records, none at all, over-long ones that are to be refused, nothing to learn."""
        if self["bad"] and (self.on_bad == "fail" or not self["records"]):
            head = "%s: %d bad record%s" % (path, self["bad"], "" if self["bad"] == 1 else "s")
            head += " (data.on_bad: skip leaves them out):" if self["records"] else " and no good one:"
            raise UserError(listing(head, self.said("bad", path), self["bad"]))
        if not self["records"]:
            raise UserError("%s: holds no records" % path)
        if self["too_long"]:
            head = "%s: %d records over data.seq_len (%d) and data.over_long is fail:" % (path, self["too_long"], self.seq_len)
            raise UserError(listing(head, self.said("too_long", path), self["too_long"]))
        if not self["learnt_tokens"]:
            counts = ", ".join("%d %s" % (self[name], name.replace("_", " ")) for name in COUNTED)
            raise UserError(
                "%s: nothing to learn in %d records (%s). Answers are learnt, and all of a pretrain text; a prompt longer than "
                "data.seq_len (%d) leaves no room for its answer." % (path, self["records"], counts, self.seq_len)
            )

    def said(self, name: str, path: str) -> List[str]:
        return [path + line for line in self.shown[name]]

    def facts(self) -> Dict[str, Any]:
        """For JSON: all but the histogram, of which only what is shown is left."""
        counts = dict(sorted(self.counts.items()))
        return {"counts": counts, "shown": self.shown, "lengths": statistics(self.lengths), "samples": int(self.lengths.sum()),
                "tokens": int((self.lengths * np.arange(self.seq_len + 1)).sum())}  # fmt: skip


def sealed(facts: Dict[str, Any], key: str) -> Dict[str, Any]:
    """With a hash of all of them and of what they belong to."""
    return dict(facts, seal=_seal(facts, key))


def unsealed(text: bytes, key: str, *inside: str) -> Optional[Dict[str, Any]]:
    """The facts in a JSON file, ``inside`` it under these names, exactly as ``sealed`` has written them; None: anything else."""
    try:
        found = json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError):
        return None
    for name in inside:
        found = found.get(name) if isinstance(found, dict) else None
    return found if isinstance(found, dict) and found.get("seal") == _seal(found, key) else None


def _seal(facts: Dict[str, Any], key: str) -> str:
    rest = {name: value for name, value in facts.items() if name != "seal"}
    return hashlib.sha256(json.dumps([key, rest], sort_keys=True).encode("ascii")).hexdigest()


def document(facts: Dict[str, Any], path: str, seq_len: int, notes: List[str]) -> Dict[str, Any]:
    """What ``facts`` of a file of this name are told as: see store.prepare. ``notes`` are warnings about the tokenizer."""
    counts: Dict[str, int] = facts["counts"]
    kinds = {name[len("kind.") :]: n for name, n in sorted(counts.items()) if name.startswith("kind.")}
    bad_lines = [path + line for line in facts["shown"]["bad"]]
    return {
        "file": path, "records": counts["records"], "bad": counts["bad"], "bad_lines": bad_lines,
        "kinds": kinds, "samples": facts["samples"], "tokens": facts["tokens"], "learnt_tokens": counts["learnt_tokens"],
        "seq_len": seq_len, **{name: counts.get(name, 0) for name in COUNTED}, "lengths": facts["lengths"],
        "warnings": list(notes) + _warnings(counts, [path + line for line in facts["shown"]["lost"]], path, seq_len),
    }  # fmt: skip


def _warnings(counts: Dict[str, int], lost: List[str], path: str, seq_len: int) -> List[str]:
    found = []
    if counts["blank_inputs"]:
        found.append('%s: "input": "" counts as no input (%d records)' % (path, counts["blank_inputs"]))
    unused = sorted((-n, name[len("unused.") :]) for name, n in counts.items() if name.startswith("unused."))
    if unused:
        named = ", ".join("%s (%d records)" % (key, -n) for n, key in unused[:UNUSED_SHOWN])
        more = ", and %d more" % (len(unused) - UNUSED_SHOWN) if len(unused) > UNUSED_SHOWN else ""
        found.append("%s: nothing is made of these keys: %s%s" % (path, named, more))
    if lost:
        more = ", and %d more" % (counts["lost"] - len(lost)) if counts["lost"] > len(lost) else ""
        found.append(
            "%d records are lost: within data.seq_len (%d) there is no room for an answer: %s%s"
            % (counts["lost"], seq_len, ", ".join(lost), more)
        )
    if counts["stops_inside"]:
        found.append(
            "%s: %d learnt texts hold an end token of the model in their middle; it would learn to stop there"
            % (path, counts["stops_inside"])
        )
    unlearnt = counts.get("nothing_to_learn", 0) + counts.get("dropped", 0)
    if 2 * unlearnt > counts["records"]:  # the last one, which stands out
        found.append(
            "%s: MOST OF IT IS NOT LEARNT: %d of %d records give nothing; raise data.seq_len (%d), or see what their answers are"
            % (path, unlearnt, counts["records"], seq_len)
        )
    return found


def statistics(histogram: np.ndarray) -> Dict[str, float]:
    """Of positions of a sample, from how many samples have each number of them; as numpy.percentile has it."""
    samples = int(histogram.sum())
    behind = np.cumsum(histogram)

    def at(rank: int) -> int:
        return int(np.searchsorted(behind, rank, side="right"))

    def percentile(part: float) -> float:
        rank = part * (samples - 1)
        low = at(int(rank))
        return low + (at(min(int(rank) + 1, samples - 1)) - low) * (rank - int(rank))

    total = int((histogram * np.arange(len(histogram))).sum())
    return {"min": at(0), "median": percentile(0.5), "mean": round(total / samples, 1), "p95": percentile(0.95),
            "max": at(samples - 1)}  # fmt: skip
