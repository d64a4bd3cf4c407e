"""from-hf, to-hf and the proof of a synthetic model: speed against ``cp`` of the same files in the same run, and peak memory.

In a process of its own each: cp, from-hf, to-hf, cp again (the first is slower on a machine whose memory is new), and verify layer
by layer. Peak memory is VmHWM of the process less that of one which only imports the same libraries. A tied head is read once and
written twice, and a conversion also hashes what it writes (from-hf) or reads (to-hf).
"""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional

import torch

from export import targets
from export.shards import plan, write_index
from pipeline_train import families
from pipeline_train.errors import RunFailed, UserError
from pipeline_train.weights.writing import Item, TensorFile

ROOT = Path(__file__).resolve().parents[1]
CALL = "; ".join((
    "import sys; sys.path.insert(0, %r)" % str(ROOT),
    "import json, time; from export.measure import peak_gib; from export.from_hf import from_hf; from export.to_hf import to_hf",
    "from export.verify import verify; start, cpu = time.perf_counter(), time.process_time(); %s",
    "print(json.dumps([time.perf_counter() - start, peak_gib(), time.process_time() - cpu]))",
))  # fmt: skip
NOISE = torch.empty(1 << 22).normal_(generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()


def make(folder: Path, config: Dict[str, Any]) -> int:
    """A folder of random weights as save_pretrained would shard them; -> bytes."""
    folder.mkdir(parents=True)
    config = dict(config, torch_dtype="bfloat16")
    (folder / "config.json").write_text(json.dumps(config))
    family, dims = families.family_of(config), families.dims_of(config)
    names = targets.exported(targets.find("hf"), family, dims)
    items = [Item(name, "BF16", slot.size(dims)) for name, _, slot in names if not (dims.tied and slot.hf == family.tied[1])]
    shards = plan(items, 5 * 10**9)
    for name, shard in shards:
        with TensorFile(folder / name, shard) as file:
            for item in shard:
                left = item.nbytes // 2
                file.write(item.name, (NOISE[: min(len(NOISE), left - start)] for start in range(0, left, len(NOISE))))
    write_index(folder, shards)
    return sum(item.nbytes for item in items)


def measured(call: str) -> List[float]:
    """[seconds, peak GiB, CPU seconds] of a call in a process of its own."""
    done = subprocess.run([sys.executable, "-c", CALL % call], capture_output=True, text=True)
    if done.returncode:
        raise RunFailed("bench convert: %s" % (done.stderr.strip().splitlines() or ["ended without a word"])[-1])
    return list(json.loads(done.stdout.strip().splitlines()[-1]))


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def bench(config: Dict[str, Any], folder: Optional[str], verify: bool, say: Callable[[str], None]) -> List[Dict[str, Any]]:
    """A row for each: {what, gb, seconds, gb_per_s of what it reads, of_cp (the faster one), cpu_s, peak_gib_over_imports}; ``say``
    is given each at once. Works in ``folder`` (None: the temporary one) and removes what it made. Raises UserError, RunFailed."""
    try:
        work = Path(tempfile.mkdtemp(prefix="convert-", dir=folder))
    except OSError as error:
        raise UserError("--dir %s: %s" % (folder, error.strerror)) from None
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was made is removed
    try:
        return _rows(work, config, verify, say)
    finally:
        signal.signal(signal.SIGTERM, before)
        shutil.rmtree(str(work))


def _rows(work: Path, config: Dict[str, Any], verify: bool, say: Callable[[str], None]) -> List[Dict[str, Any]]:
    model, layers, export, rows = work / "hf", work / "layers", work / "export", []  # type: Path, Path, Path, List[Dict[str, Any]]
    dims = families.dims_of(config)
    what = {"family": dims.family, "blocks": dims.blocks, "gb": round(make(model, config) / 1e9, 3)}
    idle = measured("import transformers")[1]
    calls = [
        ("cp", None, model), ("from-hf", "from_hf(%r, %r)" % (str(model), str(layers)), model),
        ("to-hf", "to_hf(%r, %r)" % (str(layers), str(export)), layers), ("cp", None, model),
    ]  # fmt: skip
    if verify:
        calls.append(("verify", "verify(%r, %r, whole=False)" % (str(layers), str(export)), layers))
    for name, call, source in calls:
        os.sync()  # what others wrote is not ours to wait for
        seconds, peak, cpu = _copied(model, work / "copy") if call is None else measured(call)
        rows.append(dict(what, what=name, seconds=round(seconds, 3), gb_per_s=round(size(source) / 1e9 / seconds, 4),
                         cpu_s=round(cpu, 2), peak_gib_over_imports=round(max(0.0, peak - idle), 3)))  # fmt: skip
        say(json.dumps(rows[-1]))
    best = max(row["gb_per_s"] for row in rows if row["what"] == "cp")
    return [dict(row, of_cp=round(row["gb_per_s"] / best, 3)) for row in rows]


def _copied(source: Path, copy: Path) -> List[float]:
    """[seconds, no memory, CPU seconds] of cp, until it is on the disk."""
    start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(["cp", "-r", str(source), str(copy)], check=True)
    os.sync()
    seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    shutil.rmtree(str(copy))
    return [seconds, 0.0, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime]
