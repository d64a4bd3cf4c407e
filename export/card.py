"""The model card of an export: where the model comes from, what it was trained on and how, and, once it is proved, the proof's
figures.

Everything is read from files that may be missing: of a run (<out>/resolved/run.yaml, <out>/data/train.json, <out>/metrics.jsonl),
of the base model (the front matter of its README.md, its licence files). What is not there is left out, never guessed.
"""

import html
import json
import re
import shutil
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

from pipeline_train.weights import Source

NAME, CURVE = "README.md", "loss.svg"
LICENCES = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*", "COPYING*")
BEGIN, END = "<!-- proof: written by pipedock verify -->", "<!-- end of proof -->"
WIDTH, HEIGHT, EDGE = 640, 240, 40  # of the curve, in pixels
COUNTS = ("records", "bad", "truncated", "dropped", "nothing_to_learn", "tokens", "learnt_tokens", "rows", "seq_len", "hash")


def write(folder: Path, source: Source, about: Dict[str, Any], name: str) -> None:
    """README.md, the loss curve and the base model's licence files into the export ``folder``. ``about``: target, dtype, step,
    versions; ``name``: the title where the run has none. Raises OSError."""
    run = _run_of(source)
    settings = _yaml(run / "resolved" / "run.yaml") if run else {}
    base = _base(source, settings)
    licence = _front_matter(base / NAME if base else None)
    copied = _copy_licences(base, folder) if base else []
    front = {"library_name": "transformers", "base_model": _base_name(source, settings), **licence}
    lines = (
        ["---"] + ["%s: %s" % (key, json.dumps(value, ensure_ascii=False)) for key, value in front.items() if value] + ["---", ""]
    )
    lines += ["# %s" % (settings.get("run", {}).get("name") or name), ""]
    lines += _origin(source, about, front, copied) + ["", BEGIN, "Not proved yet: run `pipedock verify`.", END, ""]
    if run is not None:
        lines += _training(run, folder)
    lines += ["## Versions", ""] + ["- %s %s" % item for item in sorted(about["versions"].items()) if item[1]]
    (folder / NAME).write_text("\n".join(lines) + "\n", encoding="utf-8")


def prove(folder: Path, proof: Dict[str, Any]) -> None:
    """Put the figures of a proof into the card, if there is one of ours."""
    path = folder / NAME
    try:
        before, rest = path.read_text(encoding="utf-8").split(BEGIN, 1)
        after = rest.split(END, 1)[1]
    except (OSError, ValueError, IndexError):
        return
    path.write_text(before + BEGIN + "\n" + "\n".join(_figures(proof)) + "\n" + END + after, encoding="utf-8")


def _origin(source: Source, about: Dict[str, Any], front: Dict[str, Any], copied: List[str]) -> List[str]:
    lines = ["Written by pipedock for `%(target)s`, %(dtype)s." % about]
    if about["step"] is not None:
        lines.append("Fine-tuned from `%s`: step %d." % (front["base_model"] or "random weights", about["step"]))
    if copied:
        lines.append("The base model's terms apply: %s." % ", ".join("[%s](%s)" % (name, name) for name in copied))
    elif not front.get("license"):
        lines.append("The base model names no licence here; see where it came from.")
    return lines


def _training(run: Path, folder: Path) -> List[str]:
    lines = ["## Training", ""]
    counts = _json(run / "data" / "train.json")
    found = ["%s %s" % (key, counts[key]) for key in COUNTS if isinstance(counts.get(key), (int, str))]
    if found:
        lines += ["Data: " + ", ".join(found) + ".", ""]
    points = losses(run / "metrics.jsonl")
    if len(points) > 1:
        (folder / CURVE).write_text(curve(points), encoding="utf-8")
        lines += [
            "![loss](%s)" % CURVE,
            "",
            "Loss %.4f at step %d, %.4f at step %d." % (points[0][1], points[0][0], points[-1][1], points[-1][0]),
            "",
        ]
    try:
        text = (run / "resolved" / "run.yaml").read_text(encoding="utf-8")
    except (OSError, ValueError):
        return lines
    return lines + ["```yaml", text.rstrip(), "```", ""]


def losses(path: Path) -> List[Tuple[int, float]]:
    """(step, loss) of the logged steps; what a resume made void is left out."""
    points: List[Tuple[int, float]] = []
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, ValueError):
        return []
    for line in lines:
        try:
            row = json.loads(line)
            if row["kind"] == "start":
                points = [point for point in points if point[0] <= row["step"]]
            elif row["kind"] == "step":
                points.append((int(row["step"]), float(row["loss"])))
        except (ValueError, KeyError, TypeError):
            continue
    return [point for point in points if abs(point[1]) < 1e30]


