"""The control channel, with threads on the loopback interface for nodes: joining, messages, and every way in which a node goes."""

import contextlib
import socket
import struct
import threading
import time

import pytest

from pipeline_train import joining, link
from pipeline_train.control import Channel, NodeGone
from pipeline_train.errors import RunFailed, UserError
from tests.free_port import free_port


class Cluster:
    """``work(channel)`` on every node at once. ``results``: what each returned or raised; ``said``: its lines."""

    def __init__(self, nodes, wait_s=20.0):
        self.nodes, self.wait_s, self.port = nodes, wait_s, free_port()
        self.results, self.said, self.threads = {}, {node: [] for node in range(nodes)}, []

    def start(self, node, work, nodes=None, name=None, slot=None):
        def body():
            try:
                channel = Channel.open(
                    node, nodes or self.nodes, "127.0.0.1", self.port, name or "box%d" % node, self.wait_s, self.said[node].append
                )
                try:
                    self.results[slot or node] = work(channel)
                except Exception as error:
                    channel.close(error)
                    raise
                channel.close()
            except Exception as error:  # noqa: BLE001 - the test looks at it
                self.results[slot or node] = error

        self.threads.append(threading.Thread(target=body))
        self.threads[-1].start()

    def join(self):
        for thread in self.threads:
            thread.join(40)
        assert not any(thread.is_alive() for thread in self.threads)
        return self.results

    def run(self, work):
        for node in range(self.nodes):
            self.start(node, work)
        return self.join()


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(link, "BEAT_S", 0.1)
    monkeypatch.setattr(link, "SILENT_S", 1.5)
    monkeypatch.setattr(joining, "FIRST_S", 0.2)


def test_every_node_gets_what_every_node_has_and_knows_the_names():
    found = Cluster(3).run(lambda channel: (channel.exchange({"n": channel.node}), channel.exchange({"again": 1}), channel.names))
    wanted = ([{"n": 0}, {"n": 1}, {"n": 2}], [{"again": 1}] * 3, ["box0", "box1", "box2"])
    assert found == dict.fromkeys(range(3), wanted)


def test_one_node_talks_to_itself():
    channel = Channel.open(0, 1, "nowhere.invalid", 1, "box", 1.0, print)
    assert channel.exchange({"a": 1}) == [{"a": 1}] and channel.named(0) == "node 0 (box)"
    channel.close()


def test_bytes_go_both_ways_in_their_order_and_nobody_runs_ahead_of_the_reader():
    sizes = [0, 1, 5 << 20, 3, 1 << 20, 7, 9, 11]
    ahead = []

    def work(channel):
        if channel.node:
            for number, size in enumerate(sizes):
                channel.send(0, {"number": number}, bytes([number]) * size)
                ahead.append(number)
            return channel.receive(0)
        until(lambda: len(ahead) == link.WINDOW)
        time.sleep(0.5)
        seen = len(ahead)
        found = [channel.receive(1) for _ in sizes]
        channel.send(1, {"thanks": True}, b"x")
        return found, seen

    found = Cluster(2).run(work)
    received, seen = found[0]
    assert received == [({"number": n}, bytes([n]) * size) for n, size in enumerate(sizes)] and seen == link.WINDOW
    assert found[1] == ({"thanks": True}, b"x")


def test_the_newest_state_is_seen_without_waiting():
    def work(channel):
        if channel.node:
            for number in range(50):
                channel.post({"number": number})
            channel.exchange({})
            return channel.posted(0)
        assert channel.posted(1) is None or "number" in channel.posted(1)
        channel.post({"wish": 1})
        channel.exchange({})
        return channel.posted(1)

    assert Cluster(2).run(work) == {0: {"number": 49}, 1: {"wish": 1}}


def test_who_is_missing_is_said_and_in_the_end_told_to_those_who_came(quick):
    cluster = Cluster(3, wait_s=2.5)
    cluster.start(2, lambda channel: None)  # whose own time is up first
    time.sleep(0.5)
    cluster.start(0, lambda channel: None)
    found = cluster.join()
    line = "node 1 has not come to 127.0.0.1:%d within 2 s. Start pipedock train there with --node-rank" % cluster.port
    assert isinstance(found[0], RunFailed) and str(found[0]).startswith(line)
    assert isinstance(found[2], RunFailed) and str(found[2]).startswith("node 0 (box0): " + line)
    assert cluster.said[0][0].startswith("waiting at 127.0.0.1:%d for node 1" % cluster.port) and len(cluster.said[0]) == 1


