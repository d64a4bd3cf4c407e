"""Exports written here load in other versions of transformers, and give the same logits and ids there.

PIPEDOCK_OTHER_TRANSFORMERS names the interpreters, separated by colons (ci/transformers.sh does).
"""

import json
import os
import subprocess

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from export.to_hf import to_hf
from tests.models import make_hf, tiny_config
from tests.roundtrip.folders import VERSION
from tests.tokenizers import tiny_tokenizer

OTHERS = [path for path in os.environ.get("PIPEDOCK_OTHER_TRANSFORMERS", "").split(":") if path]
pytestmark = [
    pytest.mark.skipif(not OTHERS, reason="PIPEDOCK_OTHER_TRANSFORMERS is not set; ci/transformers.sh sets it"),
    pytest.mark.skipif(VERSION < (4, 43), reason="the writer is today's transformers"),
]
IDS = [[3, 14, 15, 92, 65, 35, 89, 79, 32, 38]]
TEXTS = ["Hello, how are you today?", "你好", "a  b\n"]

LOAD = """
import json, sys, torch, transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
folder, ids, texts = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3])
AutoConfig.from_pretrained(folder)
model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, torch_dtype=torch.float32)
bad = {k: sorted(map(str, info[k])) for k in ("missing_keys", "unexpected_keys", "mismatched_keys")}
bad = {k: [n for n in v if "inv_freq" not in n and n != "lm_head.weight"] for k, v in bad.items()}
tied = model.get_input_embeddings().weight.data_ptr() == model.get_output_embeddings().weight.data_ptr()
with torch.no_grad():
    logits = model.eval()(torch.tensor(ids)).logits
found = [AutoTokenizer.from_pretrained(folder)(text)["input_ids"] for text in texts]
print(json.dumps({"version": transformers.__version__, "bad": bad, "tied": tied, "logits": logits.tolist(), "ids": found}))
"""


def loaded_by(python, folder):
    done = subprocess.run(
        [python, "-c", LOAD, str(folder), json.dumps(IDS), json.dumps(TEXTS)],
        capture_output=True,
        text=True,
        timeout=300,
        env=dict(os.environ, HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1"),
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


@pytest.mark.parametrize("python", OTHERS)
@pytest.mark.parametrize("family", ["llama", "bloom"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("target", ["hf", "tgi-0.8"])
def test_exports_load_elsewhere(target, tied, family, python, tmp_path):
    make_hf(tmp_path / "hf", tiny_config(family, tie_word_embeddings=tied, vocab_size=520))
    tiny_tokenizer(tmp_path / "hf", "spm" if family == "llama" else "bpe", vocab=420 if family == "llama" else 512)
    to_hf(str(tmp_path / "hf"), str(tmp_path / "x"), target=target)
    told = loaded_by(python, tmp_path / "x")
    assert not any(told["bad"].values()), told
    assert told["tied"] is tied
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(str(tmp_path / "hf"))(torch.tensor(IDS)).logits
    difference = (torch.tensor(told["logits"]) - expected).abs().max() / expected.abs().max()
    assert difference < 1e-5, (told["version"], float(difference))
    tokenizer = AutoTokenizer.from_pretrained(str(tmp_path / "hf"))
    assert told["ids"] == [tokenizer(text)["input_ids"] for text in TEXTS], told["version"]
