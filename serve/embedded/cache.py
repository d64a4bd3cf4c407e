"""Keys and values of all running requests: one row per request, its tokens at columns 0..length-1, whatever the others do.

row 0   k0 k1 k2 k3 k4 __ __ __      A request keeps its columns for its whole life, so nothing about it depends on who else is
row 1   k0 k1 __ __ __ __ __ __      there. Joining is writing into the next free row; leaving is copying the last row into the
row 2   k0 k1 k2 __ __ __ __ __      hole.

The tables grow by doubling. One that was long once and has many rows later would be both: then it is trimmed. When nobody runs they
are dropped, unless passes are recorded over them and they are small.
"""

from dataclasses import dataclass, field
from typing import Any, Dict, Iterator, List, Optional, Tuple, Union

import torch
from torch import Tensor
from transformers.cache_utils import Cache

COLUMNS = 64  # widths are multiples of this, so that sums over a row see the same grouping in any company

Masks = Dict[Union[int, str, None], Tensor]  # attention's, of one pass: one for each sliding window, and "alibi"


@dataclass
class Step:
    """The forward pass that is under way.

    ``counts[i]`` new tokens for the row ``first + i``, at its columns ``starts[i]``.. ; ``width``: columns that attention sees.
    ``decode``: a batch of the rows with one token each, else pieces of prompts, one behind the other in a batch of one row.
    ``count``: tokens of a row of that batch; ``positions`` [B, count]: their columns. ``masks``: as FixedStep's.
    """

    first: int
    starts: List[int]
    counts: List[int]
    decode: bool
    device: torch.device
    masks: Masks = field(default_factory=dict)

    def __post_init__(self) -> None:
        last = max(start + count for start, count in zip(self.starts, self.counts))
        self.width = -(-last // COLUMNS) * COLUMNS if self.decode else last
        self.columns = torch.tensor(self.starts, device=self.device)
        self.count = 1 if self.decode else sum(self.counts)
        self.positions = self.columns[:, None] if self.decode else self._span()
        self.rows = torch.arange(self.first, self.first + len(self.starts), device=self.device)

    def _span(self) -> Tensor:
        return torch.cat([torch.arange(start, start + count, device=self.device) for _, start, count in self.pieces()])[None]

    def pieces(self) -> Iterator[Tuple[int, int, int]]:
        """Of each row: where its new tokens begin in the batch, the column of the first, how many."""
        at = 0
        for start, count in zip(self.starts, self.counts):
            yield at, start, count
            at += count


@dataclass
class FixedStep:
    """A forward pass whose shape is fixed and whose numbers lie in tensors that are overwritten before each run (recorded.py).

    ``rows``: the cache's row of each new token, [``active``], or [``count``] all the same; ``columns``: where each row's first new
    token stands, [B] with B >= ``active``: what is computed for the rows behind is dropped. ``last``: the token whose logits are
    wanted, [1], None: the only one.
    """

    rows: Tensor
    columns: Tensor
    count: int
    decode: bool
    width: int
    active: int
    last: Optional[Tensor] = None
    kernel: str = ""  # one of attention.KERNELS, for a decode pass
    masks: Masks = field(default_factory=dict)

    @property
    def positions(self) -> Tensor:
        return self.columns[:, None] + torch.arange(self.count, device=self.columns.device)


class SlotCache(Cache):
    """What transformers' models call ``past_key_values``. Set ``step`` before each forward pass."""

    is_compileable = False

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.step: Union[Step, FixedStep, None] = None
        self._keys: List[Tensor] = []
        self._values: List[Tensor] = []

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Tuple[Tensor, Tensor]:
        """Store [rows, kv_heads, count, head_dim] of one layer -> what attention may see, [rows, kv_heads, width, head_dim].
        What else transformers passes (it differs between its versions) is for caches that choose places by it."""
        assert self.step is not None
        while len(self._keys) <= layer_idx:
            self._keys.append(key_states.new_empty(0))
            self._values.append(value_states.new_empty(0))
        store: Any = self._store_fixed if isinstance(self.step, FixedStep) else self._store
        return store(self._keys, layer_idx, key_states, self.step), store(self._values, layer_idx, value_states, self.step)

    @staticmethod
    def _store(tables: List[Tensor], layer: int, new: Tensor, step: Step) -> Tensor:
        rows = step.first + len(step.starts)
        table = tables[layer] = _grown(tables[layer], new, rows, step.width)
        if step.decode:
            table[step.rows, :, step.columns] = new[:, :, 0]
        else:
            for row, (at, start, count) in enumerate(step.pieces(), step.first):
                table[row, :, start : start + count] = new[0, :, at : at + count]
        return table[step.first : rows, :, : step.width]

    @staticmethod
    def _store_fixed(tables: List[Tensor], layer: int, new: Tensor, step: FixedStep) -> Tensor:
        """The table is large enough: ``reserve``."""
        table = tables[layer]
        if step.decode:
            table[step.rows, :, step.columns[: step.active]] = new[: step.active, :, 0]
            return table[: step.active, :, : step.width]
        table[step.rows, :, step.columns + torch.arange(step.count, device=table.device)] = new[0].transpose(0, 1)
        return table[:, :, : step.width].index_select(0, step.rows[:1])

    @property
    def size(self) -> Tuple[int, int]:
        """Rows and columns that there are."""
        return (self._keys[0].shape[0], self._keys[0].shape[2]) if self._keys else (0, 0)

    def reserve(self, rows: int, columns: int) -> None:
        """At least so many. The first forward pass must have been: it makes the tables."""
        for tables in (self._keys, self._values):
            for layer, table in enumerate(tables):  # one by one: the old and the new one are there together
                tables[layer] = _copied(table, table, max(rows, table.shape[0]), max(columns, table.shape[2]))

    def trim(self, rows: int, columns: int) -> None:
        """No more than so many."""
        for tables in (self._keys, self._values):
            for layer, table in enumerate(tables):
                tables[layer] = table[:rows, :, :columns].clone(memory_format=torch.contiguous_format)

    def move(self, source: int, target: int) -> None:
        """Copy a row over another row, in every layer."""
        tables = self._keys + self._values
        torch._foreach_copy_([table[target] for table in tables], [table[source] for table in tables])

    def taken(self, row: int, length: int) -> List[Tensor]:
        """The row's first ``length`` columns, layer by layer, copied to the host's memory; ``put`` them back. Of none, nothing."""
        return [table[row, :, :length].to("cpu", copy=True) for table in (self._keys + self._values if length else [])]

    def put(self, row: int, saved: List[Tensor]) -> None:
        """What ``taken`` gave, into a row that need not be there yet."""
        for tables, parts in ((self._keys, saved[: len(saved) // 2]), (self._values, saved[len(saved) // 2 :])):
            for layer, part in enumerate(parts):
                tables[layer] = _grown(tables[layer], tables[layer], row + 1, part.shape[1])
        self.clean(row)
        for table, part in zip(self._keys + self._values, saved):
            table[row, :, : part.shape[1]] = part.to(table.device)

    def clean(self, row: int) -> None:
        """Nothing of an earlier request stays: a mask hides a number, but not an infinite one, which times 0 is NaN."""
        tables = [table[row] for table in self._keys + self._values if table.dim() == 4 and row < table.shape[0]]
        if tables:
            torch._foreach_zero_(tables)

    def clear(self) -> None:
        self.step = None
        for tables in (self._keys, self._values):
            tables[:] = [table.new_empty(0, table.shape[1], 0, table.shape[3]) for table in tables]

    @property
    def bytes_per_token(self) -> int:
        """Of one column of one row over all layers; 0 before the first forward pass."""
        return sum(table.shape[1] * table.shape[3] * table.element_size() for table in self._keys + self._values)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns in front of the new ones, as the mask code of transformers counts."""
        return 0 if self.step is None else self.step.width - self.step.count

    def get_mask_sizes(self, cache_position: Tensor, layer_idx: int) -> Tuple[int, int]:
        assert self.step is not None
        return self.step.width, 0

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        return -1


def _grown(table: Tensor, new: Tensor, rows: int, columns: int) -> Tensor:
    """``table`` if it is large enough, else a copy at least twice as large in the dimension that was short."""
    have_rows, have_columns = (table.shape[0], table.shape[2]) if table.dim() == 4 else (0, 0)
    if rows <= have_rows and columns <= have_columns:
        return table
    more_rows = max(have_rows, 1)
    while more_rows < rows:
        more_rows *= 2
    more_columns = max(have_columns, COLUMNS)
    while more_columns < columns:
        more_columns *= 2
    return _copied(table, new, more_rows, more_columns)


def _copied(table: Tensor, new: Tensor, rows: int, columns: int) -> Tensor:
    """A table of that size for keys like ``new``, with what ``table`` has."""
    copied = new.new_zeros(rows, new.shape[1], columns, new.shape[3])
    if table.dim() == 4:
        copied[: table.shape[0], :, : table.shape[2]] = table
    return copied
