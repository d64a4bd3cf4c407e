"""What preflight finds between nodes: real channels and sockets on the loopback interface, and facts that are wrong."""

import json
import os
import re
import socket
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence

import numpy as np
import pytest
from safetensors.numpy import save_file

from pipeline_train import config, preflight
from pipeline_train.control import Channel
from pipeline_train.errors import RunFailed
from pipeline_train.hostfile import Host
from pipeline_train.nodes import Request
from pipeline_train.preflight import bandwidth, clocks, together, wires
from pipeline_train.preflight.finding import FAILURE, NOTE, OK, WARNING, Finding, NotReady, lines
from tests.free_port import free_port
from tests.unit.test_preflight_machine import facts, only

HERE = "127.0.0.1"


def on_nodes(work: Callable[[Channel], Any], nodes: int = 2) -> List[Any]:
    """``work`` with a channel on each node, all at once; -> what each returned, or raised."""

    def one(node: int) -> Any:
        channel = Channel.open(node, nodes, HERE, port, "abc"[node], 20.0, lambda line: None)
        try:
            return work(channel)
        except Exception as error:  # noqa: BLE001 - looked at by the test
            return error
        finally:
            channel.close()

    port = free_port()
    with ThreadPoolExecutor(nodes) as pool:
        return list(pool.map(one, range(nodes)))


def network(**changed: Any) -> Dict[str, Any]:
    row = {"addr": "10.0.0.1", "interface": "eth1", "source": "10.0.0.2", "error": "", "kept": {},
           "names": ["docker0", "eth1", "lo"], "set": {"NCCL_SOCKET_IFNAME": "eth1", "GLOO_SOCKET_IFNAME": "eth1"}}  # fmt: skip
    return {"network": dict(row, **changed)}


def test_the_interface_and_what_was_set() -> None:
    only(wires.check_interface(network()), OK, "eth1 from 10.0.0.2 to 10.0.0.1: GLOO_SOCKET_IFNAME=eth1, NCCL_SOCKET_IFNAME=eth1")
    assert wires.check_interface(network(addr=None)) == []
    none = network(interface=None, source="10.0.0.2", set={}, names=[])
    only(wires.check_interface(none), NOTE, "does not tell which interface leads to 10.0.0.1")


def test_a_wrong_interface() -> None:
    lost = (
        "10.0.0.1: no route from this machine leads there (Network is unreachable). Is its network up? `ip route get 10.0.0.1` asks"
    )
    only(wires.check_interface(network(error=lost)), FAILURE, "network: 10.0.0.1: no route", "ip route")
    inner = "172.17.0.9 is reached from here through docker0 only (...). Name an address of the network that joins the nodes"
    only(wires.check_interface(network(error=inner)), FAILURE, "through docker0 only", "name an address of the network")
    kept = network(kept={"NCCL_SOCKET_IFNAME": "ib7"}, set={}, interface=None)
    only(
        wires.check_interface(kept),
        FAILURE,
        "NCCL_SOCKET_IFNAME=ib7 names no interface of this node (it has docker0, eth1, lo)",
        "unset",
    )
    kept = network(kept={"GLOO_SOCKET_IFNAME": "docker0"}, set={}, interface=None)
    only(
        wires.check_interface(kept),
        WARNING,
        "GLOO_SOCKET_IFNAME=docker0 does not lead to other machines",
        "unset GLOO_SOCKET_IFNAME",
    )


@pytest.mark.parametrize("value", ["eth1", "=eth1", "^docker0,lo", "eth", "docker0,eth1"])
def test_an_interface_of_the_users_own_is_left_to_them(value: str) -> None:
    kept = network(kept={"NCCL_SOCKET_IFNAME": value}, set={}, interface=None)
    levels = [finding.level for finding in wires.check_interface(kept)]
    assert levels == ([WARNING] if value.startswith("docker0") else [OK])


