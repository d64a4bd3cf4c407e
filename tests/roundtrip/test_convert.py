"""from-hf and to-hf as a user calls them: every combination bit-equal, every mistake one line, memory of one piece."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from export.from_hf import from_hf
from export.to_hf import to_hf
from pipeline_train import manifest
from pipeline_train.errors import RunFailed, UserError
from pipeline_train.weights import open_source, same_bits
from tests.models import make_hf, tiny_config
from tests.roundtrip.folders import edit_json, make_checkpoint, needs, save_bin, seal, state_of, without_weights
from tests.tokenizers import tiny_tokenizer

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("family", ["llama", "bloom"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_there_and_back_is_bit_equal(family, tied, dtype, form, tmp_path):
    model = make_hf(tmp_path / "hf", tiny_config(family, tie_word_embeddings=tied)).to(dtype)
    without_weights(tmp_path / "hf")
    if form == "bin":
        save_bin(tmp_path / "hf", state_of(model), shards=2)
    else:
        model.save_pretrained(str(tmp_path / "hf"))
    edit_json(tmp_path / "hf" / "config.json", dtype=str(dtype).split(".")[1])
    from_hf(str(tmp_path / "hf"), str(tmp_path / "layers"))
    expected = state_of(model)
    for number, size in enumerate(("5GB", "1B", "60KB")):
        out = tmp_path / ("export%d" % number)
        told = to_hf(str(tmp_path / "layers"), str(out), shard_size=size)
        files = sorted(p.name for p in out.glob("*.safetensors"))
        assert told["shards"] == len(files) and (len(files) > 1) is (number > 0)
        state = {}
        for name in files:
            state.update(load_file(str(out / name)))
        assert set(expected) - set(state) == ({"lm_head.weight"} if tied and family == "llama" else set())
        assert all(same_bits(state[name], expected[name]) for name in state)
        assert told["bytes"] == sum(t.numel() * t.element_size() for t in state.values())
    loaded = AutoModelForCausalLM.from_pretrained(str(out), torch_dtype="auto")
    assert loaded.dtype == dtype and all(same_bits(t, expected[n]) for n, t in state_of(loaded).items())


def test_an_untrained_model_is_readied_for_a_server(tmp_path):
    """HF folder -> HF folder, with everything that from_pretrained wants."""
    make_hf(tmp_path / "hf", tiny_config("llama", vocab_size=520))
    tiny_tokenizer(tmp_path / "hf", "bpe", vocab=512)
    (tmp_path / "hf" / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    told = to_hf(str(tmp_path / "hf"), str(tmp_path / "out"))
    assert told["step"] is None and told["dtype"] == "fp32"
    assert AutoConfig.from_pretrained(str(tmp_path / "out")).vocab_size == 520
    assert AutoTokenizer.from_pretrained(str(tmp_path / "out"))("Hello")["input_ids"]
    settings = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert settings["chat_template"] == (tmp_path / "out" / "chat_template.jinja").read_text()
    assert AutoModelForCausalLM.from_pretrained(str(tmp_path / "out")).generation_config.eos_token_id == 2
    again = to_hf(str(tmp_path / "hf"), str(tmp_path / "out"), dtype="bf16", overwrite=True)
    assert again["dtype"] == "bf16" and open_source(str(tmp_path / "out")).entry(1, "input_layernorm.weight").dtype == "BF16"


@needs((4, 43), "chat_template.jinja")
def test_the_template_comes_along(tmp_path):
    make_hf(tmp_path / "hf", tiny_config("llama", vocab_size=520))
    tiny_tokenizer(tmp_path / "hf", "bpe", vocab=512, chat_template="{{ messages[0]['content'] }}!")
    to_hf(str(tmp_path / "hf"), str(tmp_path / "out"))
    tokenizer = AutoTokenizer.from_pretrained(str(tmp_path / "out"))
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi!"


def test_the_manifest_of_from_hf(tmp_path):
    make_hf(tmp_path / "hf", tiny_config("bloom"))
    told = from_hf(str(tmp_path / "hf"), str(tmp_path / "out"))
    document = manifest.read(tmp_path / "out")
    assert (document["kind"], document["family"], document["tied"], document["layers"]) == ("from-hf", "bloom", True, 5)
    assert document["run_dtype"] == document["layer_dtype"] == told["dtype"] == "fp32" and document["step"] is None
    assert set(document["files"]) == {p.name for p in (tmp_path / "out").iterdir()} - {"manifest.json"}
    assert all(document["files"][name] == manifest.file_entry(tmp_path / "out" / name) for name in document["files"])
    embed = load_file(str(tmp_path / "out" / "layer_000.safetensors"))["word_embeddings.weight"]
    assert same_bits(embed, load_file(str(tmp_path / "out" / "layer_004.safetensors"))["lm_head.weight"])


def refused(call, *args, **options):
    with pytest.raises((UserError, RunFailed)) as caught:
        call(*args, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_the_user_can_get_wrong(tmp_path):
    make_checkpoint(tmp_path / "c", tiny_config("llama"))
    c, out = str(tmp_path / "c"), str(tmp_path / "out")
    assert refused(to_hf, c, out, target="tgi-9") == "--target tgi-9: not one of those there are: hf, tgi-0.8, tgi-3, vllm"
    assert refused(to_hf, c, out, dtype="int4") == "--dtype int4: not one of those there are: fp32, bf16, fp16"
    assert "--shard-size: 'huge' is not a size" in refused(to_hf, c, out, shard_size="huge")
    assert "none: no such folder" in refused(to_hf, str(tmp_path / "none"), out)
    assert "c itself; name a folder of its own for the export" in refused(to_hf, c, c)
    assert "c: holds layer files already (checkpoint); use it as it is" in refused(from_hf, c, out)
    (tmp_path / "c" / "manifest.json").unlink()
    assert "no weights here" in refused(from_hf, c, out)
    assert not (tmp_path / "out").exists()


def test_fp16_cannot_hold_everything(tmp_path):
    make_checkpoint(tmp_path / "c", tiny_config("llama"))
    path = tmp_path / "c" / "layer_002.safetensors"
    state = load_file(str(path))
    state["mlp.up_proj.weight"][0, 0] = 70000.0
    save_file(state, str(path))
    seal(tmp_path / "c")
    message = refused(to_hf, str(tmp_path / "c"), str(tmp_path / "out"), dtype="fp16")
    assert message == (
        "model.layers.1.mlp.up_proj.weight: has values over 65504, which fp16 cannot hold; export with --dtype bf16 or fp32"
    )
    assert [p.name for p in tmp_path.iterdir()] == ["c"]
    to_hf(str(tmp_path / "c"), str(tmp_path / "out"), dtype="bf16")


def test_a_run_folder_means_its_newest_checkpoint(tmp_path):
    for step in (3, 12):
        make_checkpoint(tmp_path / "run" / "checkpoints" / ("step_%06d" % step), tiny_config("llama"), step=step, seed=step)
    assert to_hf(str(tmp_path / "run"), str(tmp_path / "out"))["step"] == 12


def test_the_verbs(tmp_path):
    """In a process of their own: one JSON document on stdout, exit codes 0, 1 and 2, figures at the end."""
    make_hf(tmp_path / "hf", tiny_config("bloom"))

    def call(*arguments):
        done = subprocess.run(
            [sys.executable, "-c", VERBS, *arguments],
            capture_output=True,
            text=True,
            cwd=str(tmp_path),
            timeout=300,
            env=ENVIRONMENT,
        )
        return done.stdout, done.stderr

    out, err = call("from-hf --input hf --output layers", "to-hf --input layers --output x --dtype bf16 --json",
                    "verify --checkpoint layers --export x", "verify --checkpoint layers --export x --json")  # fmt: skip
    codes, texts = json.loads(out.strip().split("\n")[-1]), out.strip().split("\n")
    assert codes == [0, 0, 0, 0], err
    assert texts[0] == "wrote layers: bloom, 5 layer files, fp32, tied head" and "GB/s), peak memory" in texts[1]
    assert json.loads(texts[2])["dtype"] == "bf16"
    assert texts[3] == "x is the model of layers" and "42 tensors bit-equal (bf16)" in texts[4] and "proof.json written" in texts[8]
    assert "in bf16: the same likeliest token" in texts[6] and texts[7].startswith(
        "  layer by layer and as a whole model; 1 prompts, 128"
    )
    assert json.loads(texts[9])["holds"] is True
    edit_json(tmp_path / "x" / "config.json", layer_norm_epsilon=1e-3)
    out, err = call("verify --checkpoint layers --export x", "to-hf --input hf --output x", "from-hf --input none --output y")
    assert json.loads(out) == [1, 2, 2]
    assert (
        "pipedock verify: x: is not the checkpoint's model: config.json: norm_eps is 1e-05 in the checkpoint, 0.001 in the export"
        in err
    )
    assert "pipedock to-hf: x: exists and is not empty" in err and "pipedock from-hf: none: no such folder" in err
    assert "Traceback" not in err


VERBS = """
import json, os, sys, pipedock
stdout = os.dup(1)
codes = []
for line in sys.argv[1:]:
    os.dup2(stdout, 1)
    codes.append(pipedock.main(line.split()))
