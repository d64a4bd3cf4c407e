"""Kills a process that saves checkpoints at a chosen point, as often as asked; run by test_train_crash.py.

    python crash_points.py FOLDER POWER ASYNC ROTTEN NUMBER SEED

The writer is checkpoint.Saver itself in a forked process. A point is every opening for writing, write, fsync, rename, mkdir,
unlink and rmdir below FOLDER, in all threads; at the chosen one the process gets SIGKILL (half of the write is done then). With
POWER the machine loses its power too: files that were not fsynced are empty, those whose folder was not are gone, and renames
of folders that were not fsynced are undone, while deletions have reached the disk. NUMBER points are drawn, all renames and
fsyncs of folders among them (0: every point). Prints a JSON object {"points": how many there are, "found": {point: what a
resume found}}.
"""

import builtins
import json
import os
import random
import shutil
import signal
import sys
import threading
from pathlib import Path
from typing import List, Set, Tuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from safetensors.torch import load_file  # noqa: E402

from pipeline_train import checkpoint, checkpoint_folder, manifest, run_folder  # noqa: E402
from pipeline_train.errors import UserError  # noqa: E402
from pipeline_train.weights import writing  # noqa: E402
from tests.fake_pipe import Pipe  # noqa: E402
from tests.models import tiny_config  # noqa: E402

KEEP = 2
DIMS = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2,
        "vocab_size": 8}  # fmt: skip
WRITES = os.O_WRONLY | os.O_RDWR


class Alone:
    """torch.distributed with one rank."""

    ReduceOp = type("ReduceOp", (), {"MIN": None})

    @staticmethod
    def get_rank():
        return 0

    @staticmethod
    def get_world_size():
        return 1

    @staticmethod
    def all_gather_object(into, value):
        into[0] = value

    @staticmethod
    def all_reduce(tensor, op):
        pass


class Points:
    """Counts what is done to the disk and ends the process at the chosen point (0: never)."""

    def __init__(self, root: Path, chosen: int, power: bool) -> None:
        self.root, self.chosen, self.power, self.count = str(root) + os.sep, chosen, power, 0
        self.decisive: List[int] = []
        self.lock = threading.RLock()
        self.unsynced: Set[str] = set()
        self.created: Set[str] = set()
        self.renames: List[Tuple[str, str]] = []
        sys.addaudithook(self.audit)
        os.fsync = self.synced  # the disk is a model: nothing waits for the real one
        for module in (writing, checkpoint_folder, manifest):
            module.open = self.open

    def mine(self, path) -> bool:
        return isinstance(path, (str, os.PathLike)) and os.fspath(path).startswith(self.root)

    def point(self, decisive: bool = False) -> bool:
        """Whether this is the one."""
        self.count += 1
        if decisive:
            self.decisive.append(self.count)
        return self.count == self.chosen

    def die(self) -> None:
        self.chosen = 0
        if self.power:
            for path in self.unsynced:
                if os.path.exists(path):
                    os.truncate(path, 0)
            for path in self.created:
                if os.path.isfile(path):
                    os.unlink(path)
            for source, target in reversed(self.renames):
                if os.path.exists(target) and not os.path.exists(source):
                    os.rename(target, source)
        os.kill(os.getpid(), signal.SIGKILL)

    def audit(self, event, arguments) -> None:
        if event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir"):
            path = (
                arguments[0] if self.mine(arguments[0]) or event in ("os.rename", "os.mkdir") else self.root
            )  # relative to dir_fd
        elif event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITES:
            path = arguments[0]
        else:
            return
        with self.lock:
            if not self.mine(path):
                return
            if self.point(event == "os.rename"):
                self.die()
            if event == "open":
                self.unsynced.add(os.fspath(path))
                self.created.add(os.fspath(path))
            elif event == "os.rename":
                self.renamed(os.fspath(arguments[0]), os.fspath(arguments[1]))

    def renamed(self, source: str, target: str) -> None:
        if os.path.isdir(source):
            self.renames.append((source, target))
        self.unsynced, self.created = (
            {target + path[len(source) :] if path.startswith(source) else path for path in paths}
            for paths in (self.unsynced, self.created)
        )
        self.created.discard(os.path.join(os.path.dirname(target), "latest"))  # the name was there before

    def synced(self, fd) -> None:
        path = os.readlink("/proc/self/fd/%d" % fd)
        with self.lock:
            if self.mine(path) and self.point(os.path.isdir(path)):
                self.die()
            self.unsynced.discard(path)
            self.created = {made for made in self.created if os.path.dirname(made) != path}
            self.renames = [(source, target) for source, target in self.renames if os.path.dirname(target) != path]

    def open(self, path, mode="r", **options):
        file = builtins.open(path, mode, **options)
        return Torn(file, self) if "w" in mode and self.mine(path) else file


