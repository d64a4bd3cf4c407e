"""What must be the same on every node: that a difference is found, named and explained, and that no file is read twice."""

import json
import os
from pathlib import Path
from typing import Any, Dict, List

import pytest

from pipeline_train import config, content, identity
from pipeline_train.errors import UserError

OLD = 1_600_000_000_000_000_000  # a time of change in the past


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "pipedock" / "hashes.json"


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    os.utime(str(path), ns=(OLD, OLD))
    return path


def a_node(folder: Path, **changed: Any) -> Dict[str, str]:
    """The identity of a node whose files lie in ``folder``."""
    write(folder / "train.jsonl", changed.get("data", "{}\n"))
    write(folder / "model" / "config.json", "{}")
    write(folder / "model" / "model.safetensors", changed.get("weights", "weights"))
    write(folder / "out" / "data" / "train.json", json.dumps({"hash": changed.get("encoded", "abc")}))
    raw: Dict[str, Any] = {
        "run": {"out": str(folder / "out")}, "model": {"path": str(folder / "model")},
        "data": {"train": str(folder / "train.jsonl")}, "parallel": {"pipe": 2}, "optim": {"lr": changed.get("lr", 1e-5)},
    }  # fmt: skip
    run = config.parse(raw)
    return identity.identity(run, lambda line: None, folder / "model", folder / "out")


def test_nodes_with_the_same_at_other_places_agree(tmp_path: Path) -> None:
    first, second = a_node(tmp_path / "a"), a_node(tmp_path / "b")
    assert identity.differences([first, second], ["a", "b"]) == []
    assert {"code/pipedock.py", "versions/torch", "config/optim.lr", "data/train", "data/encoded/train",
            "weights/model.safetensors", "weights/config.json"} <= set(first)  # fmt: skip
    assert not any(str(tmp_path) in value for value in first.values())


@pytest.mark.parametrize("changed, words", [
    ({"lr": 2e-5}, ["config differs", "optim.lr: 1e-05 on node 0 (a), 2e-05 on node 1 (b)", "same run.yaml"]),
    ({"data": "[]\n"}, ["data differs", "train:", "on node 1 (b)", "give every node the same file"]),
    ({"encoded": "abd"}, ["data differs", "encoded/train: abc on node 0 (a), abd on node 1 (b)"]),
    ({"weights": "Weights"}, ["weights differ between the nodes: ", "model.safetensors", "on node 1 (b)", "rsync -a model.path"]),
])  # fmt: skip
def test_what_differs_is_named(tmp_path: Path, changed: Dict[str, Any], words: List[str]) -> None:
    [line] = identity.differences([a_node(tmp_path / "a"), a_node(tmp_path / "b", **changed)], ["a", "b"])
    assert [word for word in words if word not in line] == []


def test_code_and_versions_are_named() -> None:
    same = {"code/a.py": "0" * 64, "code/b.py": "1" * 64, "versions/torch": "2.13.0", "versions/lion-pytorch": "0.2"}
    other = dict(same, **{"code/b.py": "2" * 64, "versions/torch": "2.12.0"})
    code, torch = identity.differences([same, other, same], ["a", "b", "c"])
    assert code == ("code differs between the nodes: b.py: 111111111111 on node 0 (a), node 2 (c), 222222222222 on node 1 (b); "
                    "install the same pipedock on every node (the same commit, wheel or image)")  # fmt: skip
    assert "torch: 2.13.0 on node 0 (a), node 2 (c), 2.12.0 on node 1 (b); install one release" in torch


def test_many_files_and_many_nodes_are_one_line() -> None:
    same = {"weights/%d" % number: "0" * 64 for number in range(20)}
    other = {"weights/%d" % number: "1" * 64 for number in range(20)}
    [line] = identity.differences([same] + 9 * [other], list("abcdefghij"))
    assert "weights differ between the nodes: 0, 1, 10 and 17 more" in line
    assert "node 1 (b), node 2 (c), node 3 (d) and 6 more" in line
    missing, changed = identity.differences([same, dict(other, **{"weights/0": identity.MISSING})], ["a", "b"])
    assert "0: 000000000000 on node 0 (a), not there on node 1 (b)" in missing and "1, 10, 11 and 16 more" in changed


