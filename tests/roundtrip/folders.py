"""Model folders as they really come: every age of Hugging Face file, and a training checkpoint, from one tiny model."""

import json
from pathlib import Path
from typing import Any, Dict, Tuple

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from export.verify import verify
from pipeline_train import families, manifest
from pipeline_train.errors import RunFailed, UserError
from pipeline_train.weights import open_source
from tests.models import make_hf, tiny_config
from tests.tokenizers import tiny_tokenizer

VERSION = tuple(int(part) for part in transformers.__version__.split(".")[:2])


def needs(since: Tuple[int, int], what: str) -> Any:
    """A mark for what older transformers do not compute."""
    return pytest.mark.skipif(
        VERSION < since, reason="transformers %s has no %s (since %d.%d)" % (transformers.__version__, what, *since)
    )


def state_of(model: Any) -> Dict[str, torch.Tensor]:
    """Every parameter (a tied head too), without the rotary buffers that transformers saved until 4.31."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items() if not name.endswith(".inv_freq")}


def edit_json(path: Path, **changes: Any) -> None:
    """Set keys of a JSON file; None removes one."""
    document = json.loads(path.read_text())
    document.update(changes)
    path.write_text(json.dumps({key: value for key, value in document.items() if value is not None or key not in changes}))


def write_tokenizer_core(folder: Path, change: Any) -> None:
    """Rewrite tokenizer.json after ``change`` had its way with it."""
    core = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    change(core)
    (folder / "tokenizer.json").write_text(json.dumps(core, ensure_ascii=False), encoding="utf-8")


def save_bin(folder: Path, state: Dict[str, torch.Tensor], shards: int = 1, **options: Any) -> None:
    """pytorch_model.bin, or that many shards and an index, as transformers 4 wrote them."""
    names = sorted(state)
    if shards == 1:
        torch.save(state, str(folder / "pytorch_model.bin"), **options)
        return
    weight_map = {}
    for number in range(shards):
        name = "pytorch_model-%05d-of-%05d.bin" % (number + 1, shards)
        part = names[number::shards]
        torch.save({key: state[key] for key in part}, str(folder / name), **options)
        weight_map.update(dict.fromkeys(part, name))
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


def without_weights(folder: Path) -> None:
    for path in list(folder.glob("*.safetensors*")) + list(folder.glob("*.bin*")):
        path.unlink()


def llama_of_430(folder: Path) -> Any:
    """A 2023 folder: rotary buffers in two .bin shards, max_sequence_length, the tokenizer class of the first converter."""
    model = make_hf(folder, tiny_config("llama", vocab_size=400))
    tiny_tokenizer(folder, "spm-slow", vocab=400)
    without_weights(folder)
    state = state_of(model)
    for block in range(3):
        state["model.layers.%d.self_attn.rotary_emb.inv_freq" % block] = torch.rand(6)
    save_bin(folder, state, shards=2)
    old = {
        "architectures": ["LLaMAForCausalLM"], "model_type": "llama", "vocab_size": 400, "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 3, "num_attention_heads": 4, "hidden_act": "silu", "max_sequence_length": 128, "rms_norm_eps": 1e-05,
        "initializer_range": 0.02, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": -1, "torch_dtype": "float32",
        "transformers_version": "4.27.0.dev0", "use_cache": True,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(old))
    edit_json(folder / "tokenizer_config.json", tokenizer_class="LLaMATokenizer")
    return model


def bloom_of_the_hub(folder: Path) -> Any:
    """bigscience's folder: bare keys, no head, config with Megatron's leftovers; one .bin."""
    model = make_hf(folder, tiny_config("bloom"))
    without_weights(folder)
    state = {key[len("transformer.") :]: value for key, value in state_of(model).items() if key != "lm_head.weight"}
    save_bin(folder, state)
    old = {
        "apply_residual_connection_post_layernorm": False, "attention_dropout": 0.0, "attention_softmax_in_fp32": True,
        "bias_dropout_fusion": True, "unk_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3,
        "hidden_dropout": 0.0,
        "initializer_range": 0.02, "layer_norm_epsilon": 1e-05, "masked_softmax_fusion": True, "model_type": "bloom", "n_embed": 48,
        "n_inner": None, "n_layer": 3, "num_attention_heads": 4, "offset_alibi": 100, "pretraining_tp": 1, "seq_length": 2048,
        "skip_bias_add": True, "skip_bias_add_qkv": False, "use_cache": True, "vocab_size": 131,
        "architectures": ["BloomModel"], "transformers_version": "4.20.0",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(old))
    return model


def bare_bloom_with_its_head(folder: Path) -> Any:
    """Bare keys in safetensors beside an untied lm_head.weight: what transformers calls corrupted."""
    model = make_hf(folder, tiny_config("bloom", tie_word_embeddings=False))
    without_weights(folder)
    state = {key[len("transformer.") :] if key.startswith("transformer.") else key: value for key, value in state_of(model).items()}
    save_file(state, str(folder / "model.safetensors"), metadata={"format": "pt"})
    return model


def single_bin_before_zip(folder: Path) -> Any:
    """torch's format before 1.6, which cannot be mapped; the tied head is saved too."""
    model = make_hf(folder, tiny_config("llama", tie_word_embeddings=True))
    without_weights(folder)
    save_bin(folder, state_of(model), _use_new_zipfile_serialization=False)
    return model


