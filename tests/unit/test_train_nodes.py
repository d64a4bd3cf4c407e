"""How several launchers become one run: the command line, who gets which ranks, one folder or many, and every refusal. Threads
on the loopback interface for nodes."""

import os
import threading
import time

import pytest

from pipeline_train import config, nodes, run_folder
from pipeline_train.control import Channel
from pipeline_train.errors import RunFailed, UserError
from pipeline_train.hostfile import Host
from pipeline_train.nodes import Party, Request
from pipeline_train.place import Place
from tests.launchers import free_pair


@pytest.mark.parametrize("given, message", [
    ((None, 0, None, None), "--node-rank: goes with --nodes, the number of machines"),
    ((None, None, "a", None), "--master-addr: goes with --nodes"),
    ((None, None, None, 1), "--master-port: goes with --nodes"),
    ((0, 0, "a", None), "--nodes 0: must be at least 1"),
    ((2, None, "a", None), "--nodes 2: needs --node-rank (0 to 1, another one on every node) and --master-addr (node 0's address)"),
    ((2, 0, None, None), "--nodes 2: needs --node-rank"),
    ((2, 2, "a", None), "--node-rank 2: with --nodes 2 it is one of 0 to 1"),
    ((2, -1, "a", None), "--node-rank -1: with"),
    ((2, 0, "a", 65535), "--master-port 65535: must be one of 1 to 65534; the one above it is used too"),
])  # fmt: skip
def test_what_the_command_line_leaves_out_is_said(given, message):
    with pytest.raises(UserError) as error:
        nodes.request(*given)
    assert str(error.value).startswith(message)


def test_what_the_command_line_says():
    assert nodes.request(None, None, None, None) is None
    assert nodes.request(1, 0, "a", None) is None
    assert nodes.request(3, 2, "a", None) == Request(2, 3, "a", 29500, None)
    assert nodes.request(3, 0, "a", 7) == Request(0, 3, "a", 7, None)


def hosts(*slots):
    return [Host("box%d" % n, count, "h:%d" % (n + 1)) for n, count in enumerate(slots)]


def test_every_node_gets_as_many_ranks_or_its_slots():
    assert nodes.counts(8, 2, None) == [4, 4]
    assert nodes.counts(8, 2, hosts(6, 2)) == [6, 2]
    assert nodes.counts(8, 2, hosts(8, 8)) == [4, 4]


@pytest.mark.parametrize("world, count, slots, message", [
    (3, 2, None, "parallel: pipe x data needs 3 processes, which 2 nodes cannot share equally. Change --nodes or parallel, or give "
                 "a hostfile with 3 slots in all"),
    (8, 2, (6, 3), "h:2: box1 has slots=3, but parallel: pipe x data needs 8 processes, 4 on each of 2 nodes. Raise the slots"),
])  # fmt: skip
def test_ranks_that_cannot_be_shared_out(world, count, slots, message):
    with pytest.raises(UserError) as error:
        nodes.counts(world, count, hosts(*slots) if slots else None)
    assert str(error.value).startswith(message)


def run_of(tmp_path, **sections):
    raw = {"run": {"out": str(tmp_path / "out")}, "model": {"path": "m"}, "data": {"train": "t"}, "parallel": {"pipe": 2}}
    raw.update(sections)
    return config.parse(raw)