def test_the_interface_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in wires.network.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    found = wires.measure(HERE)
    assert (found["interface"], found["source"], found["error"]) == ("lo", HERE, "") and found["set"]["GLOO_SOCKET_IFNAME"] == "lo"
    assert "does not know that name" in wires.measure("no such.invalid")["error"]
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "eth9")
    assert wires.measure(HERE)["kept"] == {"NCCL_SOCKET_IFNAME": "eth9"}


def reached(port: int, nodes: int = 2) -> List[Finding]:
    """The findings of every node are the same; -> they."""
    tables = on_nodes(lambda channel: wires.reach(channel, HERE, port, HERE), nodes)
    assert all(table == tables[0] for table in tables), tables
    return wires.check_reach(tables[0], "abc", HERE, port)


def test_open_ports() -> None:
    port = free_port()
    only(reached(port, nodes=3), OK, "127.0.0.1:%d and a free port of each node, 6 connections tried" % port)
    with socket.socket() as later:  # nothing keeps it
        later.bind((HERE, port))


def test_a_port_that_is_in_use() -> None:
    with socket.socket() as other:
        other.bind((HERE, 0))
        other.listen()
        port = other.getsockname()[1]
        only(reached(port), FAILURE, "node 0 (a): ports: port %d cannot be used: Address already in use" % port,
             "sudo ss -ltnp 'sport = :%d'" % port, "--master-port")  # fmt: skip


def test_a_firewall_that_drops(monkeypatch: pytest.MonkeyPatch) -> None:
    """A listener whose queue is full: the kernel drops what comes, as a firewall does. Node 1's door is such a one."""
    monkeypatch.setattr(wires, "KNOCK_S", 2.0)

    class Walled(wires.Door):
        def __init__(self, host: str, port: int, node: int) -> None:
            super().__init__(host, port, node)
            if node == 1 and port == 0:
                super().close()
                self.sock = socket.socket()
                self.sock.bind((host, 0))
                self.sock.listen(0)
                self.port = self.sock.getsockname()[1]
                self.guests = [socket.socket() for _ in range(3)]
                for guest in self.guests:
                    guest.setblocking(False)
                    guest.connect_ex((host, self.port))
                time.sleep(0.1)

    monkeypatch.setattr(wires, "Door", Walled)
    found = reached(free_port())
    only(found, FAILURE, "node 1 (b): ports: 127.0.0.1, a free port such as", "cannot be reached from node 0 (a): no answer within",
         "sudo ufw allow from 127.0.0.1")  # fmt: skip


def test_refused_and_someone_else_there() -> None:
    assert wires.knock(HERE, free_port(), 0) == "Connection refused"
    with socket.socket() as other:
        other.bind((HERE, 0))
        other.listen()

        def hang_up() -> None:
            guest, _ = other.accept()
            guest.sendall(b"HTTP/1.0 400\n")
            guest.close()

        threading.Thread(target=hang_up, daemon=True).start()
        assert wires.knock(HERE, other.getsockname()[1], 0) == "another program answers there"


def test_whom_nobody_reaches_is_named_once() -> None:
    rows = [
        {"source": "10.0.0.%d" % n, "port": 4000, "busy": "", "master": "no answer" if n else "", "peers": {}} for n in range(5)
    ]
    for number, row in enumerate(rows):
        row["peers"] = {str(n): "no answer" if n == 3 else "" for n in range(5) if n != number}
    master, third = wires.check_reach(rows, "abcde", "10.0.0.0", 29500)
    only([master], FAILURE, "10.0.0.0:29500 (--master-port) cannot be reached from node 1 (b), node 2 (c), node 3 (d) and 1 more")
    assert third.node == 3 and "from node 0 (a), node 1 (b), node 2 (c) and 1 more: no answer" in third.said