os.write(stdout, (json.dumps(codes) + chr(10)).encode())
"""
ENVIRONMENT = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

PEAK = """
import sys
from export.from_hf import from_hf
from export.to_hf import to_hf
from export.measure import peak_gib
import transformers
for folder in sys.argv[1:]:
    before = peak_gib()
    from_hf(folder + "/hf", folder + "/layers")
    to_hf(folder + "/layers", folder + "/out", dtype="bf16")
print((peak_gib() - before) * 2**30)
"""


def test_memory_is_a_piece_and_neither_a_tensor_nor_a_shard(tmp_path):
    """0.4 GB in two tensors of 200 MB: pieces of 16 MiB, one or two for each thread, and their casts are all that is held. What
    glibc keeps of what was given back (once 120 MiB, once 0) is not held: here every piece is mapped by itself."""
    config = tiny_config("bloom", hidden_size=256, n_layer=1, tie_word_embeddings=False)
    for name, vocab in (("small", 131), ("big", 196608)):
        state = state_of(make_hf(tmp_path / name / "hf", config))
        edit_json(tmp_path / name / "hf" / "config.json", vocab_size=vocab)
        for key in ("transformer.word_embeddings.weight", "lm_head.weight"):
            state[key] = torch.full((vocab, 256), 0.5)
        save_file(state, str(tmp_path / name / "hf" / "model.safetensors"))
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(tmp_path / "small"), str(tmp_path / "big")],
        capture_output=True, text=True, timeout=300, env=dict(ENVIRONMENT, MALLOC_MMAP_THRESHOLD_=str(2**20)),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    grown = float(done.stdout) / 2**20
    assert grown < 150, "grown by %.0f MiB" % grown
