"""What an export writes: shards, index, folders that appear whole, the files beside the weights."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from export import aside, shards, sidecars
from export.aside import output_folder
from export.from_hf import from_hf
from export.measure import Meter, print_progress
from export.to_hf import to_hf
from pipeline_train import families
from pipeline_train.errors import RunFailed, UserError
from pipeline_train.proof import EXPORT, MARK
from pipeline_train.weights import files, same_bits
from pipeline_train.weights.writing import Item, TensorFile
from tests.models import make_hf, tiny_config

ROOT = Path(__file__).resolve().parents[2]

TENSORS = {
    "half": torch.randn(3).half(),
    "wide": torch.randn(5, 7),
    "b": torch.randn(4, 2, dtype=torch.float32).bfloat16(),
    "scalar": torch.tensor(1.5),
    "none": torch.zeros(0, 3),
}
DTYPES = {torch.float16: "F16", torch.float32: "F32", torch.bfloat16: "BF16"}


def test_our_safetensors_are_the_librarys(tmp_path):
    """Read back by the safetensors library, every tensor aligned to its own width, metadata as transformers 4.30 wants it."""
    items = [Item(name, DTYPES[t.dtype], tuple(t.shape)) for name, t in TENSORS.items()]
    ((name, items),) = shards.plan(items, 10**9)
    assert name == "model.safetensors" and [item.name for item in items] == ["wide", "scalar", "none", "half", "b"]
    with TensorFile(tmp_path / name, items, more=MARK) as writer:
        for item in items:
            flat = TENSORS[item.name].reshape(-1)
            writer.write(item.name, [flat[:2], flat[2:]])
    read = load_file(str(tmp_path / name))
    assert set(read) == set(TENSORS) and all(torch.equal(read[n], t) and read[n].dtype == t.dtype for n, t in TENSORS.items())
    with safe_open(str(tmp_path / name), "pt") as file:
        assert file.metadata() == {"format": "pt", "pipedock": "export"}
    data = (tmp_path / name).read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    assert length % 8 == 0
    assert all(header[n]["data_offsets"][0] % t.element_size() == 0 for n, t in TENSORS.items() if t.numel())


@pytest.mark.parametrize("name, pieces", [("other", [torch.zeros(2)]), ("a", [torch.zeros(1)]), ("a", [torch.zeros(2).half()])])
def test_a_writer_takes_only_what_was_announced(tmp_path, name, pieces):
    with pytest.raises(AssertionError):
        with TensorFile(tmp_path / "x.safetensors", [Item("a", "F32", (2,))]) as writer:
            writer.write(name, pieces)
    with pytest.raises(AssertionError):
        with TensorFile(tmp_path / "x.safetensors", [Item("a", "F32", (2,))]):
            pass


def test_shards_keep_the_order_and_the_limit(tmp_path):
    items = [Item(str(n), "F32", (n,)) for n in (10, 20, 5, 100, 1, 1)]
    planned = shards.plan(items, 120)
    assert [[item.name for item in shard] for _, shard in planned] == [["10", "20"], ["5"], ["100"], ["1", "1"]]
    assert planned[0][0] == "model-00001-of-00004.safetensors"
    shards.write_index(tmp_path, planned)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 4 * 137 and index["weight_map"]["100"] == "model-00003-of-00004.safetensors"


@pytest.mark.parametrize("text, size", [("5GB", 5 * 10**9), ("1.5mb", 1500000), ("2GiB", 2**31), ("700", 700), (" 3 KB ", 3000)])
def test_sizes(text, size):
    assert shards.parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "5 parsecs", "-1GB", "0", "1e3", "nan", "9" * 400, "9" * 18 + "TB"])
def test_sizes_that_are_none(text):
    with pytest.raises(UserError, match="--shard-size: .* is not a size; write it as 5GB, 500MB or 2GiB"):
        shards.parse_size(text)


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    out = tmp_path / "deep" / "out"
    with output_folder(str(out), 10) as folder:
        (folder / "a").write_text("1")
        assert not out.exists()
    assert [p.name for p in out.iterdir()] == ["a"] and os.listdir(str(out.parent)) == ["out"]
    for error, expected in ((KeyboardInterrupt(), KeyboardInterrupt), (OSError(28, "No space left on device"), RunFailed)):
        with pytest.raises(expected) as caught:
            with output_folder(str(tmp_path / "two"), 10) as folder:
                (folder / "a").write_text("1")
                raise error
        assert os.listdir(str(tmp_path)) == ["deep"]
    assert str(caught.value) == "%s: writing failed: No space left on device" % (tmp_path / "two")


def test_the_rest_of_a_killed_run_is_removed(tmp_path):
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "old").write_text("1")
    (tmp_path / "out").mkdir()  # empty: fine
    with output_folder(str(tmp_path / "out"), 1):
        pass
    assert os.listdir(str(tmp_path)) == ["out"] and os.listdir(str(tmp_path / "out")) == []


def enter(path, needed=1, overwrite=False):
    with pytest.raises(UserError) as caught:
        with output_folder(str(path), needed, overwrite):
            raise AssertionError("must not get here")
    return str(caught.value)


def test_outputs_that_are_refused(tmp_path):
    full = tmp_path / "full"
    full.mkdir()
    (full / "thesis.tex").write_text("years of work")
    assert enter(full) == "%s: exists and is not empty; name another folder or remove it" % full
    assert "is not an export of pipedock (no pipedock-export.json), so --overwrite leaves it alone" in enter(full, overwrite=True)
    assert "exists and is not a folder; name another one" in enter(full / "thesis.tex")
    assert "x: cannot be made: %s is not a folder" % (full / "thesis.tex") in enter(full / "thesis.tex" / "x")
    assert "needs 1048576.00 GiB, only " in enter(tmp_path / "new", needed=2**50)
    for name in (tmp_path / ("x" * 300), tmp_path / ("x" * 250), tmp_path / ("x" * 300) / "y"):
        assert "cannot be made: its name is too long" in enter(name)
    assert (full / "thesis.tex").read_text() == "years of work" and os.listdir(str(tmp_path)) == ["full"]


KILLED = """
import os, sys
sys.path.insert(0, %r)
from export import placed, to_hf
put, written = placed.put, []
def dies(file, place, data):
    if len(written) == int(sys.argv[3]):
        os.kill(os.getpid(), 9)
    written.append(place)
    return put(file, place, data)
