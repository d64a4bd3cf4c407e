"""``pipedock serve --engine tgi|vllm`` with a real Docker Engine: our drop-in image under the servers' own names, and every failure
that can be had for real. What no image here can do (a shard, a GPU's memory) is done by a stand-in, in that server's words."""

import json
import os
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request

import pytest

from tests.containers.compose import OWNER, needs_engine
from tests.containers.serving import COMMAND, Serve, docker, pipedock, surroundings

pytestmark = needs_engine

TGI = "ghcr.io/huggingface/text-generation-inference:"
ACTOR, AS_VLLM = "pipedock-test-actor:1", "pipedock-test-vllm:1"
# Does what .act.sh in the model's folder says.
ACT = 'FROM pipedock-serve:cpu\nENTRYPOINT ["sh", "-c", ". $PIPEDOCK_MOUNT/.act.sh"]\n'
# Takes vLLM's way of naming the model, and serves it with ours.
TRANSLATE = 'FROM pipedock-serve:cpu\nENTRYPOINT ["sh", "-c", "exec python -m serve.embedded --hostname 0.0.0.0 --model-id $0"]\n'


@pytest.fixture(scope="module")
def names(images):
    """The drop-in image under TGI's names; whatever had them before gets them back."""
    wanted = [TGI + "3.3.7", TGI + "0.8.2"]
    before = {name: docker("images", "--quiet", "--no-trunc", name) for name in wanted}
    for name in wanted:
        docker("tag", "pipedock-serve:cpu", name)
    for name, file in ((ACTOR, ACT), (AS_VLLM, TRANSLATE)):
        docker("build", "--quiet", "--tag", name, "-", text=file)
    yield
    for name in wanted + [ACTOR, AS_VLLM]:
        docker(*(["tag", before[name], name] if before.get(name) else ["rmi", name]))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny llama with a tokenizer, as 0.8 and 3.3 both read it, of an owner who is not root."""
    from pipeline_train import proof
    from tests.models import make_hf, tiny_config
    from tests.tokenizers import CHATML, tiny_tokenizer

    plain, folder = tmp_path_factory.mktemp("hf") / "plain", tmp_path_factory.mktemp("exports") / "tiny"
    tiny_tokenizer(plain, "spm", chat_template=CHATML)
    make_hf(plain, tiny_config("llama", vocab_size=400), seed=3)
    pipedock("to-hf", "--input", str(plain), "--output", str(folder), "--target", "tgi-0.8", folder=plain)
    (folder / "proof.json").write_text(json.dumps({"holds": True, "files": proof.files(folder)}))
    for path in [folder, *folder.iterdir()]:
        if os.getuid() == 0:
            os.chown(path, OWNER, OWNER)
    return folder


@pytest.fixture
def serve(names, model):
    made = Serve(model)
    yield made
    subprocess.run(["docker", "rm", "--force", made.name], capture_output=True, timeout=60)


def test_tgi_3_3_from_start_to_stop(serve, model):
    wish = ["--engine", "tgi", "--version", "3.3", "--max-total-tokens", "100"]
    started = serve.start(*wish, "--json")
    assert "WARNING: no GPU is seen on this machine" in started.stderr
    document = json.loads(started.stdout)
    assert document["healthy"] and document["version"] == "3.3.7" and document["container"] == serve.name
    inside = serve.inspect()
    assert inside["Config"]["Image"] == TGI + "3.3.7" and inside["Config"]["StopTimeout"] >= 90
    assert [(one["Source"], one["Destination"], one["RW"]) for one in inside["Mounts"]] == [(str(model), "/data/tiny", False)]
    assert inside["HostConfig"]["ShmSize"] == 2**30 and not inside["HostConfig"]["DeviceRequests"]
    users = {line.split()[1] for line in docker("top", serve.name, "-o", "pid,uid").splitlines()[1:]}
    assert str(OWNER) in users or os.getuid() != 0  # our own image becomes the folder's owner
    answer = serve.post("/generate", {"inputs": "Hello", "parameters": {"max_new_tokens": 5, "details": True}})
    assert answer["details"]["generated_tokens"] == 5
    with urllib.request.urlopen(document["url"] + "/info", timeout=10) as reply:
        info = json.load(reply)
    assert info["model_id"] == "/data/tiny" and info["max_total_tokens"] == 100
    again = serve.start(*wish)
    assert again.stdout.startswith("already running: %s at" % model) and serve.inspect()["Id"] == inside["Id"]
    other = serve.start("--engine", "tgi", ok=False)
    assert other.returncode == 2 and "port %d: already served (%s, container %s)" % (serve.port, model, serve.name) in other.stderr
    assert json.loads(serve("--status", "--json").stdout)["healthy"]
    assert "Connected" in serve("--logs").stdout
    begin = time.monotonic()
    assert serve("--stop").stdout.startswith("stopped %s (tgi 3.3.7, container" % model)
    assert time.monotonic() - begin < 60 and "Stopped. Peak memory" in serve("--logs").stdout  # an answer to SIGTERM, not a kill
    assert serve("--status").stdout == "no server of ours on port %d\n" % serve.port


def test_tgi_0_8(serve):
    serve.start("--engine", "tgi", "--version", "0.8", "--max-total-tokens", "90")
    inside = serve.inspect()
    assert inside["Config"]["Image"] == TGI + "0.8.2" and inside["HostConfig"]["ShmSize"] == 64 * 2**30
    assert "--max-input-length" in inside["Config"]["Cmd"] and "--hostname" not in inside["Config"]["Cmd"]
    answer = serve.post("/generate", {"inputs": "Hello", "parameters": {"max_new_tokens": 3, "details": True}})
    assert answer["details"]["generated_tokens"] == 3


def test_vllm_under_its_own_routes(serve):
    started = serve.start("--engine", "vllm", "--image", AS_VLLM, "--gpu", "a100", "--driver", "580.65.06", "--json")
    assert "/v1/completions" in json.loads(started.stdout)["try"][0]
    answer = serve.post("/v1/completions", {"model": "tiny", "prompt": "Hello", "max_tokens": 3, "temperature": 0})
    assert answer["usage"]["completion_tokens"] == 3


def test_in_the_foreground_with_a_key_and_a_clean_end(serve, model, tmp_path):
    (tmp_path / "key").write_text("k1k2k3\n")
    wish = ["serve", "--engine", "tgi", "--model", str(model), "--json", "--port", str(serve.port), "--api-key-file"]
    process = subprocess.Popen(
        COMMAND + wish + [str(tmp_path / "key")], env=surroundings(model), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert json.loads(process.stdout.readline())["healthy"]
        assert "k1k2k3" not in docker("top", serve.name) + json.dumps(serve.inspect()["Config"]["Labels"])
        with pytest.raises(urllib.error.HTTPError) as refused:
            serve.post("/generate", {"inputs": "Hello"})
        assert refused.value.code == 401
        process.terminate()
        _, err = process.communicate(timeout=100)
    finally:
        process.kill()
    assert process.returncode == 0 and "stopping; requests under way are finished first" in err, err
    assert docker("ps", "--all", "--quiet", "--filter", "name=" + serve.name) == ""


def test_what_pipedock_did_not_start_is_left_alone(serve):
    """A stranger with the name, and one with the port."""
    stranger = docker("run", "--detach", "--name", serve.name, "--entrypoint", "sleep", "pipedock-serve:cpu", "60")
    done = serve.start("--engine", "tgi", ok=False)
    assert done.returncode == 2 and "a container named %s is there that pipedock did not start" % serve.name in done.stderr
    assert serve("--stop").stdout == "nothing to stop on port %d\n" % serve.port
    assert serve.inspect()["Id"] == stranger and serve.inspect()["State"]["Running"]


def test_the_port_is_taken_after_it_was_looked_at(serve, model, monkeypatch, tmp_path):
    """Docker's own refusal: somebody else was quicker."""
    from pipeline_train.errors import UserError
    from serve import launch

    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setattr(launch, "check_port", lambda settings: None)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", serve.port))
        taken.listen()
        with pytest.raises(UserError, match="127.0.0.1 port %d: the port is taken; choose another --port or --host" % serve.port):
            launch.launch(str(model), "tgi", port=serve.port, need_proof=False)
    assert docker("ps", "--all", "--quiet", "--filter", "name=" + serve.name) == ""


