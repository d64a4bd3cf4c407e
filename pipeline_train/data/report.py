"""What ``pipedock data`` and a starting run show of the encoded data: counts, packing, and a sample with its learnt span."""

from pathlib import Path
from typing import Any, Dict, List

import numpy as np

from . import arrays
from .encode import TextCodec
from .feed import Feed

SHOWN_IDS = 400  # of the sample that is shown
OPEN, CLOSE = "⟦", "⟧"  # around learnt text where there is no colour
GREEN, PLAIN = "\x1b[1;32m", "\x1b[0m"


def describe(feed: Feed, codec: TextCodec, folder: Path, which: str) -> Dict[str, Any]:
    """The statistics of ``prepare`` and, for an epoch: rows, packing_efficiency, steps; ``sample``: the first one in pieces."""
    found = {k: v for k, v in feed.statistics.items() if k not in ("codec", "facts", "key")}
    found["rows"] = feed.rows
    found["packing_efficiency"] = round(feed.efficiency(), 4)
    found["steps_per_epoch"] = feed.steps_per_epoch
    found["sample"] = sample(codec, folder, which)
    return found


def sample(codec: TextCodec, folder: Path, which: str, number: int = 0) -> Dict[str, Any]:
    """One encoded sample as [{"text", "learnt"}], decoded from the files that training reads."""
    start, length, _ = arrays.load(folder / (which + ".offsets.npy"))[number].tolist()
    stop = start + min(length + 1, SHOWN_IDS)
    ids = arrays.load(folder / (which + ".ids.npy"))[start:stop].tolist()
    learn = np.asarray(arrays.load(folder / (which + ".learn.npy"))[start:stop])
    edges = [0] + (np.flatnonzero(learn[1:] != learn[:-1]) + 1).tolist() + [len(ids)]
    pieces: List[Dict[str, Any]] = []
    before = ""
    for begin, end in zip(edges, edges[1:]):
        text = codec.decode(ids[:end])  # decoded from the start: sentencepiece drops the blank of a first word
        pieces.append({"text": text[len(before) :], "learnt": bool(learn[begin])})
        before = text
    return {"pieces": pieces, "ids": length + 1, "shown": len(ids)}


def text(document: Dict[str, Any], colour: bool = False) -> str:
    """The document of ``pipedock data`` for a person."""
    lines = _counts(document)
    if "eval" in document:
        lines += ["", "eval"] + _counts(document["eval"])
    shown = document["sample"]
    how = "in green" if colour else "between %s and %s" % (OPEN, CLOSE)
    cut = "" if shown["shown"] == shown["ids"] else ", its first %d tokens" % shown["shown"]
    lines += ["", "first sample%s (%s template), learnt %s:" % (cut, document["template"], how)]
    opening, closing = (GREEN, PLAIN) if colour else (OPEN, CLOSE)
    lines.append("".join(opening + p["text"] + closing if p["learnt"] else p["text"] for p in shown["pieces"]))
    warnings = document.get("eval", {}).get("warnings", []) + document["warnings"]
    lines += ["warning: %s" % line for line in dict.fromkeys(warnings)]  # last, where they are seen
    return "\n".join(lines)


def _counts(found: Dict[str, Any]) -> List[str]:
    lengths = found["lengths"]
    kinds = ", ".join("%d %s" % (n, kind) for kind, n in sorted(found["kinds"].items()))
    lines = [
        "%s: %d records (%s), %d bad" % (found["file"], found["records"], kinds, found["bad"]),
        "tokens      %d, learnt %d (%.1f %%)"
        % (found["tokens"], found["learnt_tokens"], 100.0 * found["learnt_tokens"] / found["tokens"]),
        "lengths     min %(min)d, median %(median).0f, mean %(mean).1f, p95 %(p95).0f, max %(max)d" % lengths,
        "seq_len %d  truncated %d, dropped %d, continued in the next row %d, nothing to learn %d"
        % (found["seq_len"], found["truncated"], found["dropped"], found["continued"], found["nothing_to_learn"]),
        "rows        %d, %.1f %% filled, %d steps an epoch"
        % (found["rows"], 100.0 * found["packing_efficiency"], found["steps_per_epoch"]),
    ]
    return lines + ["skipped: %s" % line for line in found["bad_lines"]]
