"""Checkpoints that lie scattered over nodes without a shared disk. Standard library only.

Every node's folder has the same manifest.json, with one key more, and the files that the node's own ranks wrote:

    "where": {"nodes": ["gpu-a", "gpu-b"],                 the names, by number
              "files": {"layer_000.safetensors": [0], ...}} the nodes that wrote each listed file

Beside it a file named ``node`` holds this node's number. A file that other nodes wrote may be missing: the folder is whole for
its node all the same. One without the file ``node`` must hold everything.
"""

import os
from pathlib import Path
from typing import Any, Dict, Iterable, List, Optional

from .errors import UserError
from .manifest_values import short

NODE = "node"
TOGETHER = "--nodes N --node-rank R --master-addr A"  # options of gather, on every node


def of(nodes: List[str], files: Dict[str, List[int]]) -> Dict[str, Any]:
    """The value of "where". ``files``: name -> numbers of the nodes that wrote it."""
    return {"nodes": list(nodes), "files": {name: sorted(set(numbers)) for name, numbers in files.items()}}


def check(document: Dict[str, Any], where: str) -> None:
    """The key "where", if it is there. ``where``: the manifest's path. Raises UserError."""
    if "where" not in document:
        return
    found = document["where"]
    nodes, files = (found.get("nodes"), found.get("files")) if isinstance(found, dict) else (None, None)
    if not (isinstance(nodes, list) and nodes and all(isinstance(name, str) and name and name.isprintable() for name in nodes)):
        raise UserError("%s: where.nodes: missing or not names of nodes (%s)" % (where, short(nodes)))
    if not isinstance(files, dict) or set(files) != set(document["files"]):
        raise UserError("%s: where.files: does not name the files that it lists" % where)
    for name, numbers in files.items():
        fine = isinstance(numbers, list) and numbers and all(type(n) is int and 0 <= n < len(nodes) for n in numbers)
        if not fine:
            raise UserError("%s: where.files: %s: not numbers of its %d nodes" % (where, short(name), len(nodes)))


def node_of(folder: Path, document: Dict[str, Any]) -> Optional[int]:
    """Whose part of the checkpoint the folder is; None: it must hold everything. Raises UserError, OSError."""
    if "where" not in document:
        return None
    path = Path(folder) / NODE
    try:
        text = path.read_text(encoding="utf-8", errors="replace").strip()
    except (FileNotFoundError, NotADirectoryError):
        return None
    if not (text.isascii() and text.isdigit() and len(text) < 9 and int(text) < len(document["where"]["nodes"])):
        raise UserError("%s: %s is not the number of one of the %d nodes in manifest.json; use another checkpoint"
                        % (path, short(text), len(document["where"]["nodes"])))  # fmt: skip
    return int(text)


def absent(folder: Path, document: Dict[str, Any]) -> List[str]:
    """Listed files that are not in the folder, in order; after manifest.read only those of other nodes can be."""
    return [name for name in sorted(document["files"]) if not os.path.lexists(str(Path(folder) / name))]


def bring(path: Path, everywhere: bool = False) -> str:
    """The command that brings what is missing. ``everywhere``: not to node 0 alone."""
    everywhere_too = " --everywhere" if everywhere else ""
    return "pipedock gather --input %s --hostfile F; without ssh, on every node, with %s%s" % (path, TOGETHER, everywhere_too)


def require(folder: Path, document: Dict[str, Any], names: Iterable[str], everywhere: bool = False) -> None:
    """Whether these files are here. ``document``: what manifest.read gave. Raises UserError, one line, saying which nodes have the
    missing ones and what brings them (see ``bring``)."""
    wanted = set(names)
    missing = [name for name in absent(folder, document) if name in wanted]
    if not missing:
        return
    more = " and %d more file%s" % (len(missing) - 1, "s" * (len(missing) > 2)) if len(missing) > 1 else ""
    lie, them = ("lie", "them") if more else ("lies", "it")
    what = "%s%s %s on %s: bring %s with" % (missing[0], more, lie, holders(document, missing), them)
    raise UserError("%s: %s %s" % (folder, what, bring(folder, everywhere)))


def holders(document: Dict[str, Any], names: List[str]) -> str:
    """The first node that wrote each of these files, as words."""
    if "where" not in document:
        return "another node"
    found = sorted({document["where"]["files"][name][0] for name in names})
    said = ", ".join("%d (%s)" % (number, document["where"]["nodes"][number]) for number in found)
    return "node%s %s" % ("s" if len(found) > 1 else "", said)
