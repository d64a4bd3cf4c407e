"""to_hf is killed at every point where it changes the disk: what has the export's name is whole, the next run clears the rest."""

import os
import signal
import sys
from pathlib import Path

import pytest

from export import aside
from export.to_hf import to_hf
from tests.models import make_hf, tiny_config

DIMS = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2,
        "vocab_size": 16}  # fmt: skip
CHANGES = ("os.rename", "os.mkdir", "os.rmdir", "os.remove", "os.truncate")


def content(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def killed(root, number, source):
    """Export once more in a process that kills itself before its change ``number`` -> how many there were, if it came through."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        count = [0]

        def audit(event, arguments):
            writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
            if (event in CHANGES or writes) and str(arguments[0]).startswith(str(root)):
                count[0] += 1
                if count[0] == number:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(audit)
        code = 1
        try:
            to_hf(str(source), str(root / "x"), shard_size="1KB", overwrite=True)
            os.write(writing, b"%d" % count[0])
            code = 0
        finally:
            os._exit(code)
    os.close(writing)
    told = os.read(reading, 100)
    os.close(reading)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return int(told) if told else None


@pytest.mark.parametrize("earlier", [False, True])
def test_whatever_has_the_name_is_whole(tmp_path, earlier, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda number: None)  # no power is cut here: nothing waits for the disk
    make_hf(tmp_path / "one", tiny_config("llama", **DIMS), seed=1)
    make_hf(tmp_path / "two", tiny_config("llama", **DIMS), seed=2)
    root, old, new = tmp_path / "out", {}, None
    root.mkdir()
    to_hf(str(tmp_path / "two"), str(tmp_path / "wanted" / "x"), shard_size="1KB")
    new = content(tmp_path / "wanted" / "x")
    if earlier:
        to_hf(str(tmp_path / "one"), str(tmp_path / "before" / "x"), shard_size="1KB")
        old = content(tmp_path / "before" / "x")
    ends, number, done = set(), 0, None
    while done is None:
        number += 1
        with aside.output_folder(str(root / "x"), 0, overwrite=True) as folder:
            for name, data in (old or {"only": b""}).items():
                (folder / name).write_bytes(data)
        if not earlier:
            (root / "x" / "only").unlink()
            (root / "x").rmdir()
        done = killed(root, number, tmp_path / "two")
        found = content(root / "x") if (root / "x").exists() else None
        assert found in (None, old, new), "neither the earlier nor the new one, killed before change %d" % number
        ends.add("none" if found is None else "new" if found == new else "old")
        if found is None and earlier:
            assert content(root / ".x.old") == old, "the earlier one is lost"
        if number % 5 == 0 or found is None and earlier:
            to_hf(str(tmp_path / "two"), str(root / "x"), shard_size="1KB", overwrite=True)
            assert content(root / "x") == new and os.listdir(str(root)) == ["x"], number
    assert done == number - 1 > 10
    assert ends == ({"none", "old", "new"} if earlier else {"none", "new"})


def test_an_earlier_export_comes_back_when_the_next_one_fails(tmp_path):
    """The next run after one that was killed between taking the old name away and giving it to the new folder."""
    (tmp_path / ".x.old").mkdir()
    (tmp_path / ".x.old" / "a").write_text("earlier")
    aside.write_marker(tmp_path / ".x.old", {})
    with pytest.raises(RuntimeError):
        with aside.output_folder(str(tmp_path / "x"), 0, overwrite=True):
            raise RuntimeError
    assert os.listdir(str(tmp_path)) == ["x"] and (tmp_path / "x" / "a").read_text() == "earlier"


def test_all_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    synced, fsync, replace = set(), os.fsync, os.replace

    def record(number):
        synced.add(os.fstat(number).st_ino)
        fsync(number)

    def renamed(source, target):
        if target == str(tmp_path / "x"):
            missing = [p.name for p in [Path(source)] + list(Path(source).rglob("*")) if p.stat().st_ino not in synced]
            assert missing == []
            renamed.done = True
        replace(source, target)

    make_hf(tmp_path / "hf", tiny_config("llama", **DIMS))
    monkeypatch.setattr(os, "fsync", record)
    monkeypatch.setattr(os, "replace", renamed)
    to_hf(str(tmp_path / "hf"), str(tmp_path / "x"), target="tgi-0.8")
    assert renamed.done and tmp_path.stat().st_ino in synced