def test_a_node_waits_for_node_0_and_says_what_it_waits_for(quick):
    cluster = Cluster(2, wait_s=1.2)
    cluster.start(1, lambda channel: None)
    error = cluster.join()[1]
    assert isinstance(error, RunFailed)
    assert str(error).startswith("node 0 does not answer at 127.0.0.1:%d within 1 s (Connection refused)." % cluster.port)
    assert cluster.said[1] == ["waiting for node 0 at 127.0.0.1:%d (Connection refused)" % cluster.port]


def test_the_order_of_starting_does_not_matter():
    cluster = Cluster(2)
    cluster.start(1, lambda channel: channel.exchange({"n": 1}))
    time.sleep(0.8)
    cluster.start(0, lambda channel: channel.exchange({"n": 0}))
    assert cluster.join() == {0: [{"n": 0}, {"n": 1}], 1: [{"n": 0}, {"n": 1}]}


def test_launchers_that_do_not_belong_together_are_refused_and_the_right_ones_still_come_in(monkeypatch):
    monkeypatch.setattr(joining, "FIRST_S", 0.2)
    monkeypatch.setattr(joining, "AGAIN_S", 0.2)
    cluster = Cluster(3, wait_s=60.0)
    cluster.start(0, lambda channel: channel.exchange({}))
    cluster.start(1, lambda channel: channel.exchange({}))
    until(lambda: any("has answered, waiting for the other nodes" in line for line in cluster.said[1]))  # not after its twin
    cluster.start(2, lambda channel: None, nodes=4, slot="four")
    cluster.start(1, lambda channel: None, name="twin", slot="twin")
    cluster.threads[2].join(20)
    cluster.threads[3].join(20)
    with knock(cluster.port) as sock:
        link.write_frame(
            sock, {"protocol": joining.PROTOCOL, "node": 5, "nodes": 3, "name": "far\x1b[1m", "command": "pipedock train"}
        )
        assert link.read_frame(sock)[0]["line"] == "node 5 (far?[1m): with --nodes 3, --node-rank is 0 to 2"
    cluster.start(2, lambda channel: channel.exchange({}))
    found = cluster.join()
    assert isinstance(found["four"], UserError)
    assert str(found["four"]) == "node 2 (box2) was started with --nodes 4, node 0 (box0) with --nodes 3"
    assert isinstance(found["twin"], UserError)
    assert str(found["twin"]) == "two launchers are node 1: box1 and twin; give each its own --node-rank"
    assert found[0] == found[1] == found[2] == [{}, {}, {}]
    assert str(found["four"]) in cluster.said[0]


def test_a_refusal_is_not_taken_back_by_what_came_behind_the_hello():
    """Closed with a beat unread, a connection is reset, and over a network what was said last may be lost."""
    cluster = Cluster(2)
    cluster.start(0, lambda channel: channel.exchange({}))
    with knock(cluster.port) as sock:
        hello = {"protocol": joining.PROTOCOL, "node": 7, "nodes": 2, "name": "far", "command": "pipedock train"}
        link.write_frame(sock, hello)
        link.write_frame(sock, {"kind": "beat"})
        assert link.read_frame(sock)[0]["line"] == "node 7 (far): with --nodes 2, --node-rank is 0 to 1"
        with pytest.raises(EOFError):  # not a reset
            link.read_frame(sock)
    cluster.start(1, lambda channel: channel.exchange({}))
    assert cluster.join() == {0: [{}, {}], 1: [{}, {}]}


def test_another_version_is_refused(monkeypatch):
    cluster = Cluster(2, wait_s=2.0)
    cluster.start(0, lambda channel: None)
    with knock(cluster.port) as sock:
        link.write_frame(sock, {"kind": "hello", "protocol": 0, "node": 1, "nodes": 2, "name": "old"})
        answer = link.read_frame(sock)[0]
    assert answer["line"] == "node 1 (old) has another version of pipedock than node 0 (box0)"
    cluster.join()


def until(ready):
    deadline = time.monotonic() + 30
    while not ready():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def knock(port):
    deadline = time.monotonic() + 10
    while True:
        try:
            return socket.create_connection(("127.0.0.1", port), timeout=10)
        except OSError:
            assert time.monotonic() < deadline
            time.sleep(0.05)


def framed(text):
    return link.HEAD.pack(link.MAGIC, len(text), 0) + text


def test_launchers_that_run_something_else_are_refused():
    """Each would wait for messages that the other never sends."""
    cluster, answers = Cluster(2), []
    cluster.start(0, lambda channel: channel.exchange({}))
    for command in ("pipedock gather --input RUN", "x" * 9999):
        with pytest.raises(UserError) as error:
            Channel.open(1, 2, "127.0.0.1", cluster.port, "other", 20.0, answers.append, command=command)
        line = "node 1 (other) runs %s, node 0 (box0) pipedock train; give all nodes the same command"
        assert str(error.value) == line % command[:200]
    cluster.start(1, lambda channel: channel.exchange({}))
    assert cluster.join() == {0: [{}, {}], 1: [{}, {}]}