def test_a_data_file_that_a_node_lacks_is_a_difference(tmp_path: Path) -> None:
    first, second = a_node(tmp_path / "a"), a_node(tmp_path / "b")
    (tmp_path / "b" / "train.jsonl").unlink()
    raw = {"run": {"out": "-"}, "model": {"path": "-"}, "data": {"train": str(tmp_path / "b" / "train.jsonl")},
           "parallel": {"pipe": 2}}  # fmt: skip
    second = dict(second, **identity.identity(config.parse(raw), lambda line: None))
    [line] = identity.differences([first, second], ["a", "b"])
    assert "train: " in line and "not there on node 1 (b)" in line


def test_only_the_patch_of_python_may_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    run = config.parse({"run": {"out": "-"}, "model": {"path": "-"}, "data": {"train": "-"}, "parallel": {"pipe": 2}})
    monkeypatch.setattr(identity.compat, "versions", lambda: {"python": "3.11.4", "torch": None})
    first = identity.identity(run, lambda line: None, data=False)
    assert first["versions/python"] == "3.11" and first["versions/torch"] == "not installed" and "data/train" not in first


def test_the_weights_in_use(tmp_path: Path) -> None:
    for name in ("model.safetensors", "pytorch_model.bin", "optim.bin", "adapter.safetensors"):
        write(tmp_path / name, name)
    assert [path.name for path in identity.weight_files(tmp_path)] == ["model.safetensors"]
    (tmp_path / "model.safetensors").unlink()
    assert [path.name for path in identity.weight_files(tmp_path)] == ["pytorch_model.bin"]
    write(tmp_path / "manifest.json", "{}")
    write(tmp_path / "layer_000.safetensors", "")
    assert [path.name for path in identity.weight_files(tmp_path)] == ["layer_000.safetensors"]


def test_encoded_data_that_cannot_be_read(tmp_path: Path) -> None:
    a_node(tmp_path)
    write(tmp_path / "out" / "data" / "train.json", "{")
    run = config.parse({"run": {"out": "-"}, "model": {"path": "-"}, "data": {"train": "-"}, "parallel": {"pipe": 2}})
    with pytest.raises(UserError, match=r"train\.json: cannot be read: .*; delete it, it is made again"):
        identity.identity(run, lambda line: None, out=tmp_path / "out")


def test_a_file_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own_cache: Path) -> None:
    path, read = write(tmp_path / "w", "one"), content._read
    first = content.hashes([path], print)
    assert list(json.loads(own_cache.read_text())) == [str(path)]
    monkeypatch.setattr(content, "_read", lambda path, progress: pytest.fail("read again"))
    assert content.hashes([path], print) == first
    monkeypatch.setattr(content, "_read", read)
    write(path, "two").touch()  # the same size at another time
    assert content.hashes([path], print) != first
    own_cache.write_text("[")  # damaged: read again
    assert content.hashes([path], print) != first


def test_a_file_that_has_just_changed_is_not_remembered(tmp_path: Path, own_cache: Path) -> None:
    (tmp_path / "w").write_text("one")
    content.hashes([tmp_path / "w"], print)
    assert not own_cache.exists()


def test_without_a_home_or_on_a_full_disk_nothing_is_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "w", "one")
    monkeypatch.setattr(content.host, "cache_folder", lambda: None)
    first = content.hashes([path], print)
    monkeypatch.setattr(content.host, "cache_folder", lambda: Path("/proc/nowhere"))
    assert content.hashes([path], print) == first


def test_an_unreadable_file_and_progress(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="gone: cannot be read: No such file or directory"):
        content.hashes([tmp_path / "gone"], print)
    lines: List[str] = []
    monkeypatch.setattr(content, "SAY_S", 0.0)
    content.hashes([write(tmp_path / "w", "x" * 1000)], lines.append)
    assert lines and lines[-1].startswith("hashing: 0.0 of 0.0 GB read, 0.") and "then remembered" in lines[-1]
