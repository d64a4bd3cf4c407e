"""The weight files of a Hugging Face folder, of any age: which there are and which keys they hold."""

import json
import os
import re
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, Iterator, Optional, Tuple

from ..errors import UserError
from ..families import ModelFamily
from .files import BinFile, open_file

# As transformers looks for them, except that safetensors win over .bin in any form.
CANDIDATES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


def first_file(folder: Path) -> Optional[str]:
    """The weight file or index that a loader starts from; None when there is none."""
    return next((c for c in CANDIDATES if (folder / c).is_file()), None)


def hf_keys(folder: Path, family: ModelFamily, wanted: Dict[str, Any]) -> Iterator[Tuple[str, Any, str]]:
    """(HF name with the family's prefix, file, key in the file) of every tensor. Raises UserError for a broken index or file."""
    name = first_file(folder)
    if name is None:
        hint = "; adapter_config.json says that it is a LoRA adapter: merge it into its base model first" \
            if (folder / "adapter_config.json").exists() else ""  # fmt: skip
        raise UserError("%s: no weights here (looked for %s)%s" % (folder, ", ".join(CANDIDATES), hint))
    keys = _indexed(folder / name, family) if name.endswith(".json") else _single(folder / name)
    for file, key in keys:
        yield _with_prefix(key, family, wanted), file, key


def _single(path: Path) -> Iterator[Tuple[Any, str]]:
    file = open_file(path)
    for key in file.entries:
        yield file, key
    file.close()


def _indexed(path: Path, family: ModelFamily) -> Iterator[Tuple[Any, str]]:
    """Keys of the shards: from each safetensors header, for .bin (a shard may be 10 GB) from the index, until it is opened."""
    index = _weight_map(path)
    files = {name: _shard(path, name, _index_check(path, index, name, family)) for name in sorted(set(index.values()))}
    for name, file in files.items():
        promised = [key for key, shard in index.items() if shard == name]
        if isinstance(file, BinFile):
            keys = promised
        else:
            keys = list(file.entries)
            absent = [key for key in promised if key not in file.entries]
            if absent:
                raise UserError("%s: %s is not in this file, although %s says so" % (file.path, absent[0], path.name))
        for key in keys:
            yield file, key


def _index_check(path: Path, index: Dict[str, str], shard: str, family: ModelFamily) -> Callable[[Iterable[str]], None]:
    """Compares the keys of an opened .bin shard with the index: none missing, none that belongs elsewhere or nowhere."""

    def check(keys: Iterable[str]) -> None:
        found = set(keys)
        where = path.parent / shard
        for key in sorted(key for key, name in index.items() if name == shard and key not in found):
            raise UserError("%s: %s is not in this file, although %s says so" % (where, key, path.name))
        for key in sorted(found):
            if key in index and index[key] != shard:
                raise UserError("%s: holds %s, too, which %s puts into %s" % (where, key, path.name, index[key]))
            if key not in index and not any(re.match(pattern, key) for pattern in family.ignorable):
                raise UserError("%s: holds %s, which %s does not list" % (where, key, path.name))

    return check


def _weight_map(path: Path) -> Dict[str, str]:
    try:
        index = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        fine = isinstance(index, dict) and index and all(isinstance(v, str) for v in index.values())
    except OSError as error:
        raise UserError("%s: cannot be read: %s" % (path, error.strerror)) from None
    except (ValueError, KeyError, TypeError, RecursionError):
        fine = False
    if not fine:
        raise UserError('%s: not an index of shards (expected JSON with "weight_map": {key: file})' % path)
    return index


def _shard(index: Path, name: str, check: Callable[[Iterable[str]], None]) -> Any:
    plain = name.isprintable() and Path(name).name == name and name not in ("", ".", "..") and "\\" not in name
    if not plain or not name.endswith((".safetensors", ".bin")):
        raise UserError(
            "%s: names %.80r, which is not a weight file of this folder; the index is not to be trusted" % (index, name)
        )
    path = index.parent / name
    if len(os.fsencode(name)) > 255 or not path.is_file():
        raise UserError("%s: names the shard %.80r, which is not there; the download is not complete" % (index, name))
    return open_file(path, check)


def _with_prefix(key: str, family: ModelFamily, wanted: Dict[str, Any]) -> str:
    """Old files lack the prefix of the base model ("h.0..." for "transformer.h.0...")."""
    longer = family.optional_prefix + key
    return longer if key not in wanted and longer in wanted else key
