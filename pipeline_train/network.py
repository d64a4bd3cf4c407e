"""Which network interface leads to an address, by this machine's routes. Standard library only.

NCCL and gloo guess: where a machine has docker0, veth pairs or a management network, they take the wrong one and wait for ever.
The kernel is asked instead: a datagram socket that is connected (nothing is sent) has the source address that its route gives,
and the interface is the one that carries this address (SIOCGIFCONF, netdevice(7), for IPv4; /proc/net/if_inet6 for IPv6).
"""

import array
import contextlib
import fcntl
import ipaddress
import os
import random
import re
import socket
import struct
import sys
from pathlib import Path
from typing import Dict, List, NamedTuple, Optional, Tuple

from .errors import UserError

VARIABLES = ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME")
INTERNAL = re.compile(r"docker0|docker_gwbridge|veth.*|br-.*|virbr.*|cni.*|lxcbr.*|podman.*")  # lead to containers of this machine
IF_INET6 = Path("/proc/net/if_inet6")
SIOCGIFCONF = 0x8912  # netdevice(7)
IFREQ, MOST = 40, 1024  # bytes of one struct ifreq; interfaces asked for
ANY_PORT = 9  # nothing is sent there
PORT_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")
FIRST_PORT = 10000


class Carried(NamedTuple):
    """An address of this machine and the interface that has it."""

    interface: str
    address: str


def interface_to(address: str) -> Optional[str]:
    """The interface by which packets leave for ``address`` (a name or an IPv4 or IPv6 address); None where the system does not
    tell (not Linux). "lo" only for this machine's own loopback. Raises UserError: no such name, no route, a name that stands for
    the loopback here, or only an interface that leads to containers of this machine."""
    target, source = route(address)
    if ipaddress.ip_address(target).is_loopback:
        if not _means_loopback(address):
            raise UserError(
                "%s means %s on this machine (its /etc/hosts), where no other node can reach it. Name an address that all nodes "
                "see%s" % (address, target, _instead())
            )
        return next((one.interface for one in carried() if ipaddress.ip_address(one.address).is_loopback), None)
    found = next((one.interface for one in carried() if one.address == source), None)
    if found is not None and (found == "lo" or INTERNAL.fullmatch(found)):
        raise UserError(
            "%s is reached from here through %s only (source address %s), which does not lead to other machines. Name an address "
            "of the network that joins the nodes%s, or set %s to its interface yourself"
            % (address, found, source, _instead(), " and ".join(VARIABLES))
        )
    return found


def collective_environment(address: str) -> Dict[str, str]:
    """NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME for the ranks, those of them that the user has not set; {} where the system does
    not tell. Raises UserError as ``interface_to`` does."""
    unset = [name for name in VARIABLES if not os.environ.get(name)]
    interface = interface_to(address) if unset else None
    return {name: _spelled(name, interface) for name in unset} if interface is not None else {}


def carried() -> List[Carried]:
    """This machine's addresses, IPv4 first; empty where the system does not tell."""
    if not sys.platform.startswith("linux"):
        return []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        buffer = array.array("B", bytes(IFREQ * MOST))
        request = struct.pack("iL", len(buffer), buffer.buffer_info()[0])
        size = struct.unpack("iL", fcntl.ioctl(asked.fileno(), SIOCGIFCONF, request))[0]
    raw, found = buffer.tobytes(), []
    for begin in range(0, size, IFREQ):
        name = raw[begin : begin + 16].split(b"\0")[0].decode().split(":")[0]  # "eth0:1" is a second address of eth0
        found.append(Carried(name, socket.inet_ntoa(raw[begin + 20 : begin + 24])))
    with contextlib.suppress(OSError):
        for line in IF_INET6.read_text(encoding="ascii").splitlines():
            digits, _, _, _, _, name = line.split()
            found.append(Carried(name, str(ipaddress.IPv6Address(int(digits, 16)))))
    return found


def route(address: str) -> Tuple[str, str]:
    """(the address that a name stands for, the source address of packets to it), the first that has a route. Raises UserError."""
    try:
        answers = socket.getaddrinfo(address, ANY_PORT, type=socket.SOCK_DGRAM)
    except (OSError, UnicodeError) as error:
        raise UserError("%s: this machine does not know that name (%s). Name an address, or add it to /etc/hosts"
                        % (address, getattr(error, "strerror", None) or error)) from None  # fmt: skip
    why = ""
    for family, kind, protocol, _, place in answers:
        with socket.socket(family, kind, protocol) as probe:
            try:
                probe.connect(place)
            except OSError as error:
                why = error.strerror or str(error)
            else:
                return _bare(place[0]), _bare(probe.getsockname()[0])
    raise UserError("%s: no route from this machine leads there (%s). Is its network up? `ip route get %s` asks the same"
                    % (address, why, answers[0][4][0]))  # fmt: skip


def _bare(address: object) -> str:
    """Without the "%eth0" of a link-local IPv6 address."""
    return str(ipaddress.ip_address(str(address).partition("%")[0]))


def _means_loopback(address: str) -> bool:
    """Whoever wrote 127.0.0.1 or localhost knows that it is this machine."""
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return address.rstrip(".").lower().split(".")[-1] in ("localhost", "ip6-localhost", "ip6-loopback", "localdomain")


def _spelled(variable: str, interface: Optional[str]) -> str:
    """NCCL takes every interface that begins so, unless it is told "=": eth1 is also eth10."""
    assert interface is not None
    names = {one.interface for one in carried()}
    longer = any(name != interface and name.startswith(interface) for name in names)
    return "=" + interface if longer and variable.startswith("NCCL") else interface


def _instead() -> str:
    """An address of this machine to offer."""
    for one in carried():
        if one.interface != "lo" and not INTERNAL.fullmatch(one.interface) and not ipaddress.ip_address(one.address).is_link_local:
            return " (this machine has %s on %s)" % (one.address, one.interface)
    return ""


def free_port() -> int:
    """On the loopback interface, for processes of this machine alone. Where it can be, below those that the kernel gives to
    connections (ip_local_port_range, ip(7)): until the processes have started, seconds later, one of these could have got it."""
    end = 32768
    with contextlib.suppress(OSError, ValueError):
        end = int(PORT_RANGE.read_text(encoding="ascii").split()[0])
    chance = random.SystemRandom()  # not the generator that a run has seeded
    for port in [chance.randrange(FIRST_PORT, end) for _ in range(50) if end > FIRST_PORT] + [0]:
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return int(probe.getsockname()[1])
    raise UserError("no port of the loopback interface is free")
