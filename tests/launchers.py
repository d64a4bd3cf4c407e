"""Several nodes on this machine: launchers with folders of their own that meet on the loopback interface."""

import signal
import socket
import subprocess
import time
from pathlib import Path

from pipeline_train import manifest
from tests.free_port import free_port
from tests.runs import ENV, START_S, command, has_saved, lines_of, ranks_of

# What keeps a test short: a node that shows nothing is given up after 5 s instead of 20.
QUICK = "import sys; sys.path.insert(0, %r); from pipeline_train import link; link.SILENT_S = 5.0; import pipedock; "
QUICK = QUICK % str(Path(__file__).resolve().parents[1]) + "sys.exit(pipedock.main())"


class Nodes:
    """``folders``: run.out of each node, by number; the same one more than once is a shared disk. ``own``: node -> arguments."""

    started = []  # all of them, for kill_all

    def __init__(self, root, folders, *arguments, own=None, quick=False):
        self.root, self.folders = root, [root / name for name in folders]
        port = free_pair()
        self.processes = []
        self.started.append(self)
        for node, out in enumerate(self.folders):
            line = command("--config", str(root / "run.yaml"), "--set", "run.out=%s" % out, *arguments, *(own or {}).get(node, ()))
            line += [
                "--nodes",
                str(len(folders)),
                "--node-rank",
                str(node),
                "--master-addr",
                "127.0.0.1",
                "--master-port",
                str(port),
            ]
            line[2] = QUICK if quick else line[2]
            with open(str(self._said(node)), "w") as said:
                self.processes.append(subprocess.Popen(line, stdout=said, stderr=said, env=ENV))

    def _said(self, node):
        return self.root / ("said_%s_%d.txt" % (self.folders[0].name, node))

    def said(self, node):
        return self._said(node).read_text()

    def last(self, node):
        return self.said(node).strip().splitlines()[-1]

    def until(self, ready):
        """Wait until ``ready()``; no node may have ended."""
        deadline = time.monotonic() + START_S
        try:
            while not ready():
                assert all(p.poll() is None for p in self.processes) and time.monotonic() < deadline, self.all_said()
                time.sleep(0.01)
        except BaseException:
            self.kill()
            raise
        return self

    def until_saved(self, number):
        return self.until(lambda: all(has_saved(out, number) for out in self.folders))

    def ranks(self, node):
        """rank -> process."""
        return ranks_of(self.processes[node].pid)

    def send(self, node, number):
        self.processes[node].send_signal(number)
        return self

    def codes(self, within_s=START_S):
        """Every node's exit code, once all have ended; no rank may be left."""
        deadline = time.monotonic() + within_s
        found = [self.ranks(node).values() for node, p in enumerate(self.processes) if p.poll() is None]
        try:
            codes = [p.wait(max(0.1, deadline - time.monotonic())) for p in self.processes]
        finally:
            self.kill()
        left = {pid for pids in found for pid in pids}
        while any(Path("/proc/%d" % pid).exists() for pid in left):
            assert time.monotonic() < deadline + 10, "a rank is left"
            time.sleep(0.01)
        return codes

    def kill(self):
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
                process.wait()

    @classmethod
    def kill_all(cls):
        """Of a test that has failed."""
        while cls.started:
            cls.started.pop().kill()

    def all_said(self):
        return "\n".join("---- node %d\n%s" % (node, self.said(node)[-2500:]) for node in range(len(self.processes)))


def free_pair():
    """A port of which the next one is free too."""
    while True:
        port = free_port()
        try:
            socket.create_server(("127.0.0.1", port + 1)).close()
        except OSError:
            continue
        return port


def same_run(wanted_out, folders):
    """The same losses at every step as the run on one node, the same weights and moments at the end, bit by bit, wherever they
    lie."""
    wanted, found = lines_of(wanted_out, "step"), lines_of(folders[0], "step")
    assert sorted(found) == sorted(wanted)
    for step in wanted:
        for key in ("loss", "grad_norm", "lr", "tokens", "epoch"):
            assert found[step][key] == wanted[step][key], (step, key)
    last = sorted((wanted_out / "checkpoints").glob("step_*"))[-1]
    files = [name for name in manifest.read(last)["files"] if name.endswith(".safetensors")]
    assert len(files) >= 10
    for name in files:
        places = [out / "checkpoints" / last.name / name for out in folders]
        there = [path for path in places if path.exists()]
        assert there, name
        for path in there:
            assert path.read_bytes() == (last / name).read_bytes(), path
