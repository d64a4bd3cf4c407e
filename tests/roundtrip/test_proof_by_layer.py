"""The proof layer by layer: transformers' own block against ours, in fp32 and in the export's dtype, whatever the model's size."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from export import arithmetic, compute, distance, ours, prompts
from export import verify as verify_module
from export.to_hf import to_hf
from export.verify import verify
from pipeline_train import families
from pipeline_train.models import attention
from tests.models import VARIANTS, make_hf, tiny_config
from tests.roundtrip.folders import VERSION, change_weights, edit_json, failing, make_checkpoint, needs
from tests.roundtrip.test_convert import ENVIRONMENT

HALF = "fp16" if arithmetic.narrow_dtype("F16") else "bf16"


@pytest.mark.parametrize("variant", [pytest.param(v, id=v.name, marks=needs(v.since, v.name)) for v in VARIANTS])
def test_blocks_and_whole_model_say_the_same(variant, tmp_path):
    """transformers' embedding, block, norm and head one by one give what the whole model gives."""
    make_hf(tmp_path / "hf", tiny_config(variant.family, **variant.overrides))
    to_hf(str(tmp_path / "hf"), str(tmp_path / "x"), shard_size="100KB", dtype="bf16")
    proof = verify(str(tmp_path / "hf"), str(tmp_path / "x"), whole=True)
    rows = proof["layers"] + [proof["logits"]]
    assert [(row["layer"], row["what"]) for row in rows] == [
        (0, "embed"), (1, "block"), (2, "block"), (3, "block"), (4, "norm"), (4, "logits"),
    ]  # fmt: skip
    for row in rows:
        assert row["relative"] <= 1e-5 and row["whole_model"]["relative"] <= 1e-5 and row["as_trained"]["relative"] <= 1e-4
        assert row["max"] > 0 and row["mean"] <= row["diff"] and row["narrow"]["mean"] <= 3 * row["narrow"]["rounding"]
    assert rows[1]["narrow"]["rounding"] > 1e-4 and rows[1]["narrow"]["diff"] > 0
    assert proof["logits"]["top1"] == 1.0 and 0 <= proof["logits"]["kl"] <= proof["logits"]["kl_max"] < 1e-6
    assert 0.8 < proof["logits"]["narrow"]["top1"] <= 1 and proof["logits"]["narrow"]["kl"] < 0.05
    assert proof["whole_model"]["compared"] and proof["export_dtype"] == {"dtype": "bf16", "compared": True}


def test_the_whole_model_is_run_where_it_fits(pair, monkeypatch):
    checkpoint, export = pair("bloom")
    for free, fits in ((None, True), (2**40, True), (2**30, False)):
        monkeypatch.setattr(compute.host, "available_memory", lambda free=free: free)
        proof = verify(str(checkpoint), str(export))
        assert proof["whole_model"]["compared"] is fits and ("whole_model" in proof["logits"]) is fits
    assert proof["whole_model"] == {"needs_gib": 1.0, "free_gib": 1.0, "compared": False}
    assert proof["export_dtype"] == {"dtype": "fp32", "compared": True} and "narrow" not in proof["logits"]


def swap(state, one, other):
    state[one], state[other] = state[other], state[one]


def swap_blocks(state):
    for key in [k for k in state if ".layers.1." in k]:
        swap(state, key, key.replace("layers.1", "layers.2"))


def stale_shard(export, checkpoint):
    """A shard of an earlier export: other weights under the same names."""
    make_checkpoint(checkpoint.parent / "before", tiny_config("llama", vocab_size=520), seed=1)
    to_hf(str(checkpoint.parent / "before"), str(checkpoint.parent / "old"), shard_size="100KB")
    name = sorted(p.name for p in export.glob("model-*.safetensors"))[2]
    (export / name).write_bytes((checkpoint.parent / "old" / name).read_bytes())


def truncate(export):
    path = export / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def another_tokenizer(export):
    from tests.tokenizers import tiny_tokenizer

    tiny_tokenizer(export, "bpe", texts=["only these words"] * 3, vocab=300)


Q, K = "model.layers.1.self_attn.q_proj.weight", "model.layers.1.self_attn.k_proj.weight"
O = "model.layers.0.self_attn.o_proj.weight"  # noqa: E741
HEAD, BIAS = "lm_head.weight", "transformer.h.1.self_attention.dense.bias"