@pytest.mark.parametrize("ahead, level, words", [
    (0.0, OK, ["apart"]), (5.0, WARNING, [r"node 1 \(b\): clock: [456]\.\d s ahead of node 0's", "timedatectl set-ntp true"]),
    (-300.0, FAILURE, [r"(299|300)\.\d s behind node 0's", "chronyc makestep"]),  # a machine that is busy measures less exactly
])  # fmt: skip
def test_clocks(ahead: float, level: str, words: Sequence[str]) -> None:
    def work(channel: Channel) -> Any:
        return clocks.measure(channel, lambda: time.time() + (ahead if channel.node else 0.0))

    [samples, nothing] = on_nodes(work)
    assert nothing == []
    [finding] = clocks.check(samples)
    assert finding.level == level and [word for word in words if not re.search(word, lines([finding], level, "ab")[0])] == []


def test_a_clock_that_stands_still() -> None:
    now = time.time()
    [samples, _] = on_nodes(lambda channel: clocks.measure(channel, (lambda: now) if channel.node else time.time))
    only(clocks.check(samples)[:1], FAILURE, "stands still", "timedatectl")


def test_a_slow_network_is_no_skew() -> None:
    """Nobody can tell better than half of the way there and back."""
    samples = [[0.0, 8.0, 10.0], [20.0, 28.0, 30.0]]
    assert clocks.check([[], samples])[0].level == OK
    assert clocks.check([[], samples + [[40.0, 46.0, 40.2]]])[0].level == WARNING


def talk(**changed: Any) -> Dict[str, Any]:
    row = {
        "ranks": [2, 2],
        "error": ["", ""],
        "backend": "nccl",
        "neighbours": [[100.0, 9.0], [10.0, 30.0], [100.0, 9.0]],
        "all_reduce": 9.5,
    }
    return dict(row, **changed)


def test_bandwidth() -> None:
    only(bandwidth.check(talk()), OK, "nccl, 4 ranks: neighbours at least 10 GB/s, at most 30 us; all-reduce 9.5 GB/s")
    assert bandwidth.check(None) == bandwidth.check({"ranks": [1], "error": [""]}) == []
    slow = talk(neighbours=[[100.0, 9.0], [0.05, 30.0], [100.0, 9.0]])
    only(bandwidth.check(slow), WARNING, "rank 1 to 2 (node 0 to 1): 0.05 GB/s, less than 1 Gb Ethernet", "NCCL_SOCKET_IFNAME")
    odd = talk(ranks=[4, 0], neighbours=[[100.0, 9.0], [100.0, 9.0], [5.0, 9.0]])
    only(bandwidth.check(odd), WARNING, "rank 2 to 3 (node 0 to 0): 5 GB/s, others do 100", "nvidia-smi topo -m")


def test_ranks_that_do_not_find_each_other() -> None:
    broken = talk(error=["", "rank 2: NCCL error: unhandled system error"])
    only(bandwidth.check(broken), FAILURE, "node 1 (b): bandwidth: rank 2: NCCL error", "NCCL_DEBUG=INFO")
    only(
        bandwidth.check(talk(error=["rank 0: Connection refused", ""])), FAILURE, "rank 0: Connection refused", "GLOO_SOCKET_IFNAME"
    )


def test_ranks_that_fail_or_hang_are_ended(tmp_path: Path) -> None:
    envs = [dict(os.environ, RANK=str(rank)) for rank in range(2)]
    fail = "import os, sys, time\nif os.environ['RANK'] == '1': raise ValueError('no card')\ntime.sleep(60)"
    began = time.monotonic()
    found = bandwidth.run_ranks([sys.executable, "-c", fail], envs, 30.0)
    assert found == {"answer": None, "error": "rank 1: ValueError: no card"} and time.monotonic() - began < 20
    sleep = "import os, time; open(os.path.join(%r, os.environ['RANK']), 'w').write(str(os.getpid())); time.sleep(60)" % str(
        tmp_path
    )
    hang = bandwidth.run_ranks([sys.executable, "-c", sleep], envs, 2.0)
    assert hang == {"answer": None, "error": "no end after 2 s"}
    for rank in "01":
        with pytest.raises(ProcessLookupError):
            os.kill(int((tmp_path / rank).read_text()), 0)
    good = bandwidth.run_ranks([sys.executable, "-c", "print('{\"a\": 1}')"], envs, 30.0)
    assert good == {"answer": {"a": 1}, "error": ""}
    assert "cannot be started" in bandwidth.run_ranks(["/no/such"], envs, 1.0)["error"]


