"""Files of tensors, read one tensor at a time: .safetensors and PyTorch's .bin.

The safetensors format (huggingface/safetensors, README "Format"): 8 bytes little-endian length n, n bytes of JSON
{name: {"dtype", "shape", "data_offsets": [begin, end]}, "__metadata__": {...}}, then the data the offsets count from.
It is read with plain reads, not mapped: a mapping keeps every page it touched resident, and a file that shrinks kills the process.
"""

import inspect
import json
import os
from pathlib import Path
from typing import Any, BinaryIO, Callable, Dict, Iterable, Iterator, List, NamedTuple, Optional, Tuple

import torch

from .. import safetensors_header
from ..errors import UserError

TORCH_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
WIDTHS = {"F32": 4, "F16": 2, "BF16": 2}  # bytes of one element
NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}
PIECE = 2**22  # elements of one read where a whole tensor need not be in memory


class Entry(NamedTuple):
    """What a file says about one tensor. ``dtype`` is the safetensors name ("F32", "BF16", ...)."""

    dtype: str
    shape: Tuple[int, ...]


class SafetensorsFile:
    """The header is read and checked at once, a tensor only when asked for. Raises UserError for a file that is not whole."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with open(str(path), "rb") as file:
                header, self._data = _header(file, path)
        except OSError as error:
            raise UserError("%s: cannot be read: %s" % (path, error.strerror)) from None
        header.pop("__metadata__", None)
        self.entries: Dict[str, Entry] = {}
        self._spans: Dict[str, Tuple[int, int]] = {}
        for name, item in header.items():
            self.entries[name], self._spans[name] = _entry(name, item, path)
        _check_end(path, self._data + _end_of(self._spans, path))

    def read(self, name: str) -> torch.Tensor:
        """A tensor of this file with memory of its own. Raises UserError for a dtype that is no weight's."""
        begin, end = self._spans[name]
        self._check_dtype(name)
        return self._read(name, begin, torch.empty(end - begin, dtype=torch.uint8)).reshape(self.entries[name].shape)

    def pieces(self, name: str) -> Iterator[torch.Tensor]:
        """The same values, flat, in pieces of PIECE elements (the last one shorter). Each lies in the memory of the one before:
        it holds until the next one is asked for."""
        begin, end = self._spans[name]
        self._check_dtype(name)
        step = PIECE * WIDTHS[self.entries[name].dtype]
        buffer = torch.empty(min(step, end - begin), dtype=torch.uint8)
        for start in range(begin, end, step):
            yield self._read(name, start, buffer[: min(step, end - start)])

    def _check_dtype(self, name: str) -> None:
        dtype = self.entries[name].dtype
        if dtype not in TORCH_DTYPES:
            raise wrong_dtype(self.path, name, dtype)

    def _read(self, name: str, begin: int, raw: torch.Tensor) -> torch.Tensor:
        """Fill ``raw`` with the bytes from position ``begin`` of the data on; -> them as values."""
        try:
            with open(str(self.path), "rb", buffering=0) as file:
                file.seek(self._data + begin)
                _read_into(file, memoryview(raw.numpy()), self.path)  # type: ignore[arg-type]
        except OSError as error:
            raise UserError("%s: cannot be read: %s" % (self.path, error.strerror)) from None
        return raw.view(TORCH_DTYPES[self.entries[name].dtype])

    def close(self) -> None:
        """Nothing is held between reads."""


class BinFile:
    """A pickled state dict, loaded without running code (weights_only) and mapped where this torch can.

    ``close`` drops what is loaded; the next use loads it again. Raises UserError for anything that is not a dictionary of tensors.
    ``check``: called with the keys whenever the file is loaded; a shard compares them with its index.
    """

    def __init__(self, path: Path, check: Optional[Callable[[Iterable[str]], None]] = None) -> None:
        self.path = path
        self._check = check
        self.mapped = "mmap" in inspect.signature(torch.load).parameters and _is_zip(path)
        self._entries: Optional[Dict[str, Entry]] = None
        self._state: Optional[Dict[str, torch.Tensor]] = None

    @property
    def entries(self) -> Dict[str, Entry]:
        if self._entries is None:
            self._entries = {
                name: Entry(NAMES.get(tensor.dtype, str(tensor.dtype)), tuple(tensor.shape))
                for name, tensor in self._load().items()
            }
        return self._entries

    def read(self, name: str) -> torch.Tensor:
        tensor = self._tensor(name)
        return tensor.clone() if self.mapped else tensor.contiguous()

    def pieces(self, name: str) -> Iterator[torch.Tensor]:
        flat = self._tensor(name).reshape(-1)
        for start in range(0, flat.numel(), PIECE):
            yield flat[start : start + PIECE].clone()

    def _tensor(self, name: str) -> torch.Tensor:
        tensor = self._load()[name].detach()
        if tensor.dtype not in NAMES:
            raise wrong_dtype(self.path, name, str(tensor.dtype))
        if self.mapped:
            self.close()  # the mapping lives as long as this tensor: it keeps the pages it touched
        return tensor

    def close(self) -> None:
        self._state = None

    def _load(self) -> Dict[str, torch.Tensor]:
        if self._state is None:
            options: Dict[str, Any] = {"map_location": "cpu", "weights_only": True}
            if self.mapped:
                options["mmap"] = True
            try:
                state = torch.load(str(self.path), **options)
            except Exception as error:  # torch's unpickler raises whatever a damaged file makes of it
                reason = str(error).strip().split("\n")[0][:160]
                raise UserError("%s: not a whole file of tensors: %s" % (self.path, reason or type(error).__name__)) from error
            if not isinstance(state, dict) or not all(_is_plain(key, value) for key, value in state.items()):
                raise UserError("%s: not a state dict (expected a dictionary of names and plain tensors)" % self.path)
            if self._check is not None:
                self._check(state)
            self._state = state
        return self._state


