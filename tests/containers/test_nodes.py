"""Several nodes for real: containers on one bridge network, each with its own filesystem; and the shipped file on this host."""

import json
import os
import re
import subprocess
import time

import pytest

from tests.containers.compose import OWNER, ROOT, Compose, needs_engine, write_run
from tests.free_port import free_port

pytestmark = needs_engine

STEPS, SAVE_EVERY = 16, 4
RUN = """
run:      {name: example, out: runs/example, seed: 1, self_test: false}
model:    {path: models/example-bloom, dtype: fp32, init: random}
data:     {train: data/example.jsonl, seq_len: 128}
parallel: {pipe: 2, data: 1, parts: auto}
batch:    {micro: 2, global: 4}
optim:    {type: adamw, lr: 3e-3, weight_decay: 0.0, warmup: 10}
train:    {epochs: 60, max_steps: %d, log_every: 1, save_every: %d}
"""


@pytest.fixture(scope="module")
def run_yaml(request):
    return write_run(request, "nodes", RUN % (STEPS, SAVE_EVERY))


@pytest.fixture(scope="module")
def network():
    name = "pipedock-nodes-%d" % os.getpid()
    subprocess.run(["docker", "network", "create", name], check=True, capture_output=True, timeout=60)
    yield name
    subprocess.run(["docker", "network", "rm", name], capture_output=True, timeout=60)


@pytest.fixture(scope="module")
def alone(images, run_yaml, tmp_path_factory):
    """The same run in one container: step -> loss. Its data and model are every node's."""
    road = Compose(tmp_path_factory.mktemp("alone"), "alone", RUN_CONFIG=run_yaml, OMP_NUM_THREADS="1")
    road("up", "--no-color", "train")
    road.down()
    assert [line["step"] for line in road.steps("example")] == list(range(1, STEPS + 1))
    return road


def losses(road):
    return [line["loss"] for line in road.steps("example")]


def two(alone, tmp_path, **env):
    """Two projects that share nothing but the engine; data and model copied, as one would."""
    nodes = []
    for node in range(2):
        (tmp_path / str(node)).mkdir()
        road = Compose(
            tmp_path / str(node),
            "node%d" % node,
            RUN_CONFIG=alone.env["RUN_CONFIG"],
            NODE_NAME="node%d" % node,
            OMP_NUM_THREADS="1",
            **env,
        )
        for kind in ("data", "models"):
            subprocess.run(["cp", "-a", str(alone.folder / kind) + "/.", str(road.folder / kind)], check=True, timeout=60)
        nodes.append(road)
    return nodes


@pytest.fixture
def bridge(alone, network, tmp_path):
    files = "compose/compose.yaml:compose/cpu.yaml:tests/containers/bridge.yaml"
    nodes = two(alone, tmp_path, COMPOSE_FILE=files, NODES_NETWORK=network)
    yield nodes
    for road in nodes:
        road.down()


def up(nodes):
    for road in nodes:
        road("up", "--detach", "--force-recreate", "--no-color", "train")


def finished(nodes, timeout=240):
    return [road.ended("train", timeout) for road in nodes]


def kill(nodes, victim, step):
    """Once every node has that step's checkpoint; the other one must end by itself and say who is gone."""
    end = time.monotonic() + 240
    manifest = "runs/example/checkpoints/step_%06d/manifest.json" % step
    while not all((road.folder / manifest).exists() for road in nodes):
        assert time.monotonic() < end and nodes[0].state("train")["State"] == "running", nodes[0]("logs", "train")
        time.sleep(0.1)
    subprocess.run(["docker", "kill", nodes[victim].state("train")["ID"]], check=True, capture_output=True, timeout=60)
    killed, other = time.monotonic(), nodes[1 - victim]
    assert other.ended("train", 90) == 1
    assert time.monotonic() - killed < 60
    said = other("logs", "--no-color", "train")
    assert re.search(r"node %d \(node%d\)[^\n]*(died|gone|lost|closed|silent)" % (victim, victim), said), said[-3000:]
    assert "Traceback" not in said
    assert step <= len(losses(nodes[0])) < STEPS