def test_ranks_end_when_another_node_is_gone(tmp_path: Path) -> None:
    code = "import os, time; open(%r, 'w').write(str(os.getpid())); time.sleep(60)" % str(tmp_path / "pid")

    def check() -> None:
        if (tmp_path / "pid").exists() and (tmp_path / "pid").read_text():
            raise RunFailed("node 1 (b) is gone")

    began = time.monotonic()
    with pytest.raises(RunFailed) as error:
        bandwidth.run_ranks([sys.executable, "-c", code], [dict(os.environ, RANK="0")], 50.0, check)
    assert str(error.value) == "node 1 (b) is gone" and time.monotonic() - began < 25
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def make_run(root: Path, data: str = "{}\n", weights: str = "w") -> config.RunConfig:
    """A run.yaml's files in ``root``, its data encoded."""
    for path, text in {"train.jsonl": data, "out/data/train.json": '{"hash": "h"}',
                       "model/config.json": json.dumps({"model_type": "llama", "hidden_size": 8, "intermediate_size": 16,
                                                        "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 64,
                                                        "max_position_embeddings": 64, "rms_norm_eps": 1e-6,
                                                        "hidden_act": "silu"})}.items():  # fmt: skip
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)
    shapes = {"model.embed_tokens": (64, 8), "model.norm": (8,), "lm_head": (64, 8)}
    for block in ("model.layers.0.", "model.layers.1."):
        shapes.update({block + "self_attn.%s_proj" % name: (8, 8) for name in "qkvo"})
        shapes.update({block + "mlp.gate_proj": (16, 8), block + "mlp.up_proj": (16, 8), block + "mlp.down_proj": (8, 16)})
        shapes.update({block + "input_layernorm": (8,), block + "post_attention_layernorm": (8,)})
    tensors = {name + ".weight": np.full(shape, sum(map(ord, weights)), np.float16) for name, shape in shapes.items()}
    save_file(tensors, str(root / "model" / "model.safetensors"), {"format": "pt"})
    raw = {"run": {"out": str(root / "out")}, "model": {"path": str(root / "model")}, "data": {"train": str(root / "train.jsonl")},
           "parallel": {"pipe": 2}}  # fmt: skip
    return config.parse(raw)


@pytest.fixture
def cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def checked(tmp_path: Path, said: List[str], task: Optional[Dict[str, Any]] = None, **changed: Any) -> List[Any]:
    """As train calls it, on two nodes with files of their own; ``changed``: node 1's. -> None or the error of each."""
    port = free_port()

    def work(channel: Channel) -> Any:
        run = make_run(tmp_path / str(channel.node), **(changed if channel.node else {}))
        asked = preflight.Task(HERE, port, ranks=1, first=channel.node, run=run, prepared=True)._replace(**(task or {}))
        if asked.shared and channel.node:
            (tmp_path / "1" / "train.jsonl").unlink()
        preflight.check_nodes(channel, asked, said.append)
        preflight.check_run(channel, asked, said.append)

    return on_nodes(work)


def test_a_shared_run_needs_its_data_on_node_0_only(tmp_path: Path, cpu: None) -> None:
    assert checked(tmp_path, [], {"shared": True, "prepared": False}) == [None, None]


def test_a_resume_reads_no_weights(tmp_path: Path, cpu: None) -> None:
    first, second = checked(tmp_path, [], weights="v")
    assert str(first) == str(second) and "weights differ between the nodes: model.safetensors" in str(first)
    assert checked(tmp_path, [], {"resumed": True}, weights="v") == [None, None]


