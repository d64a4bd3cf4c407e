"""What the values of a manifest.json must be. Whatever it holds instead ends in one line: it is read before it is believed.
Standard library only."""

import re
from datetime import datetime
from typing import Any, Dict

from .errors import UserError

FORMAT = "pipedock-layers/1"
KINDS = ("checkpoint", "from-hf")
DTYPES = ("fp32", "bf16", "fp16")

# key -> what it must be; "step" and "run_name" are None in a from-hf folder
KEYS: Dict[str, Any] = {
    "format": str, "kind": str, "family": str, "run_dtype": str, "layer_dtype": str, "tied": bool, "layers": int,
    "step": (int, type(None)), "files": dict, "versions": dict, "run_name": (str, type(None)),
}  # fmt: skip
# A checkpoint also has "training": what only a resumed run reads. TRAINING: its keys; FEED: of "feed", those that are there
TRAINING: Dict[str, Any] = {"optimizer": str, "optimizer_steps": int, "feed": dict, "loss_scaler": dict}
FEED: Dict[str, Any] = {"seq_len": int, "rows_per_step": int, "pack": bool, "seed": int, "data": str, "now": str}
SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")  # what the loss scaler remembers
ABSENT = object()
LARGEST = 1 << 53  # of a number: whole in every number type
STEP = re.compile(r"step_([0-9]+)")


def check_keys(document: Any, where: str) -> None:
    """The keys of every manifest. ``where``: its path. Raises UserError."""
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        found = document.get("format") if isinstance(document, dict) else type(document).__name__
        found = found if isinstance(found, str) and found.isprintable() else short(found)
        raise UserError("%s: expected format %s, found %s; it was written by another version or program" % (where, FORMAT, found))
    for key, kind in KEYS.items():
        _check(where, key, document.get(key, ABSENT), kind)
    if document["kind"] == "checkpoint" and not isinstance(document.get("training"), dict):
        raise _wrong(where, "training", document.get("training"))
    if document["kind"] not in KINDS:
        raise UserError("%s: kind: expected one of %s, found %s" % (where, ", ".join(KINDS), short(document["kind"])))
    if document["run_dtype"] not in DTYPES:
        raise UserError("%s: run_dtype: expected one of %s, found %s" % (where, ", ".join(DTYPES), short(document["run_dtype"])))
    if document["layers"] < 1:
        raise _wrong(where, "layers", document["layers"])


def check_step(document: Dict[str, Any], folder: str, where: str) -> None:
    """A checkpoint tells its step; in a folder named step_*, that one. Raises UserError."""
    step, named = document["step"], STEP.fullmatch(folder)
    if document["kind"] != "checkpoint":
        return
    if step is None or step < 0:
        raise _wrong(where, "step", step)
    if named is not None and int(named.group(1)) != step:
        raise UserError("%s: step: %d, but the folder is named %s; use another checkpoint" % (where, step, folder))


def check_training(document: Dict[str, Any], where: str) -> None:
    """What only a resumed run reads. Raises UserError."""
    if document["kind"] != "checkpoint":
        raise UserError("%s: kind: a run resumes from a checkpoint, this is %s" % (where, document["kind"]))
    training = document["training"]
    for key, kind in TRAINING.items():
        _check(where, "training.%s" % key, training.get(key), kind)
    feed = training["feed"]
    for key, kind in FEED.items():
        if key in feed:
            _check(where, "training.feed.%s" % key, feed[key], kind)
    for key, value in training["loss_scaler"].items():
        if key not in SCALER or type(value) not in (int, float) or not -LARGEST <= value <= LARGEST:
            raise _wrong(where, "training.loss_scaler.%s" % short(key), value)
    if training["optimizer_steps"] < 0:
        raise _wrong(where, "training.optimizer_steps", training["optimizer_steps"])
    for key, value in (("optimizer", training["optimizer"]), ("feed.data", feed.get("data", ""))):
        if not value.isprintable():  # messages quote it
            raise _wrong(where, "training.%s" % key, value)
    try:
        datetime.fromisoformat(feed.get("now", "2000-01-01"))
    except ValueError:
        raise _wrong(where, "training.feed.now", feed["now"]) from None


def short(value: Any) -> str:
    """On one line, whatever it is. A list or a dictionary is only named: it may be nested deeper than can be printed."""
    if isinstance(value, (list, dict)):
        return "a %s" % type(value).__name__
    text = ascii(value)
    return text if len(text) <= 60 else text[:60] + "..."


def _wrong(where: str, key: str, value: Any) -> UserError:
    return UserError("%s: %s: missing or not what it should be (%s)" % (where, key, short(None if value is ABSENT else value)))


def _check(where: str, key: str, value: Any, kind: Any) -> None:
    """A truth value is no number, and no number is beyond LARGEST."""
    fits = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
    if not fits or isinstance(value, int) and not -LARGEST <= value <= LARGEST:
        raise _wrong(where, key, value)
