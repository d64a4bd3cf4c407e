"""The files themselves: cut off, damaged, lying indexes, foreign dtypes, pickles with code; and reading in pieces."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline_train.errors import UserError
from pipeline_train.weights import files, open_source, same_bits
from tests.models import make_hf, tiny_config
from tests.roundtrip.folders import refused, rewrite, save_bin, without_weights


@pytest.fixture
def folder(tmp_path):
    make_hf(tmp_path / "m", tiny_config("llama"))
    return tmp_path / "m"


def shard(folder, count=3):
    """Split into safetensors shards with an index -> the index's path."""
    state = load_file(str(folder / "model.safetensors"))
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for number in range(count):
        name = "model-%05d-of-%05d.safetensors" % (number + 1, count)
        part = {key: state[key] for key in sorted(state)[number::count]}
        save_file(part, str(folder / name), metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(part, name))
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    return index


@pytest.mark.parametrize("dtype, shown", [(torch.int8, "I8"), (torch.float64, "F64")])
def test_dtypes_that_are_no_weights(folder, dtype, shown):
    rewrite(folder, lambda state: state.update({"model.norm.weight": state["model.norm.weight"].to(dtype)}))
    assert "model.norm.weight: has dtype %s; weights must be fp32, bf16 or fp16" % shown in refused(folder)
    with pytest.raises(UserError, match="has dtype %s" % shown):
        open_source(str(folder)).layer(4)
    state = load_file(str(folder / "model.safetensors"))
    without_weights(folder)
    save_bin(folder, state)
    assert "model.norm.weight: has dtype %s" % dtype in refused(folder)


