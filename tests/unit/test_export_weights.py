"""The strict reader: everything that is wrong with a folder of weights is one line that names it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline_train.errors import UserError
from pipeline_train.weights import open_source, same_bits
from tests.models import make_hf, tiny_config
from tests.roundtrip.folders import edit_json, make_checkpoint, refused, rewrite, seal, state_of, without_weights

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def folder(tmp_path):
    make_hf(tmp_path / "m", tiny_config("llama"))
    return tmp_path / "m"


def test_missing_extra_and_misshapen_keys_are_listed_together(folder):
    def change(state):
        for name in [name for name in state if ".mlp." in name]:
            del state[name]
        state["model.layers.7.mlp.up_proj.weight"] = torch.zeros(2)
        state["score.weight"] = torch.zeros(2)
        state["model.norm.weight"] = torch.zeros(49)

    rewrite(folder, change)
    message = refused(folder)
    assert message.startswith("%s: the weights do not match config.json: 9 missing: model.layers.0.mlp." % folder)
    assert ", ... (4 more); 2 extra: model.layers.7.mlp.up_proj.weight, score.weight; 1 of another shape: " in message
    assert message.endswith("model.norm.weight is [49], expected [48]")


def test_only_named_keys_are_ignored(folder):
    rewrite(folder, lambda state: state.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(6)}))
    open_source(str(folder)).check()
    rewrite(folder, lambda state: state.update({"model.layers.0.self_attn.rotary_emb.inv_freq2": torch.ones(6)}))
    assert "1 extra: model.layers.0.self_attn.rotary_emb.inv_freq2" in refused(folder)


def test_reading_without_check_is_strict_too(folder):
    rewrite(folder, lambda state: state.update({"model.norm.weight": torch.zeros(49)}) or state.pop("lm_head.weight"))
    source = open_source(str(folder))
    with pytest.raises(UserError, match=r"model.norm.weight is \[49\], expected \[48\]"):
        source.layer(4)
    with pytest.raises(UserError, match=r"model.norm.weight is \[49\], expected \[48\]"):
        list(source.pieces(4, "norm.weight"))
    with pytest.raises(UserError, match="1 missing: lm_head.weight"):
        source.tensor(4, "lm_head.weight")


def test_no_weights(folder):
    without_weights(folder)
    assert "%s: no weights here (looked for model.safetensors, " % folder in refused(folder)
    (folder / "adapter_config.json").write_text("{}")
    assert "it is a LoRA adapter: merge it into its base model first" in refused(folder)
    (folder / "config.json").unlink()
    assert "config.json: no such file" in refused(folder)


def test_config_that_is_not_implemented_names_the_folder(folder):
    edit_json(folder / "config.json", hidden_act="relu")
    assert refused(folder).startswith("%s: config.json: hidden_act: 'relu' is not implemented" % folder)


def test_tied_by_config_but_different_in_the_file(tmp_path):
    model = make_hf(tmp_path, tiny_config("bloom", tie_word_embeddings=False))
    edit_json(tmp_path / "config.json", tie_word_embeddings=True)
    source = open_source(str(tmp_path))
    source.check()
    for read in (source.check_tied, lambda: source.layer(4)):
        with pytest.raises(UserError) as caught:
            read()
        assert (
            "config.json says that embedding and head are tied, but transformer.word_embeddings.weight and lm_head.weight differ"
            in str(caught.value)
        )
        assert 'set "tie_word_embeddings": false in config.json' in str(caught.value)
    edit_json(tmp_path / "config.json", tie_word_embeddings=False)
    assert same_bits(open_source(str(tmp_path)).layer(4)["lm_head.weight"], state_of(model)["lm_head.weight"])


def test_the_same_parameter_under_both_its_names(tmp_path):
    make_hf(tmp_path, tiny_config("bloom"))
    rewrite(tmp_path, lambda state: state.update({"ln_f.weight": torch.zeros(48)}))
    assert "1 extra: " in refused(tmp_path) and "ln_f.weight" in refused(tmp_path)


def test_layer_files_are_exact(tmp_path):
    make_checkpoint(tmp_path, tiny_config("llama"))
    path = tmp_path / "layer_004.safetensors"
    state = load_file(str(path))
    save_file(dict(state, more=torch.zeros(1)), str(path), metadata={"format": "pt"})
    seal(tmp_path)
    assert "1 extra: layer_004.safetensors/more" in refused(tmp_path)
    del state["norm.weight"]
    save_file(state, str(path), metadata={"format": "pt"})
    seal(tmp_path)
    assert "1 missing: layer_004.safetensors/norm.weight" in refused(tmp_path)
    edit_json(tmp_path / "manifest.json", family="bloom")
    assert "manifest.json says family 'bloom' but its config.json 'llama'; one of them was changed" in refused(tmp_path)


def test_paths_that_are_no_folder(folder):
    assert "is a file; name the folder that holds config.json and the weights" in refused(folder / "config.json")
    assert refused(folder / "none") == "%s: no such folder" % (folder / "none")
    assert refused(folder / ("x" * 300)).endswith("xxx: no such folder")


HUB = """
import sys
from pipeline_train.errors import UserError
from pipeline_train.weights import open_source, resolve
source = open_source("someone/tiny")
source.check()
print(source.folder.name, len(source.layer(1)), resolve("someone/tiny", weights=False).name)
try:
    open_source("someone/absent")
except UserError as error:
    print(error)
"""


def test_hub_names_come_from_the_cache_or_say_why_not(folder, tmp_path):
    """With HF_HUB_OFFLINE, through huggingface_hub's real cache layout."""
    repository = tmp_path / "cache" / "models--someone--tiny"
    snapshot = repository / "snapshots" / ("a" * 40)
    snapshot.parent.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    folder.rename(snapshot)
    environment = dict(os.environ, HF_HUB_OFFLINE="1", PYTHONPATH=str(ROOT))
    environment.update(HF_HUB_CACHE=str(tmp_path / "cache"), HUGGINGFACE_HUB_CACHE=str(tmp_path / "cache"))
    done = subprocess.run(
        [sys.executable, "-c", HUB], env=environment, capture_output=True, text=True, cwd=str(tmp_path), timeout=120
    )
    assert done.returncode == 0, done.stderr
    found, absent = done.stdout.strip().split("\n")
    assert found == "%s 9 %s" % ("a" * 40, "a" * 40)
    assert absent.startswith("someone/absent: no such folder or file here, and the hub did not give a model of that name (")
    assert absent.endswith("Name a local folder, or download it first where there is a network.")
