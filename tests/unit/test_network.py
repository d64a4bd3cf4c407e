"""The interface towards an address: on this machine, and in a network namespace with the interfaces that libraries stumble over."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline_train import network
from pipeline_train.errors import UserError
from pipeline_train.network import Carried

ROOT = Path(__file__).resolve().parents[2]
HERE = [Carried("lo", "127.0.0.1"), Carried("docker0", "172.17.0.1"), Carried("eth1", "10.1.0.2"), Carried("eth10", "10.9.0.2"),
        Carried("veth1", "10.5.0.1"), Carried("br-12ab", "172.18.0.1"), Carried("virbr0", "192.168.122.1"),
        Carried("eth10", "fd01::2"), Carried("lo", "::1")]  # fmt: skip
NAMESPACE = """
set -e
ip link set lo up
add() { ip link add "$1" type veth peer name "$2"; ip link set "$1" up; ip link set "$2" up; ip addr add "$3" dev "$1" $4; }
add eth1 p1 10.1.0.2/24
add eth10 p2 10.9.0.2/24
add docker0 p3 172.17.0.1/16
add veth1 p4 10.5.0.1/24
add eth6 p5 fd01::2/64 nodad
exec "$@"
"""
ASK = """
import json, sys
from pipeline_train import network
from pipeline_train.errors import UserError
answers = {}
for address in sys.argv[1:]:
    try:
        answers[address] = [network.interface_to(address), network.collective_environment(address)]
    except UserError as error:
        answers[address] = str(error)
print(json.dumps(answers))
"""


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in network.VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with the interfaces of HERE; an address A.B.C.D is reached from the one whose A.B is the same."""

    def route(address):
        same = [one for one in HERE if one.address.replace(":", ".").split(".")[:2] == address.replace(":", ".").split(".")[:2]]
        return address, same[0].address

    monkeypatch.setattr(network, "carried", lambda: HERE)
    monkeypatch.setattr(network, "route", route)


@pytest.mark.parametrize("address, interface", [("10.1.0.77", "eth1"), ("10.9.0.77", "eth10"), ("127.0.0.1", "lo"), ("::1", "lo")])
def test_the_interface_whose_address_the_route_gives(elsewhere: None, address: str, interface: str) -> None:
    assert network.interface_to(address) == interface


@pytest.mark.parametrize("address, interface", [
    ("172.17.0.9", "docker0"), ("10.5.0.9", "veth1"), ("172.18.0.9", "br-12ab"), ("192.168.122.7", "virbr0"),
])  # fmt: skip
def test_one_that_leads_to_containers_only_is_refused(elsewhere: None, address: str, interface: str) -> None:
    with pytest.raises(UserError) as caught:
        network.interface_to(address)
    said = str(caught.value)
    assert address in said and "through %s only" % interface in said and "NCCL_SOCKET_IFNAME" in said and "10.1.0.2 on eth1" in said


def test_lo_is_not_taken_for_an_address_that_only_lies_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a routing protocol runs on the host itself."""
    monkeypatch.setattr(network, "carried", lambda: [Carried("lo", "10.7.7.7"), Carried("eth0", "10.1.0.2")])
    monkeypatch.setattr(network, "route", lambda address: (address, "10.7.7.7"))
    with pytest.raises(UserError, match="through lo only"):
        network.interface_to("10.7.7.8")


def test_what_the_user_has_set_stays(elsewhere: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert network.collective_environment("10.9.0.5") == {"NCCL_SOCKET_IFNAME": "eth10", "GLOO_SOCKET_IFNAME": "eth10"}
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "^lo")
    assert network.collective_environment("10.9.0.5") == {"GLOO_SOCKET_IFNAME": "eth10"}
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "docker0")
    assert network.collective_environment("172.17.0.9") == {}  # not even refused: it is theirs


def test_nccl_is_told_eth1_and_not_what_begins_so(elsewhere: None) -> None:
    assert network.collective_environment("10.1.0.5") == {"NCCL_SOCKET_IFNAME": "=eth1", "GLOO_SOCKET_IFNAME": "eth1"}


def test_a_name_that_this_machine_takes_for_itself_is_refused(elsewhere: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Debian's /etc/hosts: the machine's own name is 127.0.1.1 there."""
    monkeypatch.setattr(network, "route", lambda address: ("127.0.1.1", "127.0.0.1"))
    with pytest.raises(UserError, match=r"^node0 means 127\.0\.1\.1 on this machine \(its /etc/hosts\).*10\.1\.0\.2 on eth1"):
        network.interface_to("node0")
    assert network.interface_to("127.0.1.1") == network.interface_to("localhost") == "lo"


