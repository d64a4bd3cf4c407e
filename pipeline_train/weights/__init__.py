"""Weights, read strictly: by layer and slot name, only what is asked for, from every kind of folder a user has.

A key that is missing, extra or of another shape is an error that names it; nothing is ever skipped but the family's own list of
ignorable keys. Kinds of source:

    hf          config.json + model*.safetensors or pytorch_model*.bin, sharded or not, of any age; a hub name
    from-hf     layer files written by ``pipedock from-hf``
    checkpoint  layer files written by training (a run folder means its newest complete checkpoint)
"""

import os
import re
from itertools import zip_longest
from pathlib import Path
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Set, Tuple

import torch

from .. import families, manifest, manifest_where
from ..errors import RunFailed, UserError
from ..families import ParamSlot
from ..hub import resolve
from .files import Entry, SafetensorsFile, open_file, wrong_dtype
from .shards import first_file, hf_keys

__all__ = ["Entry", "Source", "find_folder", "open_source", "resolve", "same_bits"]

MOST_THREADS = 4  # that read, round and write one model: more do not make a disk faster
SHOWN = 5  # names listed in one message


class Place(NamedTuple):
    """Where one tensor is: ``id`` is its HF name (prefix added) or file/slot; ``key`` its name in ``file``."""

    id: str
    file: Any
    key: str


