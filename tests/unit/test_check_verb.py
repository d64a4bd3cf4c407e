"""``pipedock check``: exit codes, every reason on a line, the document, what this machine says of itself."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import pipedock
from tests.limits import BLOOM_7B, LLAMA_7B, LLAMA_30B

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def model(tmp_path):
    """A function that writes a config.json and names it."""

    def write(config):
        (tmp_path / "config.json").write_text(json.dumps(config))
        return str(tmp_path)

    return write


@pytest.fixture(autouse=True)
def no_gpu_here(monkeypatch, tmp_path):
    """Unless a test puts a nvidia-smi there."""
    monkeypatch.setenv("PATH", str(tmp_path) + ":/bin")
    return tmp_path


def check(capfd, *argv):
    """-> (exit code, stdout, stderr)"""
    code = pipedock.main(["check", *argv])
    out, err = capfd.readouterr()
    return code, out, err


def test_the_line_of_the_interface(capfd, model):
    where = model(BLOOM_7B)
    line = "--model %s --engine tgi --version 0.8 --num-shard 8 --gpu t4 --driver 515.65.01 --config-only" % where
    code, out, err = check(capfd, *line.split())
    assert code == 0 and err == ""
    assert out.startswith("ghcr.io/huggingface/text-generation-inference:0.8.2 can serve it on 8 x t4\n")
    assert "\nflags: --disable-custom-kernels\n" in out and "note: driver 515.65.01 runs CUDA 11.8" in out
    assert "1.6 GiB of weights in 13.8 usable" in out and "tokens, all together" in out


def test_every_reason_is_a_line_and_the_exit_code_is_2(capfd, model):
    line = "--config-only --version 0.8 --num-shard 8 --gpu v100 --driver 418.40"
    code, out, err = check(capfd, "--model", model(LLAMA_30B), *line.split())
    assert code == 2 and out == ""
    lines = err.splitlines()
    assert len(lines) == 3 and lines[0].startswith("pipedock check: TGI 0.8.2 shards llama through flash attention only")
    assert "52 attention heads" in lines[1] and "driver 418.40 is too old" in lines[2]


def test_the_documents(capfd, model):
    where = model(LLAMA_7B)
    code, out, _ = check(capfd, "--model", where, "--gpu", "t4", "--num-shard", "2", "--config-only", "--json")
    document = json.loads(out)
    assert code == 0 and document["accepted"] is True and document["reasons"] == [] and document["notes"]
    uses = document["uses"]
    assert (uses["engine"], uses["version"], uses["num_shard"], uses["gpu"]) == ("tgi", "3.3.7", 2, "t4")
    assert uses["env"] == {"ATTENTION": "paged"} and uses["digest"] is None and uses["writable"] is False
    assert set(uses["capacity"]) == {
        "weights_gib_per_gpu", "kv_gib_per_token", "usable_gib", "free_gib", "fitting_context", "max_context", "max_batch_tokens"
    }  # fmt: skip
    code, out, err = check(capfd, "--model", where, "--gpu", "t4", "--num-shard", "3", "--config-only", "--json")
    document = json.loads(out)
    assert code == 2 and document["accepted"] is False and document["error"] == "\n".join(document["reasons"])
    assert document["uses"]["version"] == "3.3.7" and "--num-shard 3 does not divide" in err


def test_this_machines_cards_where_nobody_names_one(capfd, model, no_gpu_here):
    where = model(LLAMA_7B)
    (no_gpu_here / "nvidia-smi").write_text('#!/bin/sh\nfor n in 0 1; do echo "$n, GPU-$n, Tesla T4, 15360, 515.65.01"; done\n')
    (no_gpu_here / "nvidia-smi").chmod(0o755)
    asked = ("--model", where, "--config-only", "--version", "0.8", "--json")
    uses = json.loads(check(capfd, *asked, "--num-shard", "2")[1])["uses"]
    assert (uses["gpu"], uses["driver"]) == ("t4", "515.65.01")
    code, _, err = check(capfd, *asked, "--num-shard", "4")
    assert code == 2 and "--num-shard 4: there are 2 GPUs here; use one of 1, 2" in err
    assert check(capfd, *asked, "--num-shard", "4", "--gpus", "8")[0] == 0
    assert check(capfd, *asked, "--num-shard", "4", "--gpu", "t4")[0] == 0  # another machine's: how many is not known
    assert json.loads(check(capfd, *asked, "--gpu", "a100")[1])["uses"]["driver"] is None


def test_a_machine_without_a_card_says_what_is_not_judged(capfd, model):
    code, out, _ = check(capfd, "--model", model(LLAMA_7B), "--config-only")
    assert code == 0 and "can serve it on 1 shard" in out
    assert "not judged: the card" in out and "not judged: the driver" in out and "not judged: the files" in out


def test_a_folder_is_looked_into_unless_config_only(capfd, model):
    where = model(LLAMA_7B)
    code, _, err = check(capfd, "--model", where, "--gpu", "a100")
    assert code == 2 and "no weights" in err and "no tokenizer" in err
    assert "--input %s --output %s-tgi-3 --target tgi-3" % (where, where) in err
    code, out, _ = check(capfd, "--model", where + "/config.json", "--gpu", "a100", "--config-only")
    assert code == 0 and "not judged: the files" in out


@pytest.mark.parametrize("argv, words", [
    (["--model", "nowhere"], "no such folder"), (["--model", "nowhere.json", "--config-only"], "nowhere.json: no such file"),
    (["--model", "FILE"], "a file; name the folder, or judge from config.json alone with --config-only"),
    (["--model", "DIR", "--config-only", "--engine", "sglang"], "--engine sglang: not a server that runs in a container here: tgi"),
    (["--model", "DIR", "--config-only", "--version", "1.0"], "--version 1.0: its limits are not known; known of tgi: 0.8 (0.8.2)"),
    (["--model", "DIR", "--config-only", "--gpu", "tesla"], "--gpu: 'tesla' is not known"),
    (["--model", "DIR", "--config-only", "--driver", "new"], "expected a version such as 515.65.01"),
    (["--model", "DIR", "--config-only", "--gpus", "0"], "--gpus 0: expected 1 or more"),
    (["--model", "DIR", "--config-only", "--max-total-tokens", "-1"], "--max-total-tokens -1: expected 1 or more"),
    (["--model", "DIR", "--config-only", "--num-shard", "0"], "--num-shard 0: expected 1 or more"),
])  # fmt: skip
def test_what_the_user_got_wrong(capfd, model, argv, words):
    where = model(LLAMA_7B)
    code, out, err = check(capfd, *[{"DIR": where, "FILE": where + "/config.json"}.get(word, word) for word in argv])
    assert code == 2 and out == "" and words in err and "Traceback" not in err and len(err.splitlines()) == 1


def test_it_runs_without_torch(model):
    code = "import sys, pipedock; sys.exit(pipedock.main(sys.argv[1:]) or ('torch' in sys.modules))"
    argv = ["check", "--model", model(LLAMA_7B), "--config-only", "--gpu", "t4"]
    done = subprocess.run([sys.executable, "-c", code] + argv, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "can serve it" in done.stdout


def test_a_hub_name_and_a_run_with_config_only(capfd, model, monkeypatch, tmp_path):
    from pipeline_train import hub

    where = model(LLAMA_7B)
    monkeypatch.setattr(hub, "config_of", lambda name: {"org/llama": where + "/config.json"}[name])
    code, out, _ = check(capfd, "--model", "org/llama", "--gpu", "t4", "--config-only", "--version", "0.8")
    assert code == 0 and "can serve it on 1 x t4" in out
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    code, _, err = check(capfd, "--model", str(tmp_path / "run"), "--gpu", "t4")
    assert code == 2 and "pipeline weights; export them first" in err
