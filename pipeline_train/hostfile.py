"""DeepSpeed's hostfile: one ``name slots=N`` a line, ``#`` begins a comment. Standard library only."""

import re
from pathlib import Path
from typing import List, NamedTuple

from .errors import UserError

LINE = re.compile(r"(\S+)\s+slots\s*=\s*(\d+)")


class Host(NamedTuple):
    """``slots``: processes, one per GPU, that may run there. ``where``: "file:line"."""

    name: str
    slots: int
    where: str


def read(path: Path) -> List[Host]:
    """Raises UserError naming the line."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError("%s: cannot be read: %s" % (path, getattr(error, "strerror", None) or error)) from None
    hosts: List[Host] = []
    for number, line in enumerate(lines, 1):
        text, where = line.partition("#")[0].strip(), "%s:%d" % (path, number)
        found = LINE.fullmatch(text)
        if not text:
            continue
        if found is None or text.startswith("-") or not 1 <= int(found.group(2)) <= 4096:
            raise UserError('%s: expected "name slots=N", such as "node1 slots=8"; found %.60r' % (where, text))
        if found.group(1) in [host.name for host in hosts]:
            raise UserError("%s: %s is named twice" % (where, found.group(1)))
        hosts.append(Host(found.group(1), int(found.group(2)), where))
    if not hosts:
        raise UserError('%s: names no machine; write lines such as "node1 slots=8"' % path)
    return hosts


def check(host: Host, world: int, gpus: int) -> None:
    """Can ``world`` processes run on this machine, which has ``gpus`` GPUs (0: the CPU, any number)? Raises UserError."""
    if gpus and host.slots > gpus:
        raise UserError("%s: %s has slots=%d, but %d GPUs. Lower the slots." % (host.where, host.name, host.slots, gpus))
    if world > host.slots:
        raise UserError("%s: %d slots, but parallel: pipe x data needs %d processes. Raise the slots or lower the run."
                        % (host.where, host.slots, world))  # fmt: skip
