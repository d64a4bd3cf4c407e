"""pytorch_model.bin files, written one tensor at a time: what torch.save would write of the same state dict, in torch's zip format.

The archive holds <name>/data.pkl, a pickled dictionary whose tensors point to storages by number; <name>/data/<number>, the bytes
of each; <name>/version (pytorch, torch/serialization.py and caffe2/serialize/inline_container.h).
"""

import io
import json
import pickle
import zipfile
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, List, Set, Tuple

import torch
from torch._utils import _rebuild_tensor_v2

from pipeline_train.weights import Source, same_bits
from pipeline_train.weights.files import open_file
from pipeline_train.weights.writing import Item, bytes_of

INDEX = "pytorch_model.bin.index.json"
STORAGES = {"F32": torch.FloatStorage, "F16": torch.HalfStorage, "BF16": torch.BFloat16Storage}
Pieces = Callable[[Item], Iterable[torch.Tensor]]  # the values of a tensor, flat, in order


class _Tensor:
    """Stands for a tensor in the pickle; reading it makes one."""

    def __init__(self, item: Item, number: int) -> None:
        self.item, self.number = item, number

    def __reduce__(self) -> Tuple[Any, ...]:
        stride = 1
        strides: List[int] = []
        for n in reversed(self.item.shape):
            strides.insert(0, stride)
            stride *= n
        return _rebuild_tensor_v2, (_Storage(self.item, self.number), 0, self.item.shape, tuple(strides), False, {})


class _Storage:
    def __init__(self, item: Item, number: int) -> None:
        self.item, self.number = item, number


class _Pickler(pickle.Pickler):
    def persistent_id(self, thing: Any) -> Any:
        if not isinstance(thing, _Storage):
            return None
        count = 1
        for n in thing.item.shape:
            count *= n
        return "storage", STORAGES[thing.item.dtype], str(thing.number), "cpu", count


def write(path: Path, items: List[Item], pieces: Pieces) -> None:
    """One file of ``items``: the same bytes whenever it is written. OSError passes through."""
    page = io.BytesIO()
    _Pickler(page, protocol=2).dump({item.name: _Tensor(item, number) for number, item in enumerate(items)})
    with zipfile.ZipFile(str(path), "w", zipfile.ZIP_STORED) as archive:

        def entry(name: str) -> zipfile.ZipInfo:
            return zipfile.ZipInfo("%s/%s" % (path.stem, name))  # with no date of today's

        archive.writestr(entry("data.pkl"), page.getvalue())
        archive.writestr(entry("byteorder"), "little")
        for number, item in enumerate(items):
            with archive.open(entry("data/%d" % number), "w", force_zip64=True) as file:
                for piece in pieces(item):
                    file.write(bytes_of(piece))
        archive.writestr(entry("version"), "3\n")


def plan(shards: List[Tuple[str, List[Item]]]) -> List[Tuple[str, List[Item]]]:
    """The .bin files that hold what these safetensors files hold."""
    return [(name.replace("model", "pytorch_model", 1).replace(".safetensors", ".bin"), items) for name, items in shards]


def write_index(folder: Path, planned: List[Tuple[str, List[Item]]]) -> None:
    if len(planned) > 1:
        weight_map = {item.name: name for name, items in planned for item in items}
        index = {"metadata": {"total_size": sum(i.nbytes for _, items in planned for i in items)}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def files(folder: Path) -> Set[str]:
    """The .bin files of a folder, and their index."""
    found = {path.name for path in folder.glob("pytorch_model*.bin")}
    return found | ({INDEX} if (folder / INDEX).is_file() else set())


def differing(target: Source, names: Dict[str, Tuple[int, str]]) -> List[str]:
    """What is wrong with the .bin files of an export, as lines: they must hold exactly ``names`` (-> layer, slot name), with the
    bits of the safetensors files. Raises UserError for a file that is not whole."""
    wrong: List[str] = []
    seen: Set[str] = set()
    for name in sorted(files(target.folder) - {INDEX}):
        file = open_file(target.folder / name)
        for key in file.entries:
            seen.add(key)
            if key not in names:
                wrong.append("%s: holds %s, which the safetensors files do not" % (name, key))
                continue
            pairs = zip(file.pieces(key), target.pieces(*names[key]))
            same = file.entries[key] == target.entry(*names[key]) and all(same_bits(a, b) for a, b in pairs)
            if not same:
                wrong.append("%s: %s differs from the safetensors file's" % (name, key))
        file.close()
    return wrong + ["pytorch_model.bin: %s is missing" % key for key in sorted(set(names) - seen)]
