"""Whatever a folder holds, to-hf and from-hf end with 0 or 2: no traceback, no folder that is half a model."""

import json
import shutil
import struct

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import pipedock
from tests.models import make_hf, tiny_config

LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
VALUES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3), max_leaves=6
)
NAMES = st.text(max_size=8) | st.sampled_from(["../x.safetensors", "/etc/passwd", "model.safetensors", "a/b.bin", "", ".", "\x00"])
QUICK = settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    derandomize=True,
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A tiny model of each family, and one in two shards."""
    folder = tmp_path_factory.mktemp("fuzz")
    for family in ("llama", "bloom"):
        make_hf(folder / family, tiny_config(family, num_hidden_layers=1) if family == "llama" else tiny_config(family, n_layer=1))
    shutil.copytree(str(folder / "llama"), str(folder / "sharded"))
    (folder / "sharded" / "model.safetensors").unlink()
    assert pipedock.main(["to-hf", "--input", str(folder / "llama"), "--output", str(folder / "s"), "--shard-size", "60KB"]) == 0
    for path in (folder / "s").glob("model*"):
        shutil.copyfile(str(path), str(folder / "sharded" / path.name))
    return folder


def convert(folder, family, capfd):
    """Both directions from a spoilt folder; nothing may be left where something went wrong."""
    for verb in ("to-hf", "from-hf"):
        out = folder / "out"
        shutil.rmtree(str(out), ignore_errors=True)
        code = pipedock.main([verb, "--input", str(folder / family), "--output", str(out)])
        captured = capfd.readouterr()
        assert code in (0, 2), captured.err
        assert "Traceback" not in captured.err
        if code == 2:
            assert not out.exists() and captured.err.strip().split("\n")[-1].startswith("pipedock %s: " % verb)
        assert not (folder / ".out.partial").exists()


def spoil(whole, family, name, data):
    """A copy in which one file has other bytes; the rest are links, so that this is quick."""
    work = whole / "work"
    shutil.rmtree(str(work), ignore_errors=True)
    (work / family).mkdir(parents=True)
    for path in (whole / family).iterdir():
        if path.name != name:
            (work / family / path.name).symlink_to(path)
    (work / family / name).write_bytes(data)
    return work


@QUICK
@given(family=st.sampled_from(["llama", "bloom"]), data=st.data())
def test_any_config(family, data, whole, capfd):
    config = json.loads((whole / family / "config.json").read_text())
    for key in data.draw(st.lists(st.sampled_from(sorted(config)) | st.text(max_size=5), min_size=1, max_size=2)):
        config[key] = data.draw(VALUES)
    convert(spoil(whole, family, "config.json", json.dumps(config).encode()), family, capfd)


@pytest.mark.parametrize("blocks", [10**9, 2**70])
def test_a_config_with_a_billion_blocks(blocks, whole, capfd):
    config = dict(json.loads((whole / "llama" / "config.json").read_text()), num_hidden_layers=blocks)
    assert pipedock.main(["to-hf", "--input", str(spoil(whole, "llama", "config.json", json.dumps(config).encode()) / "llama"),
                          "--output", str(whole / "work" / "out")]) == 2  # fmt: skip
    assert "%d blocks; a file that was damaged or forged (at most 10000)" % blocks in capfd.readouterr().err
    convert(spoil(whole, "llama", "config.json", json.dumps(config).encode()), "llama", capfd)


def test_names_with_line_breaks_stay_on_one_line(whole, capfd):
    config = json.loads((whole / "llama" / "config.json").read_text())
    convert(spoil(whole, "llama", "config.json", json.dumps(dict(config, **{"a\nb": 1})).encode()), "llama", capfd)
    content = (whole / "llama" / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    text = content[8 : 8 + length].replace(b"model.norm.weight", b"model\\nnorm.weight")
    convert(spoil(whole, "llama", "model.safetensors", struct.pack("<Q", len(text)) + text + content[8 + length :]), "llama", capfd)


@QUICK
@given(data=st.binary(max_size=60) | VALUES.map(lambda value: json.dumps(value).encode()))
def test_any_bytes_as_config_or_index(data, whole, capfd):
    convert(spoil(whole, "llama", "config.json", data), "llama", capfd)
    convert(spoil(whole, "sharded", "model.safetensors.index.json", data), "sharded", capfd)


@QUICK
@given(data=st.data())
def test_any_index(data, whole, capfd):
    index = json.loads((whole / "sharded" / "model.safetensors.index.json").read_text())
    for key in data.draw(st.lists(st.sampled_from(sorted(index["weight_map"])) | st.text(max_size=5), min_size=1, max_size=3)):
        index["weight_map"][key] = data.draw(NAMES | VALUES)
    convert(spoil(whole, "sharded", "model.safetensors.index.json", json.dumps(index).encode()), "sharded", capfd)


@QUICK
@given(data=st.data())
def test_any_header(data, whole, capfd):
    content = (whole / "bloom" / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    name = data.draw(st.sampled_from(sorted(set(header) - {"__metadata__"})))
    field = data.draw(st.sampled_from(["dtype", "shape", "data_offsets", "all"]))
    value = data.draw(VALUES | st.sampled_from(["F16", "F32", "I8", [0, 4], [8, 0], [2**63, 2**64]]))
    if field == "all":
        header[name] = value
    else:
        header[name][field] = value
    text = json.dumps(header).encode()
    size = data.draw(st.just(len(text)) | st.integers(0, 2**64 - 1))
    convert(spoil(whole, "bloom", "model.safetensors", struct.pack("<Q", size) + text + content[8 + length :]), "bloom", capfd)


@QUICK
@given(data=st.binary(max_size=200))
def test_any_bytes_as_weights(data, whole, capfd):
    work = spoil(whole, "llama", "model.safetensors", data)
    convert(work, "llama", capfd)
    (work / "llama" / "model.safetensors").rename(work / "llama" / "pytorch_model.bin")
    convert(work, "llama", capfd)


@QUICK
@given(data=st.data())
def test_any_settings_beside_the_weights(data, whole, capfd):
    name = data.draw(st.sampled_from(["tokenizer_config.json", "generation_config.json", "tokenizer.json"]))
    content = data.draw(st.binary(max_size=40) | VALUES.map(lambda value: json.dumps(value).encode()))
    convert(spoil(whole, "llama", name, content), "llama", capfd)


def test_a_shard_size_without_a_unit_is_no_number_of_gigabytes(whole, capfd):
    argv = ["to-hf", "--input", str(whole / "llama"), "--output", str(whole / "five"), "--shard-size", "5"]
    assert pipedock.main(argv) == 2 and not (whole / "five").exists()
    assert capfd.readouterr().err.splitlines()[-1] == "pipedock to-hf: --shard-size: 5 bytes? Write it as 5GB, 500MB or 2GiB"