class Source:
    """The weights of one model. Opening reads headers at most; ``check`` judges everything, ``layer`` reads one layer."""

    def __init__(self, folder: Path, document: Optional[Dict[str, Any]]) -> None:
        self.folder = folder
        self.manifest = document
        self.kind = document["kind"] if document else "hf"
        self.config = families.read_config(str(folder))
        try:
            self.family = families.family_of(self.config)
            self.dims = families.dims_of(self.config)
        except UserError as error:
            raise UserError("%s: %s" % (folder, error)) from None
        if document is not None:
            self._check_manifest(document)
        self._wanted = {self._id(layer, slot): (layer, slot) for layer, slot in self.slots()}
        self._places: Dict[str, Place] = {}
        self._names: List[str] = []
        self._extra: List[str] = []
        self._open: Any = None
        for place in self._layer_files() if document else hf_keys(folder, self.family, self._wanted):
            place = Place(*place)
            self._names.append(place.id if document else place.key)
            if place.id in self._wanted and place.id not in self._places:
                self._places[place.id] = place
            elif document or not any(re.match(p, k) for p in self.family.ignorable for k in (place.key, place.id)):
                self._extra.append(self._names[-1])

    def slots(self) -> Iterator[Tuple[int, ParamSlot]]:
        """(layer, slot) of every parameter, in file order."""
        for layer in range(self.dims.layers):
            for slot in self.family.layer_slots(self.dims, layer):
                yield layer, slot

    def names(self) -> List[str]:
        """Every key as it stands in the files (layer files: file/key), those included that are extra or safe to ignore."""
        return sorted(self._names)

    def files(self) -> Set[str]:
        """Names of the weight files in use, an index included."""
        first = None if self.manifest is not None else first_file(self.folder)
        return {place.file.path.name for place in self._places.values()} | ({first} if first else set())

    @property
    def threads(self) -> int:
        """How many may read at once: the files of .bin are opened one after the other."""
        plain = all(isinstance(place.file, SafetensorsFile) for place in self._places.values())
        return min(MOST_THREADS, os.cpu_count() or 1) if plain else 1

    def check(self) -> None:
        """Every key is there, none is extra, shapes and dtypes are right; reads no weights. Raises UserError naming what is not."""
        missing = [
            key for key, (layer, slot) in self._wanted.items() if key not in self._places and not self._is_tied_head(layer, slot)
        ]
        shapes = []
        for place in sorted(self._places.values(), key=lambda p: str(p.file.path)):
            layer, slot = self._wanted[place.id]
            entry = self._entry_of(place)
            if entry.shape != slot.size(self.dims):
                shapes.append("%s is %s, expected %s" % (place.key, list(entry.shape), list(slot.size(self.dims))))
            place.file.close()
        findings = (("missing", missing), ("extra", self._extra), ("of another shape", shapes))
        wrong = ["%d %s: %s" % (len(found), what, _some(found)) for what, found in findings if found]
        if wrong:
            raise UserError("%s: the weights do not match config.json: %s" % (self.folder, "; ".join(wrong)))

    def entry(self, layer: int, name: str) -> Entry:
        """dtype and shape of one parameter as it lies in its file (a tied head without a copy of its own: the embedding's)."""
        return self._entry_of(self._place(layer, name))

    def tensor(self, layer: int, name: str) -> torch.Tensor:
        """One parameter in its own dtype. Raises UserError; RunFailed when a checkpoint's tied copies differ."""
        place = self._place(layer, name)
        tensor = self._file(place).read(place.key)
        self._check_shape(place, tuple(tensor.shape))
        if self._is_tied_head(layer, self._slot(layer, name)):
            self.check_tied()
        return tensor

    def pieces(self, layer: int, name: str) -> Iterator[torch.Tensor]:
        """The same values, flat, 4 Mi elements at a time. Compares no tied copies: ``check_tied`` does."""
        place = self._place(layer, name)
        self._check_shape(place, self._entry_of(place).shape)
        return self._file(place).pieces(place.key)

    def layer(self, layer: int) -> Dict[str, torch.Tensor]:
        """The parameters of one pipeline layer: {slot name: tensor in its own dtype}, exactly the layer's slots in their order.

        Reads these tensors only; at most one .bin shard is open. A tied head gets the embedding's values.
        """
        return {slot.name: self.tensor(layer, slot.name) for slot in self.family.layer_slots(self.dims, layer)}

    def check_tied(self) -> None:
        """Compare the tied copies, if this source has two. Raises UserError; RunFailed when it is a checkpoint."""
        head, embedding = self._place(self.dims.layers - 1, self._tied_slot(1).name), self._place(0, self._tied_slot(0).name)
        if not self.dims.tied or head == embedding:
            return
        pairs = zip_longest(self._file(head).pieces(head.key), self._file(embedding).pieces(embedding.key))
        if not all(a is not None and b is not None and same_bits(a, b) for a, b in pairs):
            raise self._untrue(head, embedding)

    def _check_manifest(self, document: Dict[str, Any]) -> None:
        for key, found in (("family", self.family.name), ("layers", self.dims.layers), ("tied", self.dims.tied)):
            said = document[key]
            if said != found:
                raise UserError(
                    "%s: manifest.json says %s %r but its config.json %r; one of them was changed" % (self.folder, key, said, found)
                )

    def _layer_files(self) -> Iterator[Tuple[str, Any, str]]:
        names = [manifest.layer_file(layer) for layer in range(self.dims.layers)]
        manifest_where.require(self.folder, self.manifest or {}, names)
        for layer in range(self.dims.layers):
            file = open_file(self.folder / manifest.layer_file(layer))
            for key in file.entries:
                yield "%s/%s" % (manifest.layer_file(layer), key), file, key

    def _id(self, layer: int, slot: ParamSlot) -> str:
        if self.manifest is not None:
            return "%s/%s" % (manifest.layer_file(layer), slot.name)
        return self.family.hf_name(slot, layer)

    def _slot(self, layer: int, name: str) -> ParamSlot:
        return next(s for s in self.family.layer_slots(self.dims, layer) if s.name == name)

    def _tied_slot(self, which: int) -> ParamSlot:
        """The embedding's (0) or the head's (1) slot of the pair that is tied when ``dims.tied``."""
        return next(s for s in self.family.slots if s.hf == self.family.tied[which])

    def _is_tied_head(self, layer: int, slot: ParamSlot) -> bool:
        """A head that may have no copy of its own (layer files always have one, but it must be equal)."""
        return self.dims.tied and slot.hf == self.family.tied[1]

    def _place(self, layer: int, name: str) -> Place:
        slot = self._slot(layer, name)
        place = self._places.get(self._id(layer, slot))
        if place is None and self._is_tied_head(layer, slot):
            return self._place(0, self._tied_slot(0).name)
        if place is None:
            raise UserError("%s: the weights do not match config.json: 1 missing: %s" % (self.folder, self._id(layer, slot)))
        return place

    def _file(self, place: Place) -> Any:
        """One file is open at a time: an unmapped .bin shard is as large in memory as on disk."""
        if self._open is not None and self._open is not place.file:
            self._open.close()
        self._open = place.file
        return place.file

    def _check_shape(self, place: Place, shape: Tuple[int, ...]) -> None:
        layer, slot = self._wanted[place.id]
        if shape != slot.size(self.dims):
            raise UserError("%s: %s is %s, expected %s" % (place.file.path, place.key, list(shape), list(slot.size(self.dims))))

    def _entry_of(self, place: Place) -> Entry:
        entry = place.file.entries[place.key]
        if entry.dtype not in ("F32", "F16", "BF16"):
            raise wrong_dtype(place.file.path, place.key, entry.dtype)
        return entry

    def _untrue(self, head: Place, embedding: Place) -> Exception:
        text = "%s: config.json says that embedding and head are tied, but %s and %s differ" % (self.folder, embedding.id, head.id)
        if self.kind == "checkpoint":
            return RunFailed(text + "; the training run let them drift apart, so this checkpoint cannot be used")
        return UserError(text + '; set "tie_word_embeddings": false in config.json if the head is meant to be its own')


def find_folder(path: str) -> Path:
    """The folder that ``path`` means: layer files, a run's newest complete checkpoint, a local HF folder, or a downloaded one."""
    folder = resolve(str(path))
    if manifest.is_layer_folder(folder) or (folder / "checkpoints").is_dir():
        return manifest.find_checkpoint(folder)
    return folder


def open_source(path: str) -> Source:
    """Open the weights that ``path`` names (see the module docstring). Raises UserError, one line."""
    folder = find_folder(path)
    return Source(folder, manifest.read(folder) if manifest.is_layer_folder(folder) else None)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal shape, dtype and bytes (so that -0.0 differs from 0.0 and a NaN equals itself)."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(a.contiguous().reshape(-1).view(torch.uint8), b.contiguous().reshape(-1).view(torch.uint8))


def _some(names: List[str]) -> str:
    names = [name if name.isprintable() else repr(name) for name in names]  # one line, whatever a file calls its tensors
    return ", ".join(names[:SHOWN]) + (", ... (%d more)" % (len(names) - SHOWN) if len(names) > SHOWN else "")
