"""The servers that can be started, by version: serve/engines.json, the one place that pins them. Standard library only."""

import json
import os
import re
from typing import Any, Dict, List, NamedTuple, Optional

from pipeline_train.errors import UserError

TABLE = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "engines.json")


class Engine(NamedTuple):
    """``line``: the version that the rules are written for ("0.8", "3.3"). ``version``: the whole one."""

    name: str
    line: str
    version: str
    image: str  # with its tag
    digest: Optional[str]
    cuda: str  # of the image: what its driver must be able to run
    same: bool  # the pinned version itself, not another one of its line


def table() -> List[Dict[str, Any]]:
    """The rows of engines.json, as they are there."""
    with open(TABLE, encoding="utf-8") as file:
        return list(json.load(file)["engines"])


def find(engine: str, version: Optional[str]) -> Engine:
    """ "0.8", "3.3", "3.3.7" or None (the newest pinned) -> the engine. Raises UserError naming those there are."""
    rows = [row for row in table() if row["engine"] == engine]
    if not rows:
        names = sorted({row["engine"] for row in table()})
        raise UserError("--engine %s: not a server that runs in a container here: %s" % (engine, ", ".join(names)))
    if version is None:
        return _engine(rows[-1], rows[-1]["tag"].lstrip("v"))
    asked = version.lstrip("v")
    for row in rows:
        whole = row["tag"].lstrip("v")
        if asked in (row["version"], whole):
            return _engine(row, whole)
        if re.fullmatch(re.escape(row["version"]) + r"\.\d+", asked):
            return _engine(row, asked)
    known = ", ".join("%s (%s)" % (row["version"], row["tag"].lstrip("v")) for row in rows)
    raise UserError("--version %s: its limits are not known; known of %s: %s" % (version, engine, known))


def _engine(row: Dict[str, Any], whole: str) -> Engine:
    pinned = row["tag"].lstrip("v")
    tag = row["tag"].replace(pinned, whole)
    digest = row["digest"] if whole == pinned and row["digest"] != "unverified" else None
    return Engine(row["engine"], row["version"], whole, "%s:%s" % (row["image"], tag), digest, row["cuda"], whole == pinned)
