"""One pipeline layer of either side in memory at a time: weights put into a module by name, vocabulary tables by the row.

``Side`` is what both have in common; ``ours.py`` and ``theirs.py`` fill it in. D hidden size, T tokens of a prompt.
"""

import dataclasses
from typing import Any, Dict, Iterable, Iterator, List, Optional, Tuple

import torch
from torch import nn

from pipeline_train.errors import RunFailed
from pipeline_train.families import ParamSlot
from pipeline_train.weights import Source

from .to_hf import cast

ROWS = 1 << 24  # elements of a vocabulary table held at once, at least one row


def assign(module: nn.Module, name: str, tensor: torch.Tensor, resize: bool = False) -> None:
    """Make ``tensor`` the parameter ``name``, without a copy. Raises RunFailed for another shape (``resize``: another first
    axis)."""
    path, leaf = name.rsplit(".", 1)
    owner = dict(module.named_modules())[path]
    old = tuple(owner._parameters[leaf].shape)
    if old[resize:] != tuple(tensor.shape)[resize:]:
        raise RunFailed("%s is %s in the export, transformers makes it %s" % (name, list(tensor.shape), list(old)))
    owner._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)


def rows_of(pieces: Iterable[torch.Tensor], width: int) -> Iterator[Tuple[int, torch.Tensor]]:
    """Flat pieces of a table -> (number of the first row, [n, width]) blocks of at most ROWS elements."""
    first, left = 0, torch.empty(0)
    for piece in pieces:
        left = torch.cat((left.to(piece.dtype), piece)) if left.numel() else piece
        whole = left.numel() // width
        for start in range(0, whole, max(1, ROWS // width)):
            stop = min(whole, start + max(1, ROWS // width))
            yield first + start, left[start * width : stop * width].reshape(-1, width)
        first, left = first + whole, left[whole * width :].clone()
    assert not left.numel(), left.shape


class Side:
    """A model of which one layer is in memory, in fp32: ``load`` a layer, ``run`` it in any dtype, ``drop`` it.

    ``dtypes``: (layer, slot name) -> the dtype ("BF16", ...) that values are rounded to before they are widened; None: as they are.
    """

    def __init__(self, source: Source, dtypes: Optional[Dict[Tuple[int, str], str]] = None) -> None:
        self.source, self.dims, self.family, self.dtypes = source, source.dims, source.family, dtypes
        self.module: Any = None
        self._ids = torch.empty(0, dtype=torch.int64)  # the tokens whose embeddings are loaded

    def name_of(self, slot: ParamSlot, layer: int) -> str:
        """What ``self.module`` calls a parameter of a loaded layer."""
        raise NotImplementedError

    def load(self, layer: int, ids: List[List[int]]) -> None:
        """The layer's weights; of the embedding only the rows of ``ids``, of the head only the norm."""
        for slot in self.family.layer_slots(self.dims, layer):
            if slot.hf == self.family.tied[0]:
                self._ids = torch.tensor(sorted({i for row in ids for i in row}))
                assign(self.module, self.name_of(slot, layer), self._gather(layer, slot), resize=True)
            elif slot.hf != self.family.tied[1]:
                tensor = self._value(self.source.tensor(layer, slot.name), layer, slot)
                assign(self.module, self.name_of(slot, layer), tensor)

    def tokens(self, row: List[int]) -> torch.Tensor:
        """ids -> [1, T] places in the loaded embedding."""
        return torch.searchsorted(self._ids, torch.tensor([row]))

    def head_rows(self) -> Iterator[Tuple[int, torch.Tensor]]:
        """The head's table, [n, D] at a time, fp32."""
        layer = self.dims.layers - 1
        slot = self._tied(1)
        for first, rows in rows_of(self.source.pieces(layer, slot.name), self.dims.hidden):
            yield first, self._value(rows, layer, slot)

    def use_head_rows(self, rows: torch.Tensor) -> None:
        assign(self.module, self.name_of(self._tied(1), self.dims.layers - 1), rows, resize=True)

    def drop(self) -> None:
        """Give the layer's memory back."""
        self.module = None

    def to(self, dtype: torch.dtype) -> None:
        """Parameters only: rotary frequencies are buffers, and stay fp32 in transformers too."""
        for parameter in self.module.parameters():
            parameter.data = parameter.data.to(dtype)

    def _tied(self, which: int) -> ParamSlot:
        return next(slot for slot in self.family.slots if slot.hf == self.family.tied[which])

    def _value(self, tensor: torch.Tensor, layer: int, slot: ParamSlot) -> torch.Tensor:
        if self.dtypes is not None:
            tensor = cast(tensor, self.dtypes[layer, slot.name], self.family.hf_name(slot, layer))
        return tensor.float()

    def _gather(self, layer: int, slot: ParamSlot) -> torch.Tensor:
        table = torch.full((len(self._ids), self.dims.hidden), float("nan"))
        for first, rows in rows_of(self.source.pieces(layer, slot.name), self.dims.hidden):
            here = (self._ids >= first) & (self._ids < first + len(rows))
            table[here] = self._value(rows[self._ids[here] - first], layer, slot)
        return table


def small(dims: Any) -> Any:
    """The same dims with a vocabulary of one word: tables are assigned later."""
    return dataclasses.replace(dims, vocab=1)