def sharded_safetensors(folder: Path) -> Any:
    model = make_hf(folder, tiny_config("llama"))
    without_weights(folder)
    model.save_pretrained(str(folder), max_shard_size="60KB", safe_serialization=True)
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    return model


def tied_with_both_copies(folder: Path) -> Any:
    model = make_hf(folder, tiny_config("bloom"))
    without_weights(folder)
    save_file(state_of(model), str(folder / "model.safetensors"), metadata={"format": "pt"})
    return model


def tied_with_one_copy(folder: Path) -> Any:
    """What save_pretrained writes for a tied model."""
    model = make_hf(folder, tiny_config("llama", tie_word_embeddings=True))
    return model


def both_formats(folder: Path) -> Any:
    """safetensors beside an older .bin of other weights: safetensors win."""
    model = make_hf(folder, tiny_config("llama"))
    save_bin(folder, {name: torch.zeros_like(tensor) for name, tensor in state_of(model).items()})
    return model


def half_with_fp32_norms(folder: Path) -> Any:
    """Two dtypes in one file; each must come back as it was."""
    model = make_hf(folder, tiny_config("llama", torch_dtype="bfloat16"))
    without_weights(folder)
    state = {name: tensor if "norm" in name else tensor.to(torch.bfloat16) for name, tensor in state_of(model).items()}
    save_file(state, str(folder / "model.safetensors"), metadata={"format": "pt"})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(state[name])
    return model


AGES = (
    llama_of_430, bloom_of_the_hub, bare_bloom_with_its_head, single_bin_before_zip, sharded_safetensors, tied_with_both_copies,
    tied_with_one_copy, both_formats, half_with_fp32_norms,
)  # fmt: skip


def make_checkpoint(folder: Path, config: Dict[str, Any], run_dtype: str = "fp32", step: int = 7, seed: int = 0) -> Any:
    """A training checkpoint (fp32 layer files + manifest) of a random model, which is returned."""
    model = make_hf(folder, config, seed=seed)
    without_weights(folder)
    document = json.loads((folder / "config.json").read_text())
    family, dims, state = families.family_of(document), families.dims_of(document), state_of(model)
    for layer in range(dims.layers):
        tensors = {slot.name: state[family.hf_name(slot, layer)].clone() for slot in family.layer_slots(dims, layer)}
        save_file(tensors, str(folder / manifest.layer_file(layer)), metadata={"format": "pt"})
    seal(folder, run_dtype, step)
    return model


def seal(folder: Path, run_dtype: str = "fp32", step: int = 7) -> None:
    """(Re)write the manifest over the files that are there."""
    document = json.loads((folder / "config.json").read_text())
    dims = families.dims_of(document)
    files = {path.name: manifest.file_entry(path) for path in folder.iterdir() if path.name != manifest.NAME}
    manifest.write(folder, {
        "format": manifest.FORMAT, "kind": "checkpoint", "family": dims.family, "run_dtype": run_dtype, "layer_dtype": "fp32",
        "tied": dims.tied, "layers": dims.layers, "step": step, "files": files, "versions": {}, "run_name": "test",
        "training": {},
    })  # fmt: skip


def failing(checkpoint, export, **options):
    """-> (message, proof.json) of a verification that must fail."""
    with pytest.raises(RunFailed) as caught:
        verify(str(checkpoint), str(export), **options)
    proof = json.loads((export / "proof.json").read_text())
    assert proof["holds"] is False and proof["failures"]
    assert "\n" not in str(caught.value)
    return str(caught.value), proof


def change_weights(export, change):
    state = load_file(str(export / "model.safetensors"))
    change(state)
    save_file(state, str(export / "model.safetensors"), metadata={"format": "pt"})


def refused(folder):
    with pytest.raises(UserError) as caught:
        open_source(str(folder)).check()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def rewrite(folder, change):
    state = load_file(str(folder / "model.safetensors"))
    change(state)
    save_file(state, str(folder / "model.safetensors"), metadata={"format": "pt"})