class Meeting:
    """``work(party)`` on two nodes; ``runs``: each one's configuration."""

    def __init__(self, runs, work, hostfile=None):
        self.results, self.said = {}, {0: [], 1: []}
        port = free_pair()
        threads = [threading.Thread(target=self._node, args=(n, run, work, port, hostfile)) for n, run in enumerate(runs)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
            assert not thread.is_alive()

    def _node(self, node, run, work, port, hostfile):
        request = Request(node, 2, "127.0.0.1", port, hostfile if node == 0 else None)
        try:
            party = Party.join(request, run, self.said[node].append)
            try:
                self.results[node] = work(party)
            except Exception as error:
                party.channel.close(error)
                raise
            party.channel.close()
        except Exception as error:  # noqa: BLE001 - the test looks at it
            self.results[node] = error


def test_the_nodes_agree_who_has_what_and_what_time_it_is(tmp_path):
    run = run_of(tmp_path)
    found = Meeting([run, run], lambda party: (party.place, party.now, party.share({"node": party.place.node})))
    place = found.results[0][0]
    assert [node.ranks for node in place.nodes] == [(0,), (1,)] and place.nodes[0].name == os.uname().nodename
    assert found.results[1] == (place._replace(node=1), found.results[0][1], {"node": 0})
    assert found.said[1] == ["node 1 (%s) of 2: %s has rank 0; %s has rank 1" % ((place.nodes[0].name,) * 3)]


def test_a_hostfile_gives_names_and_slots(tmp_path):
    run = run_of(tmp_path, parallel={"pipe": 4}, batch={"global": 4})
    found = Meeting([run, run], lambda party: (party.place, party.channel.named(1)), hosts(3, 1))
    assert found.results[1][0].nodes == (("box0", (0, 1, 2)), ("box1", (3,))) and found.results[1][1] == "node 1 (box1)"
    assert found.said[0] == ["node 0 (box0) of 2: box0 has ranks 0 to 2; box1 has rank 3"]


def test_other_configurations_are_a_line_each_on_both(tmp_path):
    runs = [run_of(tmp_path, optim={"lr": lr}, train={"epochs": epochs}) for lr, epochs in ((1e-3, 1), (2e-3, 2))]
    found = Meeting(runs, lambda party: None).results
    for node in (0, 1):
        assert isinstance(found[node], UserError)
        lines = str(found[node]).splitlines()
        assert len(lines) == 2 and "config differs between the nodes: optim.lr: 0.001 on node 0 (" in lines[0]
        assert "config differs between the nodes: train.epochs: 1 on node 0 (" in lines[1]


def test_ranks_that_do_not_divide_end_both(tmp_path):
    run = run_of(tmp_path, parallel={"pipe": 3}, batch={"global": 3})
    found = Meeting([run, run], lambda party: None).results
    assert str(found[0]).startswith("parallel: pipe x data needs 3 processes, which 2 nodes")
    assert isinstance(found[1], UserError) and str(found[1]).startswith("node 0 (") and str(found[0]) in str(found[1])


@pytest.mark.parametrize("names, shared", [(("out", "out"), True), (("a", "b"), False)])
def test_whether_the_folder_is_one_is_found_out(tmp_path, names, shared):
    def work(party):
        out = tmp_path / names[party.place.node]
        party.open_folder(out, "run.yaml")
        party.share()  # node 0 has taken its file away
        return party.place.shared, party.follows, sorted(path.name for path in out.iterdir())

    found = Meeting([run_of(tmp_path)] * 2, work).results
    assert found == {0: (shared, False, [".lock"]), 1: (shared, shared, [".lock"])}
    assert [str((tmp_path / name).resolve()) in run_folder._locks for name in names] == [True, True]


def test_one_node_that_sees_the_folder_and_one_that_does_not(tmp_path):
    class Three:
        """Node 0's view of three nodes, of which node 1 sees its folder."""

        nodes, node, names = 3, 0, ["a", "b", "c"]

        def exchange(self, document):
            return [document, {"token": "", "sees": True}, {"token": "", "sees": False}]

        named = Channel.named

    place = Place(0, tuple(nodes._numbered(["a", "b", "c"], [1, 1, 1])), True)
    party = Party(Request(0, 3, "a"), Three(), place, "", print)
    with pytest.raises(UserError) as error:
        party.open_folder(tmp_path / "out", "run.yaml")
    said = "run.out: %s: node 1 (b) sees the folder of node 0, node 2 (c) does not; let all of them see it, or none"
    assert str(error.value) == said % (tmp_path / "out")


def test_a_folder_that_one_node_cannot_have_ends_both(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "letter.txt").touch()
    found = Meeting([run_of(tmp_path)] * 2, lambda party: party.open_folder(tmp_path / "ab"[party.place.node], "run.yaml")
                    or party.channel.exchange({})).results  # fmt: skip
    assert "run.out: %s: holds other files (letter.txt)" % (tmp_path / "b") in str(found[1])
    assert isinstance(found[0], UserError) and str(found[0]).startswith("node 1 (") and "letter.txt" in str(found[0])


def test_a_node_without_gpus_among_others_is_named(tmp_path):
    found = Meeting([run_of(tmp_path)] * 2, lambda party: party.check_device(party.place.node)).results
    for node in (0, 1):
        assert isinstance(found[node], UserError)
        words = str(found[node])
        assert words.startswith("node 1 (") and ") trains on GPUs, node 0 (" in words and "has none that torch can use" in words
    assert Meeting([run_of(tmp_path)] * 2, lambda party: party.check_device(2)).results == {0: None, 1: None}


def test_where_the_ranks_meet(tmp_path, monkeypatch):
    monkeypatch.delenv("NCCL_SOCKET_IFNAME", raising=False)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "mine0")
    found = Meeting([run_of(tmp_path)] * 2, lambda party: (party.request.port, party.addresses()))
    port, addresses = found.results[1]
    assert addresses == {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "NCCL_SOCKET_IFNAME": "lo"}
    assert "NCCL_SOCKET_IFNAME=lo, by the route to 127.0.0.1" in found.said[1]


def test_how_long_to_wait_can_be_said(monkeypatch):
    monkeypatch.setenv(nodes.WAIT, "7")
    assert nodes._patience() == 7.0
    monkeypatch.setenv(nodes.WAIT, "soon")
    with pytest.raises(UserError, match="^PIPEDOCK_JOIN_S: must be whole seconds, got 'soon'$"):
        nodes._patience()


def test_what_node_0_has_written_is_waited_for(tmp_path):
    path = tmp_path / "run.yaml"
    threading.Timer(0.5, lambda: path.write_text("new")).start()
    nodes.wait_for(path, "new", lambda path: path.read_text(), 10.0)
    began = time.monotonic()
    with pytest.raises(RunFailed, match="run.yaml: is not what node 0 has written 1 s ago; is it really the same folder"):
        nodes.wait_for(path, "newer", lambda path: path.read_text(), 1.0)
    assert time.monotonic() - began < 8
