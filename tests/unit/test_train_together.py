"""The command line of training on several nodes: what is refused, what another node's trouble does to a busy launcher, who
gathers."""

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from pipeline_train.control import NodeGone
from pipeline_train.errors import Stopped, UserError
from pipeline_train.hostfile import Host
from pipeline_train.place import Node, Place
from verbs import together

ROOT = Path(__file__).resolve().parents[2]


def parsed(*arguments):
    parser = argparse.ArgumentParser()
    together.add(parser)
    return parser.parse_args(list(arguments))


@pytest.mark.parametrize("more, message", [
    (["--nodes", "2"], "--hostfile: starts the other nodes itself; leave out --nodes, or start every node yourself without it"),
    (["--node-rank", "1"], "--hostfile: says which nodes there are; leave out --node-rank and --master-addr"),
    (["--master-addr", "a"], "--hostfile: says which nodes there are"),
])  # fmt: skip
def test_nodes_are_named_in_one_way(tmp_path, more, message):
    (tmp_path / "hosts").write_text("a slots=1\nb slots=1\n")
    args = parsed("--hostfile", str(tmp_path / "hosts"), *more)
    with pytest.raises(UserError) as error:
        together.request_of(args, together.hosts_of(args))
    assert str(error.value).startswith(message)


def test_what_the_hostfile_asks_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("FROM_FILE", "old")
    (tmp_path / ".deepspeed_env").write_text("FROM_FILE=new\n")
    hosts = [Host("127.0.0.1", 1, "h:1"), Host("b", 1, "h:2")]
    assert together.request_of(parsed("--hostfile", "h"), hosts[:1]) is None and os.environ["FROM_FILE"] == "old"
    assert together.request_of(parsed("--hostfile", "h"), hosts) == (0, 2, "127.0.0.1", 29500, hosts)
    assert together.request_of(parsed("--hostfile", "h", "--master-port", "7"), hosts).port == 7
    assert os.environ["FROM_FILE"] == "new"  # node 0 has what the others get
    with pytest.raises(UserError, match="^h:1: 192.0.2.1 is not this machine"):
        together.request_of(parsed("--hostfile", "h"), [Host("192.0.2.1", 1, "h:1"), hosts[1]])


@pytest.mark.parametrize("resume, found", [(None, []), ("newest", ["--resume"]), ("auto", ["--resume", "auto"])])
def test_the_other_hosts_get_the_same_arguments(resume, found):
    args = argparse.Namespace(config="run.yaml", set=["a=1", "b=x y"], resume=resume, allow_changed_data=resume == "auto")
    wanted = ["--config", "run.yaml", "--set", "a=1", "--set", "b=x y"] + found
    assert together._same_everywhere(args) == wanted + (["--allow-changed-data"] if resume == "auto" else [])


class Channel:
    """As much of one as the verbs touch. ``told``: what node 0 shares."""

    node, nodes, trouble, closed = 1, 2, None, False
    told = {"wanted": True}

    def check(self):
        if self.trouble is not None:
            raise self.trouble

    def exchange(self, document):
        return [self.told, document]

    def close(self, error=None):
        self.closed = True


class Party:
    def __init__(self, shared=False):
        self.channel, self.place = Channel(), Place(1, (Node("a", (0,)), Node("b", (1,))), shared)

    def share(self, document=None):
        return self.channel.exchange(document)[0]


def test_trouble_elsewhere_interrupts_what_this_launcher_does():
    party, calm = Party(), together.Calm()

    def trouble():
        party.channel.trouble = NodeGone(0, "node 0 (a) is gone")
        party.channel.on_trouble()

    with calm.kept():
        calm.watch(party)
        threading.Timer(0.3, trouble).start()
        began = time.monotonic()
        with pytest.raises(NodeGone, match=r"^node 0 \(a\) is gone$"):
            time.sleep(30)
        assert time.monotonic() - began < 10


def test_a_signal_of_the_user_is_still_one():
    calm = together.Calm()
    with calm.kept(), pytest.raises(Stopped, match="^stopped by SIGTERM$"):
        calm.watch(Party())
        os.kill(os.getpid(), 15)
        time.sleep(30)