def curve(points: List[Tuple[int, float]]) -> str:
    """An SVG of the loss over the steps."""
    (low, high), (bottom, top) = ((min(v), max(v)) for v in zip(*points))
    across, up = (WIDTH - 2 * EDGE) / max(1, high - low), (HEIGHT - 2 * EDGE) / ((top - bottom) or 1)
    every = max(1, len(points) // WIDTH)
    kept = points[::every] + ([points[-1]] if (len(points) - 1) % every else [])
    places = " ".join("%.1f,%.1f" % (EDGE + (x - low) * across, HEIGHT - EDGE - (y - bottom) * up) for x, y in kept)
    labels = (
        (EDGE, HEIGHT - 12, "start", "step %d" % low), (WIDTH - EDGE, HEIGHT - 12, "end", "step %d" % high),
        (EDGE, 24, "start", "loss %.3f" % top), (WIDTH - EDGE, HEIGHT - EDGE + 12, "end", "%.3f" % bottom),
    )  # fmt: skip
    texts = "".join(
        '<text x="%d" y="%d" text-anchor="%s">%s</text>' % (x, y, side, html.escape(text)) for x, y, side, text in labels
    )
    head = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 %d %d" font-family="sans-serif" font-size="12">' % (WIDTH, HEIGHT)
    line = '<polyline fill="none" stroke="#2563eb" stroke-width="1.5" points="%s"/>' % places
    return '%s<rect width="100%%" height="100%%" fill="white"/>%s%s</svg>\n' % (head, line, texts)


def _figures(proof: Dict[str, Any]) -> List[str]:
    if not proof["holds"]:
        return ["**Does not hold**: %s" % proof["failures"][0]]
    logits, prompts = proof["logits"], proof["prompts"]
    compared = (prompts["rows"], prompts["tokens"], proof["tensors"]["compared"], logits["relative"])
    text = (
        "Proved equal to the trained model: %d prompts (%d tokens), %d tensors bit-equal, logits within %.2g of the largest in fp32"
    )
    lines = [text % compared]
    if "narrow" in logits:
        lines[0] += "; in %s the same likeliest token %.1f %% of the time, KL %.2g nats" % (
            proof["dtype"], 100 * logits["narrow"]["top1"], logits["narrow"]["kl"])  # fmt: skip
    return [lines[0] + ". Details: proof.json."]


def _run_of(source: Source) -> Optional[Path]:
    run = source.folder.parent.parent
    return run if source.kind == "checkpoint" and (run / "resolved").is_dir() else None


def _base(source: Source, settings: Dict[str, Any]) -> Optional[Path]:
    """The folder of the model that training started from; the source itself when nothing was trained."""
    if source.kind != "checkpoint":
        return source.folder
    model = settings.get("model", {})
    path = Path(str(model.get("path", "")))
    return path if model.get("init") != "random" and model.get("path") and path.is_dir() else None


def _base_name(source: Source, settings: Dict[str, Any]) -> Optional[str]:
    name = source.config.get("_name_or_path") or None
    model = settings.get("model", {})
    if model.get("init") == "random":
        return None
    path = str(model.get("path") or name or "")
    hub = re.search(r"models--([^/]+?)--([^/]+)/snapshots/", path)  # the hub's cache
    return "/".join(hub.groups()) if hub else path or None


def _front_matter(path: Optional[Path]) -> Dict[str, str]:
    """license, license_name and license_link of a model card."""
    try:
        text = path.read_text(encoding="utf-8") if path else ""
    except (OSError, ValueError):
        return {}
    block = re.match(r"---\n(.*?)\n---", text, re.S)
    found = re.findall(r"^(license(?:_name|_link)?): *[\"']?([^\"'\n]+?)[\"']? *$", block.group(1), re.M) if block else []
    return dict(found)


def _copy_licences(base: Path, folder: Path) -> List[str]:
    names = sorted({path.name for pattern in LICENCES for path in base.glob(pattern) if path.is_file()})
    for name in names:
        shutil.copyfile(str(base / name), str(folder / name))
    return names


def _yaml(path: Path) -> Dict[str, Any]:
    import yaml

    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return {key: value for key, value in document.items() if isinstance(value, dict)} if isinstance(document, dict) else {}


def _json(path: Path) -> Dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return document if isinstance(document, dict) else {}
