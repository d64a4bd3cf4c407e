"""Safetensors files that are made at their full size, then written at any place, by several threads or processes at once."""

import os
from pathlib import Path
from typing import Dict, List, NamedTuple, Tuple

import torch

from pipeline_train.proof import MARK
from pipeline_train.weights.writing import Item, bytes_of, header_of

from .shards import Shard


class Spot(NamedTuple):
    """Where a tensor lies: its file, and the first byte there."""

    file: str
    start: int
    item: Item


def make(folder: Path, shards: List[Shard]) -> None:
    """Every file: header, and the size that it will have. OSError passes through."""
    for name, items in shards:
        with open(str(folder / name), "wb") as file:
            file.write(header_of(items, MARK))
            file.truncate(file.tell() + sum(item.nbytes for item in items))


def spots(shards: List[Shard]) -> Dict[Tuple[int, str], Spot]:
    """(layer, slot name) -> where it lies, in file order."""
    found = {}
    for name, items in shards:
        start = len(header_of(items, MARK))
        for item in items:
            found[item.source] = Spot(name, start, item)
            start += item.nbytes
    return found


def put(file: int, place: int, data: torch.Tensor) -> int:
    """Write all values of a tensor of the host from byte ``place`` on; -> the byte behind them. OSError passes through."""
    left = bytes_of(data)
    while left:
        done = os.pwrite(file, left, place)
        left, place = left[done:], place + done
    return place