def test_where_the_system_does_not_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network.sys, "platform", "darwin")
    assert network.interface_to("127.0.0.1") is None and network.collective_environment("127.0.0.1") == {}


def test_an_unknown_name(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"^no such\.invalid: this machine does not know that name .*/etc/hosts"):
        network.interface_to("no such.invalid")


def test_this_machine() -> None:
    assert network.interface_to("127.0.0.1") == "lo" and Carried("lo", "127.0.0.1") in network.carried()
    for one in network.carried():
        if one.interface != "lo" and not network.INTERNAL.fullmatch(one.interface) and ":" not in one.address:
            assert network.interface_to(one.address) == one.interface


def test_in_a_network_of_its_own() -> None:
    """Real interfaces and routes: IPv4 and IPv6, two of one beginning, docker0, a veth, and an address without a route."""
    shell = ["unshare", "-rn", "sh", "-c", NAMESPACE, "sh"]
    if (
        shutil.which("unshare") is None
        or shutil.which("ip") is None
        or subprocess.run(shell + ["true"], capture_output=True).returncode
    ):
        pytest.skip("this machine lets nobody make a network namespace with interfaces in it")
    asked = ["10.1.0.77", "10.1.0.2", "10.9.0.77", "172.17.0.9", "10.5.0.1", "fd01::77", "127.0.0.1", "192.0.2.1", "fd01::2"]
    env = dict(os.environ, PYTHONPATH=str(ROOT))
    done = subprocess.run(shell + [sys.executable, "-c", ASK] + asked, capture_output=True, text=True, env=env, timeout=30)
    assert done.returncode == 0, done.stderr
    answers = json.loads(done.stdout)
    assert answers["10.1.0.77"] == answers["10.1.0.2"] == ["eth1", {"NCCL_SOCKET_IFNAME": "=eth1", "GLOO_SOCKET_IFNAME": "eth1"}]
    assert answers["10.9.0.77"] == ["eth10", {"NCCL_SOCKET_IFNAME": "eth10", "GLOO_SOCKET_IFNAME": "eth10"}]
    assert answers["fd01::77"][0] == answers["fd01::2"][0] == "eth6" and answers["127.0.0.1"][0] == "lo"
    assert "through docker0 only" in answers["172.17.0.9"] and "through veth1 only" in answers["10.5.0.1"]
    assert answers["192.0.2.1"].startswith("192.0.2.1: no route from this machine leads there (Network is unreachable)")


def test_a_free_port_is_none_that_an_outgoing_connection_could_get_meanwhile(tmp_path, monkeypatch):
    monkeypatch.setattr(network, "PORT_RANGE", tmp_path / "range")
    (tmp_path / "range").write_text("20000\t60999\n")
    ports = {network.free_port() for _ in range(20)}
    assert len(ports) > 10 and all(10000 <= port < 20000 for port in ports)
    (tmp_path / "range").write_text("1024\t60999\n")  # of a machine whose kernel gives out all of them
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", network.free_port()))


def test_without_a_free_port_there_is_a_line(monkeypatch):
    def bind(self, address):
        raise OSError(98, "Address already in use")

    monkeypatch.setattr(network.socket, "socket", type("Taken", (socket.socket,), {"bind": bind}))
    with pytest.raises(UserError) as error:
        network.free_port()
    assert str(error.value) == "no port of the loopback interface is free"