def test_silent_connections_keep_nobody_out():
    """A monitor that only holds them open: each would be waited for."""
    cluster, began = Cluster(2), time.monotonic()
    cluster.start(0, lambda channel: channel.exchange({}))
    with contextlib.ExitStack() as stack:
        for _ in range(8):
            stack.enter_context(knock(cluster.port))
        cluster.start(1, lambda channel: channel.exchange({}))
        assert cluster.join() == {0: [{}, {}], 1: [{}, {}]}
    assert time.monotonic() - began < 8 * joining.HELLO_S / 2


def test_a_stranger_who_is_slow_is_left(monkeypatch):
    monkeypatch.setattr(joining, "HELLO_S", 0.5)
    cluster = Cluster(2)
    cluster.start(0, lambda channel: channel.exchange({}))
    with knock(cluster.port) as sock:
        sock.sendall(link.HEAD.pack(link.MAGIC, 10**6, 0))
        for _ in range(20):  # a byte now and then, each before a single wait would be over
            with contextlib.suppress(OSError):
                sock.sendall(b" ")
            time.sleep(0.1)
        cluster.start(1, lambda channel: channel.exchange({}))
        assert cluster.join() == {0: [{}, {}], 1: [{}, {}]}


@pytest.mark.parametrize("data", [
    b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"", link.HEAD.pack(link.MAGIC, 2, 0) + b"[]", struct.pack(">4sIQ", b"pdk1", 2**31, 0),
    link.HEAD.pack(link.MAGIC, 2, 0) + b"{}", framed(b'{"protocol":1,"node":1e400,"nodes":2,"name":"x"}'), framed(b"[" * 200000),
], ids=["http", "nothing", "a list", "too long", "empty", "an infinite node", "deep"])  # fmt: skip
def test_strangers_are_ignored(data):
    cluster = Cluster(2)
    cluster.start(0, lambda channel: channel.exchange({}))
    with knock(cluster.port) as sock:
        sock.sendall(data)
        with contextlib.suppress(OSError):  # it is quicker
            sock.shutdown(socket.SHUT_WR)
            assert sock.recv(1) == b""
    cluster.start(1, lambda channel: channel.exchange({}))
    assert cluster.join() == {0: [{}, {}], 1: [{}, {}]}
    assert cluster.said[0] == ["a connection from 127.0.0.1 was no pipedock train; ignored"]


def test_a_node_that_goes_while_others_are_missing_may_come_again():
    cluster = Cluster(3)
    cluster.start(0, lambda channel: channel.names)
    with knock(cluster.port) as sock:
        link.write_frame(sock, {"kind": "hello", "protocol": joining.PROTOCOL, "node": 1, "nodes": 3, "name": "first",
                                "command": "pipedock train"})  # fmt: skip
        link.read_frame(sock)  # a beat: it is in
    until(lambda: "node 1 (first) has gone again" in cluster.said[0])
    cluster.start(1, lambda channel: None, name="second")
    cluster.start(2, lambda channel: None)
    assert cluster.join()[0] == ["box0", "second", "box2"]


