"""Reads the fenced blocks of a Markdown page and says who runs each."""

import re
from pathlib import Path
from typing import List, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
FENCE = re.compile(r"(?:^<!-- (?P<tag>[^\n]+?) -->\n)?^```(?P<lang>\w+)\n(?P<body>.*?)^```$", re.M | re.S)


class Block(NamedTuple):
    lang: str
    tag: str  # "", "file: NAME" or "run by: LANE"
    body: str

    @property
    def file(self) -> str:
        return self.tag[len("file: ") :] if self.tag.startswith("file: ") else ""


def blocks(text: str) -> List[Block]:
    return [Block(m["lang"], m["tag"] or "", m["body"]) for m in FENCE.finditer(text)]
