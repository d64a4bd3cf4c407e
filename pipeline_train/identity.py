"""Is it one run? What has to be the same on every node, as a flat document, and in words what is not.

code/<file>       sha256 of each .py of pipedock               versions/<package>  installed releases; Python without its patch
config/<a.b>      every key of run.yaml but PLACES, which name files and folders: they may lie elsewhere on another node, so
                  their contents are compared instead          data/<train|eval>   the data files
data/encoded/...  what was made of them, from <out>/data       weights/<file>      config.json and the weight files in use
"""

import hashlib
import json
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Tuple

import msgspec

from . import compat, content, manifest
from .config_schema import RunConfig
from .errors import UserError

Say = Callable[[str], None]  # takes a line for the user

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("pipeline_train", "export", "serve", "verbs")
PLACES = ("run.out", "model.path", "data.train", "data.eval", "data.cache", "export.dir", "serve")
MISSING = "missing"
ADVICE = {
    "code": "install the same pipedock on every node (the same commit, wheel or image)",
    "versions": "install one release of it on every node (the same lock file or image)",
    "config": "start every node with the same run.yaml and --set",
    "data": "give every node the same file (a shared folder, or rsync -a it from node 0)",
    "weights": "give every node the same files (a shared folder, or rsync -a model.path from node 0)",
}
SHOWN = 3  # files or nodes named in a line


def identity(
    run: RunConfig, say: Say, model: Optional[Path] = None, out: Optional[Path] = None, data: bool = True
) -> Dict[str, str]:
    """``model``: the folder that model.path means; without it the weights are left out, as for a resume, which reads none.
    ``out``: the run folder once its data is prepared. ``data``: compare the data files too; False where run.out is shared, and
    only node 0 reads them. Raises UserError for a file that cannot be read."""
    document = code()
    document.update(versions())
    document.update(_config(run))
    if data:
        document.update(_data(run, say))
    if out is not None:
        document.update(_encoded(out))
    if model is not None:
        document.update(_weights(run, model, say))
    return document


def code(packages: Sequence[str] = PACKAGES) -> Dict[str, str]:
    """sha256 of every source file of these packages, where they lie together, and of pipedock.py."""
    paths = [ROOT / "pipedock.py"] + [path for name in packages for path in (ROOT / name).rglob("*.py")]
    return {
        "code/" + path.relative_to(ROOT).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(paths)
        if path.is_file()
    }


def versions() -> Dict[str, str]:
    found = compat.versions()
    found["python"] = ".".join((found["python"] or "").split(".")[:2])
    return {"versions/" + name: version or "not installed" for name, version in found.items()}


def _config(run: RunConfig) -> Dict[str, str]:
    flat = dict(_flat(msgspec.to_builtins(run), ""))
    return {"config/" + key: value for key, value in flat.items() if not any(key == p or key.startswith(p + ".") for p in PLACES)}


def _flat(value: Any, name: str) -> Iterator[Tuple[str, str]]:
    if isinstance(value, dict) and value:
        for key in value:
            yield from _flat(value[key], "%s.%s" % (name, key) if name else str(key))
    else:
        yield name, json.dumps(value, ensure_ascii=False)


def _data(run: RunConfig, say: Say) -> Dict[str, str]:
    """A file that a node does not have is a difference, not an error here."""
    named = {name: Path(path) for name, path in (("train", run.data.train), ("eval", run.data.eval)) if path is not None}
    there = content.hashes([path for path in named.values() if path.is_file()], say)
    return {"data/" + name: there.get(path, MISSING) for name, path in named.items()}


def _encoded(out: Path) -> Dict[str, str]:
    found = {}
    for name in ("train", "eval"):
        try:
            document = json.loads((out / "data" / (name + ".json")).read_text(encoding="utf-8"))
            found["data/encoded/" + name] = str(document["hash"])
        except FileNotFoundError:
            continue
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError("%s: cannot be read: %s; delete it, it is made again"
                            % (out / "data" / (name + ".json"), getattr(error, "strerror", None) or error)) from None  # fmt: skip
    return found


def _weights(run: RunConfig, model: Path, say: Say) -> Dict[str, str]:
    """config.json, and of a model that is not begun at random its weight files."""
    paths = [path for path in (model / "config.json",) if path.is_file()]
    if run.model.init == "pretrained":
        paths += weight_files(model)
    return {"weights/" + path.name: digest for path, digest in content.hashes(paths, say).items()}


def weight_files(model: Path) -> List[Path]:
    """Of layer files (a checkpoint, a from-hf folder) those, else safetensors, else .bin, as weights.shards takes them."""
    patterns = ("layer_*",) if manifest.is_layer_folder(model) else ("model*.safetensors", "pytorch_model*.bin")
    return next((found for found in (sorted(model.glob(pattern)) for pattern in patterns) if found), [])


def digests(document: Dict[str, str]) -> Dict[str, str]:
    """{kind: 12 hex digits}: equal where all of that kind is."""
    kinds: Dict[str, List[str]] = {}
    for key in sorted(document):
        kinds.setdefault(key.partition("/")[0], []).append("%s %s" % (key, document[key]))
    return {kind: hashlib.sha256("\n".join(rows).encode("utf-8", "replace")).hexdigest()[:12] for kind, rows in kinds.items()}


def differences(documents: Sequence[Dict[str, str]], names: Sequence[str]) -> List[str]:
    """One line for each thing that is not the same on all nodes: what, on which nodes, what to do. ``documents`` and ``names`` of
    the nodes, by their numbers. Files of one kind that differ between the same nodes share a line."""
    grouped: Dict[Any, List[str]] = {}
    for key in sorted({key for document in documents for key in document}):
        values = [document.get(key, MISSING) for document in documents]
        if len(set(values)) > 1:
            kind = key.partition("/")[0]
            # Which nodes agree, and which have it at all: (0, 0, 1) where the third differs from the first two.
            pattern = tuple((values.index(value), value == MISSING) for value in values)
            grouped.setdefault((kind, key if kind in ("versions", "config") else pattern), []).append(key)
    return [_line(keys, documents, names) for keys in grouped.values()]


def _line(keys: List[str], documents: Sequence[Dict[str, str]], names: Sequence[str]) -> str:
    kind = keys[0].partition("/")[0]
    bare = [key.partition("/")[2] for key in keys]
    more = " and %d more" % (len(keys) - SHOWN) if len(keys) > SHOWN else ""
    holders: Dict[str, List[int]] = {}
    for number, document in enumerate(documents):
        holders.setdefault(document.get(keys[0], MISSING), []).append(number)
    said = []
    for value, numbers in holders.items():
        plain = value if kind in ("versions", "config") or value == MISSING else value[:12]
        said.append("%s on %s" % ("not there" if value == MISSING else plain[:60], nodes(numbers, names)))
    verb = "differ" if kind.endswith("s") else "differs"
    return "%s %s between the nodes: %s%s: %s; %s" % (kind, verb, ", ".join(bare[:SHOWN]), more, ", ".join(said), ADVICE[kind])


def nodes(numbers: Sequence[int], names: Sequence[str]) -> str:
    """ "node 1 (b), node 3 (d) and 5 more"."""
    shown = ", ".join("node %d (%s)" % (number, names[number]) for number in numbers[:SHOWN])
    return shown + (" and %d more" % (len(numbers) - SHOWN) if len(numbers) > SHOWN else "")