def test_a_link_may_be_ended_while_it_starts(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        ours = socket.create_connection(server.getsockname())
        theirs = server.accept()[0]
    one, start = link.Link(ours, 1, "box1", threading.Condition()), threading.Thread.start

    def ended_first(thread):
        one.end({})
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", ended_first)
    one.start()
    theirs.close()


@pytest.mark.parametrize("unread", [False, True])
@pytest.mark.parametrize("victim", [0, 2])
def test_a_closed_connection_is_a_dead_node_on_every_node(victim, unread):
    """``unread``: what the others have sent lies unread when it dies. The kernel then resets the connection."""

    def work(channel):
        if channel.node == victim:
            channel.exchange({})
            channel.closed = True
            for one in channel.links.values():
                if unread:
                    one.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    one.sock.close()
                one.close()  # as the kernel does for a process that is killed
            return None
        channel.exchange({})
        return channel.exchange({})

    found = Cluster(3).run(work)
    for node in {0, 1, 2} - {victim}:
        assert isinstance(found[node], NodeGone) and found[node].node == victim
        assert str(found[node]).startswith("node %d (box%d) is gone: its connection was closed" % (victim, victim))


@pytest.mark.parametrize("victim", [0, 1])
def test_a_silent_node_is_a_dead_node(victim, quick):
    """A pulled cable or a stopped machine: the connection stays, nothing comes."""

    missed, silences = threading.Event(), []

    def work(channel):
        channel.exchange({})
        if channel.node == victim:
            for one in channel.links.values():
                one.quiet.set()
            missed.wait(30)
            return None
        before = channel.silent_for(victim)
        try:
            return channel.exchange({})
        finally:
            missed.set()
            silences.append((before, channel.silent_for(victim)))

    began = time.monotonic()
    found = Cluster(2).run(work)
    error = found[1 - victim]
    assert isinstance(error, NodeGone) and error.node == victim
    line = "node %d (box%d) has not answered for 2 s: it is suspended or overloaded, or the network to it is cut"
    assert str(error) == line % (victim, victim)
    assert silences[0][0] < 1.5 <= silences[0][1] and time.monotonic() - began < 20


def test_a_node_that_was_suspended_says_so_and_blames_nobody(quick, monkeypatch):
    """What it sees on waking is only that the other has left."""

    def work(channel):
        channel.exchange({})
        if channel.node == 0:
            channel.closed = True
            time.sleep(1.0)
            channel.links[1].close()
            return None
        now = link._clock
        monkeypatch.setattr(link, "_clock", lambda: now() + 30.0)
        return channel.exchange({})

    found = Cluster(2).run(work)
    assert isinstance(found[1], NodeGone)
    assert str(found[1]) == "node 0 (box0) has gone on without this machine, where pipedock was suspended for 30 s"


def test_before_node_0_has_answered_nobody_says_that_it_has(quick):
    """The kernel takes connections for a program that is busy."""
    said, port = [], free_port()
    with socket.create_server(("127.0.0.1", port)):
        with pytest.raises(RunFailed):
            Channel.open(1, 3, "127.0.0.1", port, "b", 5.0, said.append)
    assert said[0] == "node 0 (127.0.0.1) is connected to, and has not answered yet"


@pytest.mark.parametrize("error, kind", [(UserError("data.train: no such file"), UserError), (RunFailed("disk full"), RunFailed)])
def test_what_one_node_ends_with_all_end_with(error, kind):
    def work(channel):
        if channel.node == 1:
            raise error
        return channel.exchange({})

    found = Cluster(3).run(work)
    assert found[1] is error
    for node in (0, 2):
        assert type(found[node]) is kind and str(found[node]) == "node 1 (box1): %s" % error


def test_trouble_interrupts_a_launcher_that_is_busy():
    called, events, together = {}, {0: threading.Event(), 2: threading.Event()}, threading.Barrier(3)

    def work(channel):
        if channel.node != 1:
            channel.on_trouble = events[channel.node].set
        channel.exchange({})
        together.wait(20)
        if channel.node == 1:
            raise RunFailed("x")
        called[channel.node] = events[2].wait(10) and events[channel.node].wait(10)  # node 0 tells node 2 though it is busy
        channel.check()

    found = Cluster(3).run(work)
    assert called == {0: True, 2: True} and str(found[0]) == str(found[2]) == "node 1 (box1): x"


def test_a_node_that_has_ended_well_is_no_trouble_but_sends_nothing_more():
    def work(channel):
        if channel.node == 1:
            return None
        time.sleep(0.5)
        channel.check()
        return channel.receive(1)

    found = Cluster(2).run(work)
    assert found[1] is None and str(found[0]) == "node 1 (box1) has ended already"


def test_what_is_too_large_is_refused_before_it_is_sent(monkeypatch):
    monkeypatch.setattr(link, "MOST", 1000)

    def work(channel):
        if channel.node:
            with pytest.raises(ValueError, match="a frame of 2000 bytes is too large, send it in parts of at most 1000"):
                channel.send(0, {}, b"x" * 2000)
        return channel.exchange({})

    assert Cluster(2).run(work)[0] == [{}, {}]


def test_an_address_that_is_not_this_machines_and_a_port_that_is_taken():
    with pytest.raises(UserError, match="^--master-addr 192.0.2.1: is no address of this machine, which is node 0; name one"):
        Channel.open(0, 2, "192.0.2.1", free_port(), "a", 1.0, print)
    with pytest.raises(UserError, match="^--master-addr nowhere.invalid: cannot be looked up: "):
        Channel.open(0, 2, "nowhere.invalid", free_port(), "a", 1.0, print)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen(1)
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match="^--master-port: port %d of 127.0.0.1 cannot be used: Address already in use" % port):
            Channel.open(0, 2, "127.0.0.1", port, "a", 1.0, print)