def test_an_image_that_nobody_has(serve):
    said = serve.refuses(2, "--engine", "tgi", "--image", "127.0.0.1:9/none:1")
    assert (
        "the image 127.0.0.1:9/none:1 is not here and cannot be pulled: " in said
        and "connection refused; load it (docker load" in said
    )


def test_an_engine_that_has_no_gpus_to_give(serve, tmp_path):
    """This machine says that it has one."""
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho 0, GPU-1, Tesla T4, 15360, 535.54.03\n")
    smi.chmod(0o755)
    said = serve.refuses(2, "--engine", "tgi", PATH="%s:%s" % (tmp_path, os.environ["PATH"]), CUDA_VISIBLE_DEVICES="0")
    assert "Docker cannot hand on this machine's GPUs; install the NVIDIA Container Toolkit" in said


CANNOT = "echo Error: ShardCannotStart; exit 1"
ACTS = {  # what .act.sh does -> what is said of it
    "kill -9 $$": "the server ended before it was ready: it was killed (code 137), most likely for memory",
    "echo torch.cuda.OutOfMemoryError: CUDA out of memory.; "
    + CANNOT: "the GPU's memory is too small (torch.cuda.OutOfMemoryError",
    "echo RuntimeError: weight lm_head.weight does not exist; " + CANNOT: "weights are missing, or not in the layout",
    "echo KeyError: new; " + CANNOT: "a shard cannot start (KeyError: new)",
    "echo Unable to load tokenizer.; exit 1": "the tokenizer cannot be loaded (Unable to load tokenizer.)",
    "echo error: unexpected argument; exit 2": "this image does not take these flags (error: unexpected argument)",
    "exit 3": "the server ended before it was ready: it ended with code 3",
}


@pytest.mark.parametrize("act", ACTS)
def test_a_server_that_ends_while_it_is_loading(serve, model, act, request):
    (model / ".act.sh").write_text("echo began\n%s\n" % act)
    request.addfinalizer((model / ".act.sh").unlink)
    said = serve.refuses(1, "--engine", "tgi", "--image", ACTOR)
    assert ACTS[act] in said and "\nbegan\n" in said, said
    assert "began" in serve("--logs").stdout


def test_a_folder_without_a_usable_tokenizer(serve, tmp_path_factory):
    """In our own image's words, with the folder as the user named it."""
    folder = tmp_path_factory.mktemp("broken") / "broken"
    shutil.copytree(str(serve.folder), str(folder))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "tokenizer.model").unlink()
    broken = Serve(folder)
    said = broken.refuses(2, "--engine", "tgi", "--no-proof")
    assert "%s: no usable tokenizer" % folder in said and "WARNING: --no-proof" in said