def entered(monkeypatch, calm, party):
    """together.joined on node 1 of 2, without anybody to join."""
    from pipeline_train import nodes

    monkeypatch.setattr(nodes.Party, "join", lambda *args: party)
    args = parsed("--nodes", "2", "--node-rank", "1", "--master-addr", "127.0.0.1")
    args.config, args.set, args.resume, args.allow_changed_data = "run.yaml", [], None, False
    return together.joined(args, argparse.Namespace(run=argparse.Namespace(out="o"), world=2), None, calm)


def test_a_library_cannot_hide_what_has_ended_the_command(monkeypatch):
    """transformers makes a ModuleNotFoundError of anything that is raised while it imports."""
    party, calm = Party(), together.Calm()
    with calm.kept(), pytest.raises(NodeGone, match=r"^node 0 \(a\) is gone$") as raised:
        with entered(monkeypatch, calm, party):
            party.channel.trouble = NodeGone(0, "node 0 (a) is gone")
            try:
                os.kill(os.getpid(), 15)
                time.sleep(30)
            except NodeGone:
                raise ModuleNotFoundError("Could not import module 'AutoTokenizer'") from None
    assert raised.value.__suppress_context__ and party.channel.closed


def test_errors_of_this_node_s_own_stay(monkeypatch):
    party, calm = Party(), together.Calm()
    with calm.kept(), pytest.raises(UserError, match="^mine$"), entered(monkeypatch, calm, party):
        raise UserError("mine")


def test_a_layout_that_cannot_be_shared_waits_for_nobody(monkeypatch):
    from pipeline_train import nodes

    monkeypatch.setattr(nodes.Party, "join", lambda *args: pytest.fail("waits"))
    args = parsed("--nodes", "3", "--node-rank", "0", "--master-addr", "127.0.0.1")
    config = argparse.Namespace(run=argparse.Namespace(out="o"), world=2)
    with pytest.raises(UserError, match="^parallel: pipe x data needs 2 processes, which 3 nodes cannot share equally"):
        with together.joined(args, config, None, together.Calm()):
            pass


@pytest.mark.parametrize("shared, wanted, gathered", [(False, True, True), (True, True, False), (False, False, False)])
def test_files_are_gathered_for_an_export_where_no_disk_is_shared(monkeypatch, tmp_path, shared, wanted, gathered):
    from pipeline_train import gather

    calls = []
    monkeypatch.setattr(gather, "bring", lambda channel, path, say, optimizer: calls.append((path, optimizer)))
    party = Party(shared)
    party.channel.told = {"wanted": wanted}
    together.bring(party, argparse.Namespace(out=tmp_path), False)
    assert calls == ([(tmp_path, False)] if gathered else []) and party.channel.closed
    together.bring(None, None, True)


def test_a_host_that_is_gone_may_have_said_why():
    class Remotes:
        def last_words(self, node):
            return " It said last: disk full. Log: node_%d.log" % node

    error = NodeGone(1, "node 1 (b) is gone")
    together._add_last_words(error, Remotes())
    assert str(error) == "node 1 (b) is gone. It said last: disk full. Log: node_1.log"


@pytest.mark.parametrize("arguments, message", [
    (["--nodes", "2"], "--nodes 2: needs --node-rank (0 to 1, another one on every node) and --master-addr (node 0's address)"),
    (["--node-rank", "1"], "--node-rank: goes with --nodes, the number of machines"),
])  # fmt: skip
def test_the_command_refuses_in_one_line(tmp_path, arguments, message):
    run = {"run": {"out": str(tmp_path / "out")}, "model": {"path": "m"}, "data": {"train": "t"}, "parallel": {"pipe": 2}}
    (tmp_path / "run.yaml").write_text(json.dumps(run))
    line = [sys.executable, str(ROOT / "pipedock.py"), "train", "--config", str(tmp_path / "run.yaml")] + arguments
    done = subprocess.run(line, capture_output=True, text=True, cwd=str(ROOT))
    assert done.returncode == 2 and done.stderr.splitlines()[-1] == "pipedock train: " + message
    assert not (tmp_path / "out").exists()