DAMAGE = {
    "cut off": (lambda data: data[:-1000], "cut off: its header promises"),
    "cut off in the header": (lambda data: data[:300], "cut off: the header alone needs"),
    "longer": (lambda data: data + b"0", "has 1 bytes more than its header describes"),
    "empty": (lambda data: b"", "not a safetensors file, or an empty one"),
    "a GGUF": (lambda data: b"GGUF\x03\x00\x00\x00" + data, "not a safetensors file, or an empty one"),
    "not JSON": (lambda data: data[:8] + b"?" + data[9:], "its header is not JSON"),
    "a JSON list": (lambda data: (2).to_bytes(8, "little") + b"[]", "its header is not a JSON object"),
    "a git-lfs pointer": (lambda data: b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7\n", "git lfs pull"),
    "wrong offsets": (lambda data: data.replace(b'"shape":[48]', b'"shape":[47]', 1), "is damaged; copy the file again"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_safetensors(folder, damage):
    change, message = DAMAGE[damage]
    path = folder / "model.safetensors"
    path.write_bytes(change(path.read_bytes()))
    assert message in refused(folder) and str(path) in refused(folder)


A = '"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}'
HEADERS = {
    "one": ("{%s}" % A, 8, None),
    "another dtype": ('{"a":{"dtype":"I8","shape":[8],"data_offsets":[0,8]}}', 8, None),
    "the same key twice": ("{%s,%s}" % (A, A), 8, "its header has a twice"),
    "dtype twice": ('{"a":{"dtype":"F16","dtype":"F32","shape":[2],"data_offsets":[0,8]}}', 8, "its header has dtype twice"),
    "overlap": ("{%s,%s}" % (A, A.replace('"a"', '"b"').replace("0,8", "4,12")), 12, "of b overlaps the tensor before it"),
    "the same bytes": ("{%s,%s}" % (A, A.replace('"a"', '"b"')), 8, "of b overlaps the tensor before it"),
    "a hole": ("{%s,%s}" % (A, A.replace('"a"', '"b"').replace("0,8", "12,20")), 20, "of b leaves a hole before it"),
    "a hole in front": ("{%s}" % A.replace("0,8", "8,16"), 16, "of a leaves a hole before it"),
    "shape of a float": ("{%s}" % A.replace("[2]", "[2.7]"), 8, "header entry of a is damaged"),
    "shape of a text": ("{%s}" % A.replace("[2]", '["2"]'), 8, "header entry of a is damaged"),
    "a text as shape": ("{%s}" % A.replace("[2]", '"2"'), 8, "header entry of a is damaged"),
    "infinite shape": ("{%s}" % A.replace("[2]", "[Infinity]"), 8, "header entry of a is damaged"),
    "negative shape": ("{%s}" % A.replace("[2]", "[-1,-2]"), 8, "header entry of a is damaged"),
    "true as shape": ("{%s}" % A.replace("[2]", "[2,true]"), 8, "header entry of a is damaged"),
    "float offsets": ("{%s}" % A.replace("0,8", "0.0,8.0"), 8, "header entry of a is damaged"),
    "three offsets": ("{%s}" % A.replace("0,8", "0,4,8"), 8, "header entry of a is damaged"),
    "a list as dtype": ("{%s}" % A.replace('"F32"', '["F32"]'), 8, "header entry of a is damaged"),
    "no entry": ('{"a":7}', 0, "header entry of a is damaged"),
    "nested too deep": ("[" * 100000, 0, "its header is not JSON"),
    "an endless number": ("{%s}" % A.replace("[2]", "[%s]" % ("9" * 5000)), 8, "x.safetensors: "),
}


@pytest.mark.parametrize("header", HEADERS)
def test_headers_that_lie(tmp_path, header):
    text, size, message = HEADERS[header]
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text.encode() + bytes(size))
    if message is None:
        assert list(files.SafetensorsFile(path).entries) == ["a"]
        return
    with pytest.raises(UserError) as caught:
        files.SafetensorsFile(path)
    assert message in str(caught.value) and str(caught.value).startswith(str(path))


def test_a_file_that_shrinks_while_it_is_read(folder):
    source = open_source(str(folder))
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(UserError, match="ended while it was read; was it changed"):
        [source.layer(layer) for layer in range(5)]
    path.unlink()
    with pytest.raises(UserError, match="model.safetensors: cannot be read: No such file"):
        source.layer(0)


def test_damaged_bin(folder):
    state = load_file(str(folder / "model.safetensors"))
    without_weights(folder)
    save_bin(folder, state)
    path = folder / "pytorch_model.bin"
    whole = path.read_bytes()
    for data in (whole[:-2000], b"", b"PK\x03\x04", whole[:1000]):
        path.write_bytes(data)
        assert "pytorch_model.bin: not a whole file of tensors" in refused(folder)
    torch.save([1, 2], str(path))
    assert "pytorch_model.bin: not a state dict" in refused(folder)


class Planted:
    def __reduce__(self):
        return (os.system, ("touch planted",))


def test_a_bin_that_would_run_code(folder, monkeypatch):
    monkeypatch.chdir(folder)
    without_weights(folder)
    torch.save({"model.norm.weight": Planted()}, str(folder / "pytorch_model.bin"))
    assert "not a whole file of tensors" in refused(folder)
    assert not (folder / "planted").exists()


def test_a_broken_index(folder):
    index = shard(folder)
    source = open_source(str(folder))
    source.check()
    whole = json.loads(index.read_text())["weight_map"]
    for name in ("../m/model-00001-of-00003.safetensors", "/etc/passwd", "..", "x.txt", "a\\b.safetensors"):
        index.write_text(json.dumps({"weight_map": dict(whole, **{"model.norm.weight": name})}))
        assert "which is not a weight file of this folder; the index is not to be trusted" in refused(folder)
    index.write_text(json.dumps({"weight_map": dict(whole, **{"model.norm.weight": "model-00004-of-00003.safetensors"})}))
    assert "names the shard 'model-00004-of-00003.safetensors', which is not there; the download is not complete" in refused(folder)
    other = next(name for name in whole.values() if name != whole["model.norm.weight"])
    index.write_text(json.dumps({"weight_map": dict(whole, **{"model.norm.weight": other})}))
    assert "%s: model.norm.weight is not in this file, although model.safetensors.index.json says so" % other in refused(folder)
    for text in ("{", "[" * 100000, "{}", '{"weight_map": {}}', '{"weight_map": {"a": 1}}', "[]"):
        index.write_text(text)
        assert 'not an index of shards (expected JSON with "weight_map": {key: file})' in refused(folder)


def in_order(folder):
    """The weights by name, so that the last shard holds model.norm.weight, without what transformers 4.30 saves besides them."""
    state = load_file(str(folder / "model.safetensors"))
    return {key: state[key] for key in sorted(state) if not key.endswith("inv_freq")}


def test_a_bin_index_that_lies(folder):
    state = in_order(folder)
    without_weights(folder)
    save_bin(folder, state, shards=2)
    index = folder / "pytorch_model.bin.index.json"
    document = json.loads(index.read_text())
    names = sorted(set(document["weight_map"].values()))
    document["weight_map"]["model.norm.weight"] = next(n for n in names if n != document["weight_map"]["model.norm.weight"])
    index.write_text(json.dumps(document))
    assert "model.norm.weight is not in this file, although pytorch_model.bin.index.json says so" in refused(folder)


@pytest.mark.parametrize("key, message", [
    ("model.norm.weight", "holds model.norm.weight, too, which pytorch_model.bin.index.json puts into pytorch_model-0000"),
    ("score.weight", "holds score.weight, which pytorch_model.bin.index.json does not list"),
    ("model.layers.0.self_attn.rotary_emb.inv_freq", None),
])  # fmt: skip
def test_a_bin_shard_with_more_than_its_index_says(folder, key, message):
    state = in_order(folder)
    without_weights(folder)
    save_bin(folder, state, shards=2)
    weight_map = json.loads((folder / "pytorch_model.bin.index.json").read_text())["weight_map"]
    path = folder / next(name for name in sorted(set(weight_map.values())) if name != weight_map.get(key))
    torch.save(dict(torch.load(str(path)), **{key: torch.zeros(48)}), str(path))
    if message is None:
        open_source(str(folder)).check()
        return
    assert "%s: %s" % (path, message) in refused(folder)
    with pytest.raises(UserError, match="holds %s" % key):  # nor can its layers be read without a check
        [open_source(str(folder)).layer(layer) for layer in range(5)]


def test_the_plain_reader_equals_the_safetensors_library(tmp_path):
    state = {
        "a": torch.randn(3, 5), "b": torch.randn(7, dtype=torch.float32).bfloat16(), "c": torch.randn(2, 2, 2).half(),
        "scalar": torch.tensor(2.5), "empty": torch.zeros(0, 4),
    }  # fmt: skip
    save_file(state, str(tmp_path / "x.safetensors"))
    file = files.SafetensorsFile(tmp_path / "x.safetensors")
    assert {name: entry.shape for name, entry in file.entries.items()} == {name: tuple(t.shape) for name, t in state.items()}
    assert all(same_bits(file.read(name), tensor) for name, tensor in state.items())


def test_pieces_are_the_tensor(folder, monkeypatch):
    monkeypatch.setattr(files, "PIECE", 1000)
    source = open_source(str(folder))
    pieces = [piece.clone() for piece in source.pieces(0, "embed_tokens.weight")]
    assert [len(piece) for piece in pieces] == [1000] * 6 + [288]
    whole = source.tensor(0, "embed_tokens.weight")
    assert same_bits(torch.cat(pieces), whole.reshape(-1))
    state = load_file(str(folder / "model.safetensors"))
    without_weights(folder)
    save_bin(folder, state)
    assert same_bits(
        torch.cat([piece.clone() for piece in open_source(str(folder)).pieces(0, "embed_tokens.weight")]), whole.reshape(-1)
    )