# what is done -> (family, how, what the message names, the first layer that arithmetic alone finds)
CORRUPTIONS = {
    "swapped q and k": ("llama", lambda x, c: change_weights(x, lambda s: swap(s, Q, K)), (Q, K), 2),
    "transposed weight": (
        "llama",
        lambda x, c: change_weights(x, lambda s: s.update({O: s[O].t().contiguous()})),
        (O,),
        1,
    ),
    "stale shard": ("llama sharded", lambda x, c: stale_shard(x, c), ("tensor(s) differ in their bits: model.layers.",), 2),
    "wrong rope theta": (
        "llama",
        lambda x, c: edit_json(x / "config.json", rope_theta=11000.0, rope_parameters=None),
        ("config.json: rope_theta is 10000.0 in the checkpoint, 11000.0 in the export",),
        1,
    ),
    "dropped bias": (
        "bloom",
        lambda x, c: change_weights(x, lambda s: s.pop(BIAS)),
        ("the weights do not match config.json: 1 missing: " + BIAS,),
        None,
    ),
    "wrong eps": (
        "bloom",
        lambda x, c: edit_json(x / "config.json", layer_norm_epsilon=1e-3),
        ("config.json: norm_eps is 1e-05 in the checkpoint, 0.001 in the export",),
        0,
    ),
    "swapped layers": ("llama", lambda x, c: change_weights(x, swap_blocks), ("18 tensor(s) differ", "model.layers.1."), 2),
    "untied head": (
        "bloom",
        lambda x, c: change_weights(x, lambda s: s[HEAD][5].mul_(1.01)),
        ("embedding and head are tied, but transformer.word_embeddings.weight and lm_head.weight differ",),
        4,
    ),
    "wrong tokenizer": ("llama", lambda x, c: another_tokenizer(x), ("tokenizer.json: differs from the checkpoint's",), None),
    "truncated file": ("llama", lambda x, c: truncate(x), ("model.safetensors: cut off",), None),
}  # fmt: skip


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_ten_corruptions_are_caught_and_named(name, pair, monkeypatch):
    """Each by the message; and by the first layer that differs, where the checks of bytes, keys and configuration are blind."""
    if name == "wrong rope theta" and VERSION < (4, 33):
        pytest.skip("transformers %d.%d computes no other rope theta" % VERSION)
    family, corrupt, named, layer = CORRUPTIONS[name]
    checkpoint, export = pair(family.split()[0])
    if "sharded" in family:
        to_hf(str(checkpoint), str(export), shard_size="100KB", overwrite=True)
    assert verify(str(checkpoint), str(export), whole=False)["holds"]
    corrupt(export, checkpoint)
    found, proof = failing(checkpoint, export, whole=False)
    assert all(part in found for part in named), found
    assert json.loads((export / "proof.json").read_text())["holds"] is False
    if layer is not None:
        for check in ("_config", "_tensors", "_keys"):
            monkeypatch.setattr(verify_module, check, lambda *args: [])
        found, _ = failing(checkpoint, export, whole=False)
        assert "layer %d (" % layer in found and "is the first that differs from transformers: " in found, found


def test_a_fault_in_the_narrow_dtype_alone(pair, monkeypatch):
    """Right in fp32, wrong as it is trained in bf16: further away than rounding explains."""
    checkpoint, export = pair("llama")
    to_hf(str(checkpoint), str(export), dtype="bf16", overwrite=True)
    assert verify(str(checkpoint), str(export))["holds"]
    run = ours.Ours.run

    def broken(self, layer, inputs, dtype, as_trained):
        out = run(self, layer, inputs, dtype, as_trained)
        return [h * 1.05 for h in out] if dtype == torch.bfloat16 and layer == 2 else out

    monkeypatch.setattr(ours.Ours, "run", broken)
    found, _ = failing(checkpoint, export)
    assert "layer 2 (block) is the first that differs from transformers in bf16: by" in found and "rounding alone makes" in found


def test_the_kernel_of_training_is_proved_too(pair, monkeypatch):
    """A kernel that lets tokens see the next one, while attention spelled out is right."""
    if not attention.HAS_SDPA:
        pytest.skip("this torch has one kernel only")
    checkpoint, export = pair("llama")
    kernel = attention._sdpa
    monkeypatch.setattr(attention, "_sdpa", lambda q, k, v, mask: kernel(q, k, v, None))
    found, _ = failing(checkpoint, export)
    assert "layer 1 (block) is the first that differs from transformers when it computes as in training" in found


def test_a_half_precision_export_is_computed_in_its_dtype(pair):
    checkpoint, export = pair("bloom")
    to_hf(str(checkpoint), str(export), dtype=HALF, overwrite=True)
    proof = verify(str(checkpoint), str(export))
    assert proof["export_dtype"] == {"dtype": HALF, "compared": True} and proof["logits"]["narrow"]["rounding"] > 0


