"""DeepSpeed's tensor-parallel generation on two CPU ranks against transformers' greedy answers, prompt by prompt."""

import base64
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.free_port import free_port
from tests.models import computed, make_hf, tiny_config
from tests.tokenizers import tiny_tokenizer

ROOT = Path(__file__).resolve().parents[2]
PROMPTS = ["Hello, how are you today?", "The answer", "什么是人工智能？", "one two"]
NEW = 9


def expected(folder):
    """The new ids of each prompt, one prompt at a time."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    answers = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        out = model.generate(ids, max_new_tokens=NEW, do_sample=False, pad_token_id=1)
        answers.append(out[0, ids.shape[1] :].tolist())
    return answers


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A grouped-query llama (where this transformers has one) and an untied bloom. The first prompt's answer ends early."""
    made = []
    for family, overrides in (("llama", {"num_key_value_heads": 2}), ("bloom", {"tie_word_embeddings": False})):
        folder = str(tiny_tokenizer(tmp_path_factory.mktemp("models") / family, "bpe"))
        make_hf(folder, computed(tiny_config(family, vocab_size=520, eos_token_id=519, **overrides)))
        path = Path(folder) / "generation_config.json"
        settings = dict(json.loads(path.read_text()), eos_token_id=expected(folder)[0][4])
        settings.pop("_from_model_config")  # old transformers would take config.json's instead
        path.write_text(json.dumps(settings))
        made.append(folder)
    return made


@pytest.fixture(scope="module")
def run(folders, tmp_path_factory):
    prompts = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    prompts.write_text("\n\n".join(PROMPTS) + "\n", encoding="utf-8")
    world = base64.urlsafe_b64encode(json.dumps({"localhost": [0, 1]}).encode()).decode()
    command = [sys.executable, "-m", "deepspeed.launcher.launch", "--world_info=" + world, "--master_addr=127.0.0.1",
               "--master_port=%d" % free_port(), "--module", "tests.integration.generate_rank", str(prompts)] + folders  # fmt: skip
    environment = dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    done = subprocess.run(command, cwd=str(ROOT), env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return lines, done.stderr


def test_two_ranks_answer_as_transformers_does(run, folders):
    lines, _ = run
    assert [line["prompt"] for line in lines] == PROMPTS * 2
    wanted = expected(folders[0]) + expected(folders[1])
    assert [line["ids"] for line in lines] == wanted
    assert len(wanted[0]) <= 5 and max(map(len, wanted)) == NEW  # one ends before the others of its batch
    assert [line["tokens"] for line in lines] == [len(ids) for ids in wanted]
    assert all(line["tokens_per_s"] > 0 and line["text"] for line in lines)


def test_each_rank_holds_a_part(run):
    shares = [line for line in run[1].splitlines() if "of the weights" in line]
    assert len(shares) == 2, run[1][-2000:]  # rank 0 only, once a model
    for line in shares:
        assert "ranks: 2, each with" in line and 50 < float(line.split("each with")[1].split("%")[0]) < 90, line


def test_one_rank_needs_no_launcher(folders):
    command = [
        sys.executable,
        "-m",
        "serve.ds_generate",
        "--model",
        folders[0],
        "--prompt",
        PROMPTS[1],
        "--max-new-tokens",
        str(NEW),
    ]
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    done = subprocess.run(command, cwd=str(ROOT), env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout)["ids"] == expected(folders[0])[1]
