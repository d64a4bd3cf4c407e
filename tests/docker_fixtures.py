"""Fixtures of the tests of ``pipedock serve --engine tgi|vllm``: a model folder, and a Docker that is a fake."""

import json
import signal

import pytest

import pipedock
from serve import launch, reach
from serve.containers import daemon, gpus, start
from tests.fake_docker import Engine, Handle
from tests.free_port import free_port
from tests.models import tiny_config

TGI = "ghcr.io/huggingface/text-generation-inference:3.3.7"
VLLM = "vllm/vllm-openai:v0.18.0"
T4 = gpus.Gpus(["0", "1", "2", "3"], False, "t4", "535.54.03")


@pytest.fixture(autouse=True)
def surroundings(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "state"))
    monkeypatch.setattr(start, "LOOK_S", 0)
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)]
    yield
    for number, handler in zip((signal.SIGTERM, signal.SIGHUP), before):
        signal.signal(number, handler)


@pytest.fixture(name="folder")
def folder_fixture(tmp_path):
    """As much of a model as is looked at before a container starts: names, config, the header of the weights."""
    path = tmp_path / "my model"
    path.mkdir()
    (path / "config.json").write_text(json.dumps(tiny_config("llama", architectures=["LlamaForCausalLM"])))
    (path / "tokenizer.json").write_text("{}")
    (path / "tokenizer_config.json").write_text("{}")
    header = json.dumps({"model.norm.weight": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}).encode()
    (path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    return path


@pytest.fixture(name="engine")
def engine_fixture(monkeypatch):
    """A Docker with every image, in which a container answers as soon as it runs; four T4s."""
    fake = Engine(TGI, VLLM)
    use(monkeypatch, fake)
    monkeypatch.setattr(gpus, "seen", lambda: T4)
    monkeypatch.setattr(start.limits, "judge", allowed)
    return fake


def use(monkeypatch, fake):
    monkeypatch.setattr(daemon, "connect", lambda engine="tgi": fake)
    monkeypatch.setattr(start, "healthy", lambda url: any(one.status == "running" and not one.script for one in fake.handles))
    monkeypatch.setattr(reach, "healthy", lambda url: any(one.status == "running" for one in fake.handles))


def allowed(question):
    """A verdict without objections, for what is not about the verdict."""
    from serve.limits import Verdict, engines

    found = engines.find(question.engine, question.version)
    return Verdict([], [], found.name, found.version, found.image, found.digest, question.shards, writable=found.line == "0.8")


def labelled(engine, port, **more):
    names = {"model": "m", "engine": "tgi", "url": "u", "version": "3.3.7", "settings": "", "keyed": "false", "served-name": "m"}
    handle = Handle(
        engine, "c", {"pipedock.port": str(port), **{"pipedock." + name: value for name, value in names.items()}}, **more
    )
    handle.become("running")
    return handle


def cli(capfd, *argv):
    code = pipedock.main(["serve", *argv])
    out, err = capfd.readouterr()
    return code, out, err


def run(folder, **wishes):
    warned = []
    server = launch.launch(str(folder), wishes.pop("engine", "tgi"), warn=warned.append, **{"port": free_port(), **wishes})
    return server, warned


def fails(kind, folder, **wishes):
    with pytest.raises(kind) as caught:
        run(folder, **wishes)
    return str(caught.value)
