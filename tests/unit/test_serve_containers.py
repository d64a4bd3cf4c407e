"""``pipedock serve --engine tgi|vllm``: what Docker is asked for, and by what it was decided; Docker is a fake here."""

import json
from pathlib import Path

import pytest

pytest.importorskip("docker", reason="the Docker SDK is in the serve extra, for Python 3.10 and newer")
from pipeline_train.errors import UserError  # noqa: E402
from serve import launch  # noqa: E402
from serve.containers import create, gpus, mounts, start  # noqa: E402
from serve.settings import Settings  # noqa: E402
from tests.docker_fixtures import T4, TGI, allowed, engine_fixture, fails, folder_fixture, run, surroundings  # noqa: E402, F401
from tests.free_port import free_port  # noqa: E402


def test_what_docker_is_asked_for(folder, engine):
    port = free_port()
    server, warned = run(folder, port=port, shards=2, api_key="secret", max_total_tokens=100)
    assert len(warned) == 1 and "who may log in here can read it" in warned[0] and "secret" not in warned[0]
    [sent] = engine.created
    assert sent["image"] == TGI and sent["name"] == "pipedock-serve-%d" % port and sent["stop_timeout"] >= 90
    assert sent["command"][:4] == ["--model-id", "/data/my-model", "--num-shard", "2"] and "secret" not in sent["command"]
    assert sent["environment"]["API_KEY"] == "secret" and sent["environment"]["PIPEDOCK_MOUNT"] == "/data/my-model"
    host = sent["host_config"]
    assert host["PortBindings"] == {"80/tcp": [{"HostIp": "127.0.0.1", "HostPort": str(port)}]}
    [mounted] = host["Mounts"]
    assert (mounted["Source"], mounted["Target"], mounted["ReadOnly"]) == (str(folder), "/data/my-model", True)
    [request] = host["DeviceRequests"]
    assert request["Count"] == 2 and request["Capabilities"] == [["gpu"]] and request["DeviceIDs"] == []
    assert host["ShmSize"] == 2**30 and host["Init"] is True and host["Ulimits"][0]["Soft"] == 67108864
    assert sent["labels"]["pipedock.port"] == str(port) and "secret" not in json.dumps(sent["labels"])
    assert server.state.url == "http://127.0.0.1:%d" % port and server.state.document()["container"] == sent["name"]


@pytest.mark.parametrize(
    "wishes, size", [({}, 2**30), ({"version": "0.8"}, 64 * 2**30), ({"engine": "vllm"}, 8 * 2**30), ({"shm_size": "512m"}, 2**29)]
)
def test_shared_memory(folder, engine, wishes, size):
    engine.here[TGI.replace("3.3.7", "0.8.2")] = engine.here[TGI]
    run(folder, **wishes)
    assert engine.created[0]["host_config"]["ShmSize"] == size


def test_a_version_that_converts_gets_a_writable_folder(folder, engine):
    engine.here[TGI.replace("3.3.7", "0.8.2")] = engine.here[TGI]
    run(folder, version="0.8")
    assert engine.created[0]["host_config"]["Mounts"][0]["ReadOnly"] is False


def test_what_the_verdict_says_reaches_the_container(folder, engine, monkeypatch):
    """Its flags and variables, the question it was asked, its notes, its reasons."""
    asked = []

    def judge(question):
        asked.append(question)
        verdict = allowed(question)
        verdict.flags, verdict.env, verdict.notes = ["--disable-custom-kernels"], {"ATTENTION": "paged"}, ["know this"]
        return verdict

    monkeypatch.setattr(start.limits, "judge", judge)
    _, warned = run(folder, shards=2, dtype="bfloat16", max_total_tokens=99)
    assert "--disable-custom-kernels" in engine.created[0]["command"] and engine.created[0]["environment"]["ATTENTION"] == "paged"
    assert warned == ["note: know this"]
    [question] = asked
    assert (question.shards, question.gpu, question.gpus, question.driver) == (2, "t4", 4, "535.54.03")
    assert (question.dtype, question.max_total, question.where) == ("bfloat16", 99, str(folder))
    assert question.config["model_type"] == "llama" and "model.safetensors" in question.files.names and question.nbytes > 0
    run(folder, gpu="v100", driver="450.80.02", port=free_port())
    assert (asked[1].gpu, asked[1].driver) == ("v100", "450.80.02")
    monkeypatch.setattr(start.limits, "judge", lambda question: verdict_against(question))
    assert fails(UserError, folder, port=free_port()) == "one reason\nanother" and len(engine.created) == 2