def test_a_node_that_is_killed_is_named_and_both_go_on_where_they_were(alone, bridge):
    """Without ssh; first the one, then node 0. The curve, cut twice, is that of one container."""
    for rank, road in enumerate(bridge):
        road.env.update(NODES="2", NODE_RANK=str(rank), MASTER_ADDR="node0")
    up(bridge)
    kill(bridge, 1, SAVE_EVERY)
    up(bridge)
    kill(bridge, 0, 2 * SAVE_EVERY)
    up(bridge)
    assert finished(bridge) == [0, 0], [road("logs", "train")[-3000:] for road in bridge]
    begun = re.search(r"steps (\d+) to %d" % STEPS, bridge[0]("logs", "--no-color", "train"))
    assert begun and int(begun.group(1)) > 2 * SAVE_EVERY, "it goes on where the last checkpoint was"
    assert losses(bridge[0]) == losses(alone)
    assert (bridge[0].folder / "runs/example/checkpoints/latest").read_text().strip() == "step_%06d" % STEPS
    assert all({OWNER if os.getuid() == 0 else os.getuid()} == road.owners("runs") for road in bridge)


def test_by_ssh_and_a_hostfile(alone, bridge):
    """Keys are made at compose time; sshd runs where it was asked for; pdsh starts the other's ranks, gather gets its files."""
    first, second = bridge
    first("run", "--rm", "keys")
    keys = first.folder / "cluster/ssh"
    assert (keys / "id_ed25519").stat().st_mode & 0o077 == 0
    refused = second("run", "--rm", "sshd", ok=False)
    assert "no keys in /workspace/cluster/ssh; `docker compose run --rm keys` makes them" in refused
    subprocess.run(["cp", "-a", str(keys), str(second.folder / "cluster")], check=True, timeout=60)
    (first.folder / "cluster/hostfile").write_text("node0 slots=1\nnode1 slots=1\n")
    (first.folder / "cluster/.deepspeed_env").write_text("OMP_NUM_THREADS=1\n")
    second("up", "--detach", "--wait", "--wait-timeout", "60", "sshd")
    first.env["HOSTFILE"] = "cluster/hostfile"
    up([first])
    assert first.ended("train", 240) == 0, first("logs", "train")[-3000:]
    assert losses(first) == losses(alone)
    scattered = [{p.name for p in (road.folder / "runs/example/checkpoints").glob("step_%06d/*" % STEPS)} for road in bridge]
    assert scattered[0] and scattered[1] and scattered[0] != scattered[1], "each node has written its own part"
    assert "Accepted publickey for pipedock" in second("logs", "--no-color", "sshd")
    missing = first("run", "--rm", "export", ok=False)
    assert "node1" in missing and "pipedock gather" in missing and "Traceback" not in missing, missing
    assert not (first.folder / "exports/current").exists()
    gather = ["pipedock", "gather", "--input", "runs/example", "--hostfile", "cluster/hostfile"]
    first("run", "--rm", "--no-deps", "train", *gather)
    first("run", "--rm", "export")
    assert json.loads((first.folder / "exports/example/proof.json").read_text())["holds"] is True


def test_a_stranger_does_not_get_in(images, bridge):
    """Another key, and a password, are refused; so is a server with another key."""
    first, second = bridge
    for road in bridge:
        road("run", "--rm", "keys")
    second("up", "--detach", "--wait", "--wait-timeout", "60", "sshd")
    ask = "ssh %s $PDSH_SSH_ARGS_APPEND node1 true"
    said = first("run", "--rm", "--no-deps", "train", "sh", "-c", ask % "", ok=False)
    assert "Host key verification failed" in said
    said = first(
        "run",
        "--rm",
        "--no-deps",
        "train",
        "sh",
        "-c",
        ask % "-o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null",
        ok=False,
    )
    assert "Permission denied (publickey)" in said


def test_no_image_has_a_key(images):
    names = "( -name ssh_host_* -o -name id_ed25519* -o -name id_rsa* -o -name authorized_keys )"
    for image in ("pipedock:cpu", "pipedock-serve:cpu"):
        command = ["docker", "run", "--rm", "--entrypoint", "find", image, "/", "-xdev", *names.split()]
        assert subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=120).stdout == ""


def test_the_shipped_file_on_the_network_of_this_host(alone, tmp_path):
    """Two projects on one host, no network of their own."""
    nodes = two(alone, tmp_path, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    try:
        for rank, road in enumerate(nodes):
            road.env.update(NODES="2", NODE_RANK=str(rank))
        up(nodes)
        assert finished(nodes) == [0, 0], [road("logs", "train")[-3000:] for road in nodes]
        assert losses(nodes[0]) == losses(alone)
    finally:
        for road in nodes:
            road.down()


def test_the_nodes_are_told_apart_in_one_line(images, run_yaml, tmp_path):
    road = Compose(tmp_path, "half", RUN_CONFIG=run_yaml, NODES="2", MASTER_ADDR="127.0.0.1")
    said = road("run", "--rm", "train", ok=False).strip().splitlines()
    assert said[-1] == "train: NODES, MASTER_ADDR: set NODE_RANK too, on every node", said
    assert (ROOT / road.env["RUN_CONFIG"]).exists()