def test_what_this_torch_cannot_compute_is_said(pair, monkeypatch):
    checkpoint, export = pair("bloom")
    to_hf(str(checkpoint), str(export), dtype="fp16", overwrite=True)

    def linear(x, weight, bias=None, kept=torch.nn.functional.linear):
        if x.dtype == torch.float16:
            raise RuntimeError("\"addmm_impl_cpu_\" not implemented for 'Half'")
        return kept(x, weight, bias)

    monkeypatch.setattr(torch.nn.functional, "linear", linear)
    proof = verify(str(checkpoint), str(export))
    assert proof["export_dtype"] == {"dtype": "fp16", "compared": False} and "narrow" not in proof["logits"]


def test_prompts_come_from_the_runs_own_data(tmp_path):
    run = tmp_path / "run"
    checkpoint = run / "checkpoints" / "step_000007"
    make_checkpoint(checkpoint, tiny_config("bloom"))
    to_hf(str(run), str(tmp_path / "x"))
    assert verify(str(run), str(tmp_path / "x"))["prompts"]["of_the_run"] == 0
    (run / "data").mkdir()
    np.save(str(run / "data" / "train.ids.npy"), (np.arange(2000, dtype=np.int32) % 131))
    offsets = np.array([[i * 200, 190, i] for i in range(10)], dtype=np.int64)
    np.save(str(run / "data" / "train.offsets.npy"), offsets)
    proof = verify(str(run), str(tmp_path / "x"))
    assert proof["prompts"] == {"texts": [], "rows": 5, "tokens": 128 * 5, "of_the_run": 4}
    dims = families.dims_of(tiny_config("bloom"))
    rows = prompts.run_samples(checkpoint, dims)
    assert [row[0] for row in rows] == [(i * 200) % 131 for i in (0, 2, 5, 7)]
    np.save(str(run / "data" / "train.ids.npy"), np.full(2000, 131, dtype=np.int32))
    assert prompts.run_samples(checkpoint, dims) == []  # of another vocabulary
    (run / "data" / "train.ids.npy").write_bytes(b"no array")
    assert prompts.run_samples(checkpoint, dims) == []


def test_logits_by_slices_are_logits_at_once():
    generator = torch.Generator().manual_seed(0)
    theirs = 5 * torch.randn(7, 50, generator=generator)
    mine = theirs + 3.0 * torch.randn(7, 50, generator=generator)
    sliced = distance.Logits()
    for start, stop in ((0, 20), (20, 21), (21, 50)):
        sliced.add(mine[:, start:stop], theirs[:, start:stop])
    found = distance.Logits.figures([sliced])
    p, q = theirs.double().log_softmax(-1), mine.double().log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1)
    assert found["kl"] == pytest.approx(float(kl.mean())) and found["kl_max"] == pytest.approx(float(kl.max()))
    assert found["top1"] == pytest.approx(float((mine.argmax(-1) == theirs.argmax(-1)).double().mean())) and 0 < found["top1"] < 1
    assert found["diff"] == pytest.approx(float((mine - theirs).abs().max()))
    assert found["mean"] == pytest.approx(float((mine - theirs).abs().mean()))
    mine[3, 30] = float("nan")
    sliced.add(mine, theirs)
    assert not distance.Logits.figures([sliced])["relative"] <= 1e9


PEAK = """
import sys
from export.measure import peak_gib
from export.verify import verify
verify(sys.argv[1] + "/small/hf", sys.argv[1] + "/small/x", whole=False)
before = peak_gib()
verify(sys.argv[1] + "/big/hf", sys.argv[1] + "/big/x", whole=False)
print((peak_gib() - before) * 1024)
"""


def test_memory_does_not_grow_with_the_blocks(tmp_path):
    """2 against 10 blocks of 13 MB: held whole in fp32 the model would take 100 MB more."""
    for name, blocks in (("small", 2), ("big", 10)):
        config = tiny_config("llama", hidden_size=512, intermediate_size=1408, num_hidden_layers=blocks)
        make_hf(tmp_path / name / "hf", config)
        to_hf(str(tmp_path / name / "hf"), str(tmp_path / name / "x"), dtype="bf16")
    done = subprocess.run([sys.executable, "-c", PEAK, str(tmp_path)], capture_output=True, text=True, timeout=300, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 40, "grown by %s MiB" % done.stdout