def test_nodes_that_are_ready(tmp_path: Path, cpu: None) -> None:
    said: List[str] = []
    began = time.monotonic()
    assert checked(tmp_path, said) == [None, None] and time.monotonic() - began < 10
    passed = [line for line in said if line.startswith("preflight: passed")]
    machines = "versions, /dev/shm, ulimits, memory, GPUs, network, same everywhere, clock, ports"
    assert sorted(passed) == 2 * ["preflight: passed: disk, memory, GPUs, same everywhere"] + 2 * ["preflight: passed: " + machines]


def test_nodes_that_are_not_the_same_end_everywhere(tmp_path: Path, cpu: None) -> None:
    first, second = checked(tmp_path, [], data="other\n")
    assert isinstance(first, NotReady) and str(first) == str(second)
    assert str(first).startswith("1 check failed: same everywhere: data differs between the nodes: train: ")
    assert "give every node the same file" in str(first) and first.document["ok"] is False


def test_warnings_are_said_where_they_belong(tmp_path: Path, cpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """At node 0 those of all nodes, on the others their own."""
    monkeypatch.setattr(together.machine, "STACK_LEAST", 1 << 62)
    monkeypatch.setattr(together.machine.resource, "getrlimit", lambda number: (1 << 23, 1 << 23))
    said: List[str] = []
    checked(tmp_path, said)
    warned = sorted(line.partition("8 MiB")[0] for line in said if "ulimit stack" in line)
    assert warned == ["preflight: node 0 (a), node 1 (b): ulimit stack: ", "preflight: node 1 (b): ulimit stack: "]


def test_all_failures_are_in_the_one_line() -> None:
    bad = facts(files={"data.train": "x.jsonl"}, versions={"torch": None})
    with pytest.raises(NotReady) as caught:
        together.judged(together.at(1, together.machine.check(bad)), ["a", "b"], [{}, bad])
    assert str(caught.value).startswith("2 checks failed: node 1 (b): versions: torch is not installed; pip install torch")
    assert "; node 1 (b): files: data.train: x.jsonl is not here; copy it" in str(caught.value)


def test_a_missing_node_is_told_with_what_is_known_of_this_one(cpu: None) -> None:
    task = preflight.Task(addr=HERE, port=free_port())
    with pytest.raises(NotReady) as caught:
        preflight.meet(task, Request(1, 2, HERE, task.port), 0.2, lambda line: None, lambda: None, "x")
    assert "node 0 does not answer at 127.0.0.1:%d" % (task.port + 1) in str(caught.value)
    assert "sudo ufw allow %d/tcp" % (task.port + 1) in str(caught.value)
    assert [row["check"] for row in caught.value.document["findings"]][:1] == ["versions"]


HOSTS = [Host("big", 3, "hosts:1"), Host("small", 1, "hosts:2")]


@pytest.mark.parametrize("pipe, hosts, shares, names", [
    (4, None, [(0, 2), (2, 2)], ["a", "b"]), (4, HOSTS, [(0, 3), (3, 1)], ["big", "small"]),
    (None, HOSTS, [(0, 3), (3, 1)], ["big", "small"]), (None, None, [(0, None), (0, None)], ["a", "b"]),
])  # fmt: skip
def test_ranks_are_shared_out_as_train_does(pipe: Any, hosts: Any, shares: List[Any], names: List[str]) -> None:
    """A hostfile is on node 0 only."""
    raw = {"run": {"out": "-"}, "model": {"path": "-"}, "data": {"train": "-"}, "parallel": {"pipe": pipe}}
    task = preflight.Task(run=None if pipe is None else config.parse(raw))

    def work(channel: Channel) -> Any:
        mine = preflight.allotted(channel, task, hosts if channel.node == 0 else None)
        return (mine.first, mine.ranks), channel.names

    assert on_nodes(work) == [(share, names) for share in shares]
