"""The export at the end of a training, written by its ranks: each what it holds of the fp32 master weights, rounded as ``to_hf``
rounds a checkpoint's, at its final place in the export's files. The checkpoint is not read for it.

Where a value lies follows from dims, dtype, target and shard size alone. Rank 0 makes the files at their full size; all ranks write
into them; the launcher adds what lies beside the weights and gives the folder its name (``complete``). All of it needs one folder
that every rank sees; where there is none, ``write`` says so and the export is made from the checkpoint.
"""

import collections
import contextlib
import os
import time
import uuid
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Deque, Dict, List, Tuple

import torch.distributed as dist

from pipeline_train import families, manifest
from pipeline_train.errors import RunFailed, UserError
from pipeline_train.weights import open_source
from pipeline_train.weights.files import SafetensorsFile

from . import aside, bins, placed, targets
from .placed import Spot
from .shards import SHARD_SIZE, Shard, parse_size, plan
from .to_hf import cast, export_items, finish, items_of

WRITE = "export.from_ranks:write"  # what the ranks call when they have trained
PIECE = 1 << 24  # elements rounded and written at once
WRITERS = 2  # threads of each rank that write while the next pieces are rounded
SEEN_S = 10.0  # for a folder that rank 0 has made to be seen by the others


def write(pipe: Any) -> Dict[str, Any]:
    """``export:`` of a run that is trained, by all ranks together (``pipe``: pipeline_train.engine.Pipeline): every file of weights
    into the folder aside that ``complete`` takes. -> see ``write_to``."""
    return write_to(pipe, pipe.config.export.dir, pipe.config.export.target, SHARD_SIZE)


def write_to(pipe: Any, output: str, target: str, shard_size: str) -> Dict[str, Any]:
    """-> {"bytes", "seconds", "gb_per_s", "ranks"}, or {"not_shared": which ranks do not see the folder}. Raises RunFailed on every
    rank with the first one's reason; the folder aside is removed then."""
    wanted, family = targets.find(target), families.FAMILIES[pipe.dims.family]
    shards = plan(items_of(family, pipe.dims, pipe.config.model.dtype, wanted), parse_size(shard_size))
    began, folder, leads = time.perf_counter(), aside.partial_of(output), dist.get_rank() == 0
    try:
        token = _agree(lambda: _make(output, shards) if leads else None)[0]
        blind = [rank for rank, seen in enumerate(_agree(lambda: _sees(folder / token))) if not seen]
        if blind:
            if leads:
                aside.abandon(output)
            return {"not_shared": blind}
        _agree(lambda: (folder / token).unlink() if leads else None)
        nbytes = sum(_agree(lambda: _write_mine(pipe, folder, placed.spots(shards))))
        if targets.needs_bins(wanted, family):
            _agree(lambda: _write_bins(folder, shards))
    except RunFailed:
        if leads:
            aside.abandon(output)
        raise
    seconds = time.perf_counter() - began
    return {
        "bytes": nbytes,
        "seconds": round(seconds, 3),
        "gb_per_s": round(nbytes / 1e9 / seconds, 3),
        "ranks": dist.get_world_size(),
    }


def complete(run: str, output: str, target: str, shard_size: str = SHARD_SIZE) -> List[str]:
    """Add what lies beside the weights, as ``to_hf`` does from the run's newest checkpoint, and give the folder its name; -> what
    the user should know. Raises UserError, RunFailed."""
    source, wanted = open_source(run), targets.find(target)
    assert source.manifest is not None
    beside = {name: entry for name, entry in source.manifest["files"].items() if not name.endswith(".safetensors")}
    manifest.check_hashes(source.folder, dict(source.manifest, files=beside))
    shards = plan(export_items(source, None, wanted), parse_size(shard_size))
    with aside.published(output) as folder:
        return finish(folder, source, wanted, shards, Path(output).name)


def text_of(written: Dict[str, Any]) -> str:
    """What ``write`` returned, in words."""
    if "bytes" in written:
        return "exported %.2f GB from %d ranks in %.1f s (%.2f GB/s)" % (
            written["bytes"] / 1e9, written["ranks"], written["seconds"], written["gb_per_s"])  # fmt: skip
    return "exporting from the checkpoint: the folder is not on a disk that all ranks see (not seen by rank %s)" % ", ".join(
        map(str, written["not_shared"])
    )


def _make(output: str, shards: List[Shard]) -> str:
    """The folder aside, and every file of weights in it: header, and the size that it will have. -> the name of one more file,
    which is there only now."""
    folder = aside.begin(output, sum(item.nbytes for _, items in shards for item in items), overwrite=True)
    placed.make(folder, shards)
    token = uuid.uuid4().hex
    (folder / token).touch()
    return token


def _sees(path: Path) -> bool:
    """Whether what rank 0 has just made is this machine's too; a network's file system may show it later."""
    last = time.monotonic() + SEEN_S
    while not path.is_file():
        if time.monotonic() > last:
            return False
        time.sleep(0.1)
    return True


def _write_mine(pipe: Any, folder: Path, places: Dict[Tuple[int, str], Spot]) -> int:
    """All values that this rank holds, to their places and onto the disk; -> bytes."""
    files: Dict[str, int] = {}
    under_way: Deque[Future[int]] = collections.deque()
    nbytes = 0
    with contextlib.ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor(WRITERS))
        for layer in pipe.stage.layers:
            for name, first, values in pipe.pieces(layer, PIECE):
                if (layer, name) not in places:  # a tied head that the target has no copy of
                    continue
                file, start, item = places[layer, name]
                if file not in files:
                    files[file] = os.open(str(folder / file), os.O_WRONLY)
                    stack.callback(os.close, files[file])
                data = cast(values, item.dtype, item.name).cpu()
                place = start + first * data.element_size()
                under_way.append(pool.submit(placed.put, files[file], place, data))
                nbytes += data.numel() * data.element_size()
                if len(under_way) > 2 * WRITERS:
                    under_way.popleft().result()
                pipe.watched.pulse.tick("saving")
        for future in under_way:
            future.result()
        for number in files.values():
            os.fsync(number)
            pipe.watched.pulse.tick("saving")
    return nbytes


def _write_bins(folder: Path, shards: List[Shard]) -> None:
    """The .bin files that older servers want, from the files that all ranks have just written: every rank its share of them."""
    for number, ((name, items), (source, _)) in enumerate(zip(bins.plan(shards), shards)):
        if number % dist.get_world_size() == dist.get_rank():
            file = SafetensorsFile(folder / source)
            bins.write(folder / name, items, lambda item, file=file: file.pieces(item.name))  # type: ignore[misc]


def _agree(work: Any) -> List[Any]:
    """Do it on this rank; -> every rank's result. Raises RunFailed on all of them when one has failed."""
    problem, result = "", None
    try:
        result = work()
    except (RunFailed, UserError) as error:
        problem = str(error)
    except OSError as error:
        problem = "%s: %s" % (error.filename or "writing failed", error.strerror or error)
    everyone: List[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, (problem, result))
    for rank, (said, _) in enumerate(everyone):
        if said:
            raise RunFailed("export: rank %d: %s" % (rank, said))
    return [result for _, result in everyone]