def _is_plain(name: Any, value: Any) -> bool:
    """A tensor with values of its own, under a name: neither sparse nor a mere shape."""
    return (
        isinstance(name, str) and isinstance(value, torch.Tensor) and value.layout == torch.strided and value.device.type == "cpu"
    )


def open_file(path: Path, check: Optional[Callable[[Iterable[str]], None]] = None) -> Any:
    """SafetensorsFile or BinFile (which calls ``check``) by the name's ending."""
    return SafetensorsFile(path) if path.suffix == ".safetensors" else BinFile(path, check)


def wrong_dtype(path: Path, name: str, dtype: str) -> UserError:
    return UserError(
        "%s: %s: has dtype %s; weights must be fp32, bf16 or fp16 (a quantized model cannot be used here)" % (path, name, dtype)
    )


def _header(file: BinaryIO, path: Path) -> Tuple[Dict[str, Any], int]:
    """(header, position of the data)."""
    head = file.read(8)
    size = int.from_bytes(head, "little")
    total = os.fstat(file.fileno()).st_size
    if head == b"version ":
        raise UserError("%s: is a Git LFS pointer, not the file itself; fetch it with `git lfs pull`" % path)
    if len(head) < 8 or size > safetensors_header.MOST:
        raise UserError("%s: not a safetensors file, or an empty one" % path)
    if 8 + size > total:
        raise UserError("%s: cut off: the header alone needs %d bytes, the file has %d; copy it again" % (path, 8 + size, total))
    try:
        header = json.loads(file.read(size).decode("utf-8"), object_pairs_hook=lambda pairs: _unique(pairs, path))
    except UserError:  # a ValueError, too
        raise
    except (ValueError, RecursionError):
        raise UserError("%s: not a safetensors file: its header is not JSON" % path) from None
    if not isinstance(header, dict):
        raise UserError("%s: not a safetensors file: its header is not a JSON object" % path)
    return header, 8 + size


def _unique(pairs: List[Tuple[str, Any]], path: Path) -> Dict[str, Any]:
    """JSON lets the last of two equal keys win; which one another reader takes is anybody's guess."""
    found: Dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise UserError("%s: its header has %s twice; copy the file again" % (path, key))
        found[key] = value
    return found


def _entry(name: str, item: Any, path: Path) -> Tuple[Entry, Tuple[int, int]]:
    try:
        dtype, shape, (begin, end) = item["dtype"], tuple(item["shape"]), item["data_offsets"]
        fine = isinstance(dtype, str) and all(type(n) is int and n >= 0 for n in shape + (begin, end)) and begin <= end
        if fine and dtype in WIDTHS:
            count = 1
            for n in shape:
                count *= n
            fine = end - begin == count * WIDTHS[dtype]
    except (KeyError, TypeError, ValueError):
        fine = False
    if not fine:
        raise UserError("%s: header entry of %s is damaged; copy the file again" % (path, name))
    return Entry(dtype, shape), (begin, end)


def _end_of(spans: Dict[str, Tuple[int, int]], path: Path) -> int:
    """Where the last tensor ends. The format allows neither overlaps nor holes."""
    end = 0
    for name, (begin, stop) in sorted(spans.items(), key=lambda item: item[1]):
        if begin != end:
            what = "overlaps the tensor before it" if begin < end else "leaves a hole before it"
            raise UserError("%s: header entry of %s %s; copy the file again" % (path, name, what))
        end = stop
    return end


def _check_end(path: Path, needed: int) -> None:
    size = path.stat().st_size
    if size < needed:
        raise UserError("%s: cut off: its header promises %d bytes, the file has %d; copy it again" % (path, needed, size))
    if size > needed:
        raise UserError("%s: has %d bytes more than its header describes; copy it again" % (path, size - needed))


def _read_into(file: BinaryIO, view: memoryview, path: Path) -> None:
    done = 0
    while done < len(view):
        got = file.readinto(view[done:])  # type: ignore[attr-defined]
        if not got:
            raise UserError("%s: ended while it was read; was it changed?" % path)
        done += got


def _is_zip(path: Path) -> bool:
    """Only torch's zip format (1.6 and later) can be mapped."""
    try:
        with open(str(path), "rb") as file:
            return file.read(4) == b"PK\x03\x04"
    except OSError as error:
        raise UserError("%s: cannot be read: %s" % (path, error.strerror)) from None