class Torn:
    """A file whose write may be the last thing its process does."""

    def __init__(self, file, points: Points) -> None:
        self.file, self.points = file, points

    def __getattr__(self, name):
        return getattr(self.file, name)

    def __enter__(self):
        return self

    def __exit__(self, *raised):
        self.file.close()

    def write(self, data):
        with self.points.lock:
            if self.points.point():
                self.file.write(data[: len(data) // 2])
                self.file.flush()
                self.points.die()
        return self.file.write(data)


def saver(out: Path, behind: bool) -> checkpoint.Saver:
    checkpoint.dist = Alone
    return checkpoint.Saver(Pipe(dims=DIMS, keep=KEEP, async_save=behind), out, {})


def save(writer: checkpoint.Saver, steps, said: int) -> None:
    """Save these steps one after the other; what poll says is complete goes to ``said``, one byte each."""
    for step in steps:
        writer.pipe.set(step)
        writer.save(step)
        os.write(said, bytes(fields["step"] for fields in writer.poll()))
    os.write(said, bytes(fields["step"] for fields in writer.finish()))


def start(out: Path, rotten: bool) -> None:
    """A run that has saved 2, 4 and 6 and goes on from 4: 6 may have rotted."""
    (out / "resolved" / "model").mkdir(parents=True)
    (out / "resolved" / "model" / "config.json").write_text(json.dumps(tiny_config("llama", **DIMS)))
    writer = saver(out, False)
    save(writer, (2, 4), os.open(os.devnull, os.O_WRONLY))
    writer.pipe.config.train.keep = 3
    save(writer, (6,), os.open(os.devnull, os.O_WRONLY))
    if rotten:
        (out / "checkpoints" / "step_000006" / manifest.layer_file(0)).write_bytes(b"rotten")


def crash(out: Path, power: bool, behind: bool, chosen: int):
    """-> (points passed and the decisive ones, steps that were reported complete). Saves 6 and 8 and dies at point ``chosen``."""
    reading, said = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            points = Points(out, chosen, power)
            save(saver(out, behind), (6, 8), said)
            os.write(said, b"\0" + json.dumps([points.count, points.decisive]).encode())
        finally:
            os._exit(0)
    os.close(said)
    with builtins.open(reading, "rb") as pipe:
        reported, _, count = pipe.read().partition(b"\0")
    killed = os.WIFSIGNALED(os.waitpid(pid, 0)[1])
    assert killed == bool(chosen), (chosen, killed)
    return json.loads(count or b"null"), list(reported)


def look(out: Path, reported):
    """What a resume finds."""
    rotten = [path.name for path in run_folder.checkpoints(out / "checkpoints") if not whole(path)]
    run_folder.take(out, "run.yaml", print)
    lines: List[str] = []
    try:
        found = run_folder.find(out, "auto", lines.append)
    except UserError as error:
        return {"error": str(error)}
    latest = (out / "checkpoints" / "latest").read_text().strip()
    return {
        "found": run_folder.step_of(found), "values": values(found), "reported": reported, "rotten": rotten,
        "latest": (out / "checkpoints" / latest).is_dir(),
        "kept": sorted(path.name for path in (out / "checkpoints").glob("*") if path.name != "latest"),
        "whole": [run_folder.step_of(path) for path in run_folder.checkpoints(out / "checkpoints") if whole(path)],
    }  # fmt: skip


def whole(path: Path) -> bool:
    try:
        manifest.check_hashes(path)
    except UserError:
        return False
    return True


def values(folder: Path):
    return sorted({value for layer in range(3) for tensor in load_file(str(folder / manifest.layer_file(layer))).values()
                   for value in tensor.unique().tolist()})  # fmt: skip


def main() -> None:
    root, power, behind = Path(sys.argv[1]).resolve(), sys.argv[2] == "1", sys.argv[3] == "1"
    rotten, number, seed = sys.argv[4] == "1", int(sys.argv[5]), int(sys.argv[6])
    start(root / "base", rotten)
    shutil.copytree(str(root / "base"), str(root / "out"))
    (points, decisive), _ = crash(root / "out", power, behind, 0)
    others = sorted(set(range(1, points + 1)) - set(decisive))
    found = {}
    for point in decisive + (random.Random(seed).sample(others, number - len(decisive)) if number else others):
        shutil.rmtree(str(root / "out"))
        shutil.copytree(str(root / "base"), str(root / "out"))
        _, reported = crash(root / "out", power, behind, point)
        found[point] = look(root / "out", reported)
    print(json.dumps({"points": points, "found": found}))


if __name__ == "__main__":
    main()