def verdict_against(question):
    verdict = allowed(question)
    verdict.reasons = ["one reason", "another"]
    return verdict


def test_no_gpu_is_said_loudly_and_none_is_asked_for(folder, engine, monkeypatch):
    asked = []
    monkeypatch.setattr(gpus, "seen", lambda: gpus.Gpus([], False, None, None))
    monkeypatch.setattr(start.limits, "judge", lambda question: asked.append(question) or allowed(question))
    _, warned = run(folder)
    assert (asked[0].gpu, asked[0].gpus) == ("cpu", None)
    assert engine.created[0]["host_config"].get("DeviceRequests") is None
    assert warned[-1] == "WARNING: no GPU is seen on this machine (nvidia-smi lists none): tgi is started without one"


def test_gpus_that_the_user_chose_are_named(folder, engine, monkeypatch):
    monkeypatch.setattr(gpus, "seen", lambda: T4._replace(ids=["3", "1"], chosen=True))
    run(folder)
    assert engine.created[0]["host_config"]["DeviceRequests"][0]["DeviceIDs"] == ["3"]
    assert "--num-shard 4: each shard needs a GPU, 2 seen in CUDA_VISIBLE_DEVICES" in fails(
        UserError, folder, shards=4, port=free_port()
    )


def smi(tmp_path, monkeypatch, script):
    fake = tmp_path / "bin" / "nvidia-smi"
    fake.parent.mkdir()
    fake.write_text("#!/bin/sh\n" + script)
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", "%s:/usr/bin:/bin" % fake.parent)


def test_gpus_of_this_machine(tmp_path, monkeypatch):
    rows = "0, GPU-aa, Tesla T4, 15360, 515.65.01\n1, GPU-bb, Tesla T4, 15360, 515.65.01\n"
    smi(tmp_path, monkeypatch, "printf '%s'" % rows.replace("\n", "\\n"))
    assert gpus.seen({}) == gpus.Gpus(["0", "1"], False, "t4", "515.65.01")
    assert gpus.seen({"CUDA_VISIBLE_DEVICES": "1"}).ids == ["1"]
    assert gpus.seen({"CUDA_VISIBLE_DEVICES": "GPU-bb,GPU-aa"}).ids == ["1", "0"]
    assert gpus.seen({"CUDA_VISIBLE_DEVICES": ""}).ids == []


@pytest.mark.parametrize("script", ["exit 9", "echo NVIDIA-SMI has failed because it could not communicate with the driver"])
def test_a_driver_that_does_not_answer_is_no_gpu(tmp_path, monkeypatch, script):
    smi(tmp_path, monkeypatch, script)
    assert gpus.seen({}) == gpus.Gpus([], False, None, None)


def test_progress_by_the_log(folder, engine):
    engine.script, said = ["created", "running", "running", "running"], []
    engine.log = b"2026 INFO text_generation_launcher: Starting shard\n"
    launch.launch(str(folder), "tgi", port=free_port(), progress=said.append)
    assert any(line.startswith("%s: loading shards ... " % folder) for line in said)


@pytest.mark.parametrize(
    "line, text",
    [
        ("", "starting"), ("INFO download: Starting check and download process for /data/m", "looking for weights"),
        ("Starting download process.", "looking for weights"), ("INFO Convert /data/m/pytorch_model.bin to", "converting weights"),
        ("Waiting for shard 0 to be ready...", "starting"), ("Starting shard 0", "loading shards"),
        ("Shard 0 ready in 5s", "shards are ready"), ("Shard ready in 5s rank=0", "shards are ready"),
        ("Warming up model", "warming up"), ("text_generation_router::server: Connected", "almost there"),
        ("Loading safetensors checkpoint shards:  50% Completed | 1/2", "loading weights 50%"),
        ("INFO:     Application startup complete.", "almost there"),
    ],
)  # fmt: skip
def test_stages(line, text):
    assert start.stage("first\n%s\n" % line) == text