placed.put = dies
to_hf.to_hf(sys.argv[1], sys.argv[2], shard_size="60KB", overwrite=True)
"""


def test_a_killed_export_is_never_taken_for_a_whole_one(tmp_path):
    """Killed at any tensor: no folder of that name, or the earlier export untouched; what is left is cleared."""
    make_hf(tmp_path / "hf", tiny_config("llama"))
    for after, before in ((0, None), (20, None), (20, b"earlier")):
        if before is not None:
            to_hf(str(tmp_path / "hf"), str(tmp_path / "x"))
            (tmp_path / "x" / "proof.json").write_bytes(before)
        done = subprocess.run([sys.executable, "-c", KILLED % str(ROOT), str(tmp_path / "hf"), str(tmp_path / "x"), str(after)])
        assert done.returncode == -9 and (tmp_path / "x").exists() is (before is not None)
        left = tmp_path / ".x.partial"
        assert list(left.glob("*.safetensors")) and not (left / "config.json").exists() and not (left / EXPORT).exists()
    assert (tmp_path / "x" / "proof.json").read_bytes() == before
    told = to_hf(str(tmp_path / "hf"), str(tmp_path / "x"), overwrite=True, shard_size="60KB")
    assert not left.exists() and told["shards"] == len(list((tmp_path / "x").glob("*.safetensors")))
    assert not (tmp_path / "x" / "proof.json").exists()


def test_tensors_of_many_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "PIECE", 1000)
    make_hf(tmp_path / "hf", tiny_config("llama"))
    wanted = load_file(str(tmp_path / "hf" / "model.safetensors"))
    from_hf(str(tmp_path / "hf"), str(tmp_path / "layers"))
    to_hf(str(tmp_path / "layers"), str(tmp_path / "x"))
    found = load_file(str(tmp_path / "x" / "model.safetensors"))
    assert max(tensor.numel() for tensor in wanted.values()) > 6000
    assert all(same_bits(found[name], tensor) for name, tensor in wanted.items() if not name.endswith("inv_freq"))


def test_overwrite_replaces_an_earlier_export_only_at_the_end(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    aside.write_marker(out, {"format": "pipedock-export/1"})
    with pytest.raises(RuntimeError):
        with output_folder(str(out), 1, overwrite=True):
            raise RuntimeError
    assert (out / EXPORT).exists()
    with output_folder(str(out), 1, overwrite=True) as folder:
        (folder / "new").write_text("1")
    assert os.listdir(str(out)) == ["new"] and os.listdir(str(tmp_path)) == ["out"]


def test_sidecars_are_all_and_only_the_small_files(tmp_path):
    kept = {
        "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json", "vocab.json",
        "merges.txt", "generation_config.json", "chat_template.jinja", "chat_template.json",
    }  # fmt: skip
    for folder in ("source", "target", "gguf"):
        (tmp_path / folder).mkdir()
    for name in kept | {"config.json", "model.safetensors", "pytorch_model.bin", "README.md", "optimizer.pt"}:
        (tmp_path / "source" / name).write_text("{}")
    (tmp_path / "source" / "additional_chat_templates").mkdir()
    (tmp_path / "source" / "additional_chat_templates" / "rag.jinja").write_text("x")
    assert set(sidecars.copy(tmp_path / "source", tmp_path / "target")) == kept
    assert (tmp_path / "target" / "additional_chat_templates" / "rag.jinja").read_text() == "x"
    (tmp_path / "gguf" / "tokenizer.model").write_bytes(b"GGUF\x03\x00\x00\x00" + b"x" * 100)
    assert sidecars.copy(tmp_path / "gguf", tmp_path / "target") == []


def config_of(**changes):
    config = tiny_config("llama", **changes)
    config = {key: value for key, value in config.items() if value is not None}
    return sidecars.export_config(config, families.family_of(config), families.dims_of(config), "BF16")


def test_config_tells_the_truth():
    config = config_of(architectures=["LLaMAForCausalLM"], tie_word_embeddings=None, transformers_version="4.27.0", dtype="float32")
    assert config["architectures"] == ["LlamaForCausalLM"] and config["tie_word_embeddings"] is False
    assert config["torch_dtype"] == config["dtype"] == "bfloat16" and config["transformers_version"] == "4.27.0"
    assert "dtype" not in config_of()


def test_rope_of_transformers_5_is_spelled_for_4_too():
    """4 reads rope_theta only and would silently use 10000."""
    config = config_of(rope_theta=None, rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    assert config["rope_theta"] == 5e5 and "rope_scaling" not in config and config["rope_parameters"]["rope_theta"] == 5e5
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling["original_max_position_embeddings"] = 32
    config = config_of(rope_theta=None, rope_parameters=dict(scaling, rope_theta=7e5))
    assert config["rope_theta"] == 7e5 and config["rope_scaling"] == scaling
    assert families.dims_of(config) == families.dims_of(dict(tiny_config("llama"), rope_theta=7e5, rope_scaling=scaling))


def test_template_generation_config_and_class_name(tmp_path):
    (tmp_path / "chat_template.jinja").write_text("{{ new }}")
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"chat_template": "{{ old }}", "tokenizer_class": "LLaMATokenizer", "x": 1})
    )
    sidecars.finish(tmp_path, {"bos_token_id": 1, "eos_token_id": 2, "model_type": "llama"})
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert settings == {"chat_template": "{{ new }}", "tokenizer_class": "LlamaTokenizer", "x": 1}
    made = json.loads((tmp_path / "generation_config.json").read_text())
    assert made == {"bos_token_id": 1, "eos_token_id": 2, "_from_model_config": True}
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 3]}')
    sidecars.finish(tmp_path, {"bos_token_id": 1})
    assert json.loads((tmp_path / "generation_config.json").read_text()) == {"eos_token_id": [2, 3]}
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(UserError, match="tokenizer_config.json: expected a JSON object"):
        sidecars.finish(tmp_path, {})
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(UserError, match="tokenizer_config.json: cannot be read"):
        sidecars.finish(tmp_path, {})


def test_figures():
    seen = []
    meter = Meter(20, lambda done, total: seen.append((done, total)))
    meter.add(15)
    meter.add(5)
    figures = meter.figures()
    assert seen == [(15, 20), (20, 20)] and figures["bytes"] == 20 and figures["gb_per_s"] >= 0 and figures["peak_gib"] > 0.05


def test_peak_memory_is_the_process_own():
    """Also in a child of a large process, whose ru_maxrss starts at the parent's size."""
    ballast = torch.ones(2**26)
    code = "from export.measure import peak_gib; a = peak_gib(); b = b'x' * (300 * 2**20); print(a, peak_gib())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={"PYTHONPATH": str(ROOT)}, timeout=60)
    before, after = map(float, done.stdout.split())
    assert 0 < before < 0.2 and after > before + 0.28 and ballast.numel()


