"""`docker compose config` of every combination: what the shipped files say once they are merged and filled in."""

import json
import os
import shlex
import subprocess

import pytest

from tests.containers.compose import ROOT, needs_engine

pytestmark = needs_engine  # Compose v2 is what it takes; the containers lane brings one

STACKS = ("cpu", "cuda", "cu116")
NODES = {"one": {}, "nodes": {"NODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "node0"}, "hostfile": {"HOSTFILE": "cluster/hostfile"}}


def config(stack, ssh=True, **env):
    inherited = {name: value for name, value in os.environ.items() if name not in ("BASE_IMAGE", "HF_HOME", "COMPOSE_FILE")}
    profiles = ["--profile", "export"] + (["--profile", "ssh"] if ssh else [])
    done = subprocess.run(
        ["docker", "compose", *profiles, "config", "--format", "json"], cwd=ROOT, env=dict(inherited, STACK=stack, **env),
        stdout=subprocess.PIPE, check=True, timeout=60,
    )  # fmt: skip
    return json.loads(done.stdout)["services"]


@pytest.mark.parametrize("stack", STACKS)
@pytest.mark.parametrize("ssh", [False, True])
@pytest.mark.parametrize("nodes", NODES)
def test_every_combination(stack, ssh, nodes):
    services = config(stack, ssh, **NODES[nodes])
    assert set(services) == {"train", "export", "serve"} | ({"keys", "sshd"} if ssh else set())
    given = {name: services["train"]["environment"].get(name) for name in ("NODES", "NODE_RANK", "MASTER_ADDR", "HOSTFILE")}
    assert {name: value for name, value in given.items() if value is not None} == NODES[nodes]
    for name in set(services) - {"serve"}:
        assert services[name]["image"] == "pipedock:" + stack
        assert (ROOT / services[name]["build"]["dockerfile"]).is_file()
        assert services[name].get("deploy") is None or name in ("train", "sshd")
    for name in {"train", "sshd"} & set(services):  # both start ranks
        assert services[name]["network_mode"] == "host" and services[name]["shm_size"] == str(8 << 30)
        assert services[name]["volumes"] == services["train"]["volumes"]
        assert services[name]["environment"] == services["train"]["environment"]


def devices(service):
    return (service.get("deploy") or {}).get("resources", {}).get("reservations", {}).get("devices", [])


def limit(service, name):
    return (service.get("ulimits") or {}).get(name)


def test_gpus_are_reserved_only_where_there_are_gpus():
    for name, service in config("cpu").items():
        assert devices(service) == [] and limit(service, "memlock") is None, name
    for stack in ("cuda", "cu116"):
        services = config(stack)
        for name in ("train", "sshd", "serve"):
            assert devices(services[name]) == [{"driver": "nvidia", "count": -1, "capabilities": ["gpu"]}]
            assert limit(services[name], "memlock") == -1 and limit(services[name], "stack") == 64 << 20
        assert devices(services["export"]) == [] and devices(services["keys"]) == []
        assert devices(config(stack, GPUS="2")["train"])[0]["count"] == 2


@pytest.mark.parametrize(
    "stack, image, probe",
    [
        ("cuda", "ghcr.io/huggingface/text-generation-inference:3.3.7", "curl"),
        ("cu116", "ghcr.io/huggingface/text-generation-inference:0.8.2", "/opt/conda/bin/python"),
        ("cpu", "pipedock-serve:cpu", None),
    ],
)
def test_serve(stack, image, probe):
    """Its own image brings the health check of the cpu stack's. TGI 0.8 does not know --hostname."""
    serve = config(stack)["serve"]
    hostname = "" if stack == "cu116" else " --hostname 0.0.0.0"
    assert serve["image"] == image
    assert serve["command"] == shlex.split("--model-id /data/current --num-shard 1" + hostname)
    assert [(port["host_ip"], port["published"], port["target"]) for port in serve["ports"]] == [("127.0.0.1", "8082", 80)]
    assert serve["restart"] == "unless-stopped" and serve["stop_grace_period"] == "2m0s" and serve["shm_size"] == str(1 << 30)
    assert [(volume["source"], volume["target"]) for volume in serve["volumes"]] == [(str(ROOT / "exports"), "/data")]
    check = serve.get("healthcheck", {"test": [None, None]})["test"]
    assert check[1] == probe and (probe is None or "http://127.0.0.1:80/health" in check[-1])
    other = config(stack, NUM_SHARD="4", SERVE_ARGS="--disable-custom-kernels --max-total-tokens 512", SERVE_MODEL="mine")["serve"]
    flags = "--model-id /data/mine --num-shard 4%s --disable-custom-kernels --max-total-tokens 512" % hostname
    assert other["command"] == shlex.split(flags)


def test_the_hub_token_has_the_name_that_the_server_knows():
    assert config("cu116", HF_TOKEN="t")["serve"]["environment"] == {"HF_TOKEN": "t", "HUGGING_FACE_HUB_TOKEN": "t"}
    assert config("cuda", HF_TOKEN="t")["serve"]["environment"] == {"HF_TOKEN": "t"}


def test_ssh_never_takes_the_hosts_own_port():
    for port in ("2222", "2200"):
        env = config("cpu", **({} if port == "2222" else {"SSH_PORT": port}))["sshd"]["environment"]
        assert env["SSH_PORT"] == port and env["PDSH_SSH_ARGS_APPEND"].startswith("-p %s -i /workspace/cluster/ssh/" % port)


def test_every_build_takes_a_base_image():
    for stack in STACKS:
        services = config(stack, BASE_IMAGE="mine:1", GIT_HASH="abc")
        for name, service in services.items():
            if "build" in service:
                assert service["build"]["args"]["BASE_IMAGE"] == "mine:1" and service["build"]["args"]["GIT_HASH"] == "abc", name
        assert "BASE_IMAGE" not in {k for k, v in (config(stack)["train"]["build"].get("args") or {}).items() if v}