def test_an_image_of_ones_own(folder, engine):
    engine.here["mirror/tgi:1"] = engine.here[TGI]
    _, warned = run(folder, image="mirror/tgi:1")
    assert engine.created[0]["image"] == "mirror/tgi:1" and not engine.pulled and warned == []


def test_what_the_container_runs_is_pulled(folder, engine):
    engine.here.clear()
    engine.pulls = [
        {"status": "Downloading", "id": "a", "progressDetail": {"current": 5, "total": 10}},
        {"status": "Download complete", "id": "a"},
        {"status": "Extracting", "id": "b", "progressDetail": {"current": 1, "total": 2}},
    ]
    said = []
    launch.launch(str(folder), "tgi", port=free_port(), progress=said.append)
    assert engine.pulled == [TGI] and "pulling " + TGI in said


def test_mounts(tmp_path):
    folder = tmp_path / "a b" / "my model.v1"
    folder.mkdir(parents=True)
    assert mounts.mount(str(folder)) == (str(folder), "/data/my-model.v1", "/data/my-model.v1", "my-model.v1")
    link = tmp_path / "current"
    link.symlink_to(folder)
    assert mounts.mount(str(link)).source == str(folder)


def test_a_hub_cache_is_mounted_with_its_blobs(tmp_path):
    hub = tmp_path / "models--a--b"
    snapshot, blobs = hub / "snapshots" / "0f0f", hub / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "1").write_text("{}")
    (snapshot / "config.json").symlink_to(Path("../../blobs/1"))
    assert mounts.mount(str(snapshot)) == (str(hub), "/data/0f0f", "/data/0f0f/snapshots/0f0f", "0f0f")


def test_links_to_everywhere_are_not_followed(tmp_path):
    (tmp_path / "config.json").symlink_to("/etc/hostname")
    with pytest.raises(UserError, match="its files are links to different places; copy them: cp -rL "):
        mounts.mount(str(tmp_path))


@pytest.mark.parametrize("text, size", [("1g", 2**30), ("512M", 2**29), ("1.5gb", 3 * 2**29), ("4096", 4096), ("2k", 2048)])
def test_sizes(text, size):
    assert create.shm_bytes(text) == size


@pytest.mark.parametrize("text", ["", "g", "1x", "-1g", "0"])
def test_no_sizes(text):
    with pytest.raises(UserError, match="--shm-size %s: expected a size like 1g or 512m" % text):
        create.shm_bytes(text)


def test_addresses():
    assert create.address_of("localhost") == "127.0.0.1" and create.address_of("::1") == "::1"
    with pytest.raises(UserError, match="--host no.such.host.invalid: .*; give an address of this machine"):
        create.address_of("no.such.host.invalid")


def test_what_makes_two_servers_the_same(folder):
    one = Settings(str(folder), "tgi")
    assert one.identity() == Settings(str(folder), "tgi", gpu="t4", need_proof=False).identity()
    different = [{"shards": 2}, {"api_key": "k"}, {"version": "0.8"}, {"image": "i"}, {"max_total_tokens": 9}, {"host": "0.0.0.0"}]
    assert len({Settings(str(folder), "tgi", **more).identity() for more in [{}] + different}) == len(different) + 1
    before = one.identity()
    (folder / "README.md").write_text("of the user")
    (folder / "proof.json").write_text("{}")  # proved once more
    assert one.identity() == before
    (folder / "pytorch_model.bin").write_text("")
    with_bin = one.identity()
    (folder / "model.safetensors").write_text("converted")
    assert one.identity() == with_bin
    (folder / "config.json").write_text("{ }")  # exported again
    assert one.identity() != with_bin


def test_an_export_is_served_with_its_proof_only(folder, engine):
    """By the same rule as the embedded server's, before Docker is asked for anything."""
    (folder / "pipedock-export.json").write_text("{}")
    assert "is an export of pipedock without a proof" in fails(UserError, folder) and engine.created == []
    run(folder, need_proof=False)
    assert engine.created[0]["environment"]["NO_PROOF"] == "true"