def test_progress_where_there_is_no_terminal(capsys, monkeypatch):
    """A line every five seconds, so that a short conversion prints none."""
    now = [100.0]
    monkeypatch.setattr("export.measure.time.perf_counter", lambda: now[0])
    show = print_progress("to-hf")
    for done in range(1, 5):
        now[0] += 3.0
        show(done * 10**9, 4 * 10**9)
    assert capsys.readouterr().err == "to-hf: 2.00 of 4.00 GB, 0.33 GB/s, 6 s left\nto-hf: 4.00 of 4.00 GB, 0.33 GB/s, 0 s left\n"


def test_the_export_of_a_training_has_room_before_it_begins(tmp_path, monkeypatch):
    """Days before it is written."""
    from types import SimpleNamespace

    from pipeline_train import families
    from tests.models import tiny_config
    from verbs import exporting

    dims = families.dims_of(tiny_config("llama"))
    numbers = sum(families.FAMILIES["llama"].layer_params(dims, layer) for layer in range(dims.layers))
    section = SimpleNamespace(dir=str(tmp_path / "new" / "x"), target="hf")
    for dtype, width in (("fp32", 4), ("bf16", 2)):
        monkeypatch.setattr(aside.shutil, "disk_usage", lambda path, free=numbers * width - 1: SimpleNamespace(free=free))
        with pytest.raises(UserError) as error:
            exporting.check_model(section, dims, dtype, True)
        assert str(error.value).startswith("export.dir: %s: needs " % section.dir)
        assert str(error.value).endswith(" are free there; make room, or name a folder of another disk")
        exporting.check_model(section, dims, dtype, False)  # another node, which writes none of it
    monkeypatch.setattr(aside.shutil, "disk_usage", lambda path: SimpleNamespace(free=numbers * 4))
    exporting.check_model(section, dims, "fp32", True)
