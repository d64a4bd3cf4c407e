"""A hostfile with two hosts, both this machine, over an sshd of the test's own; for ci/nodes.sh."""

import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.launchers import free_pair
from tests.runs import ENV, START_S, command, has_saved, make, same_end, train
from tests.sshd import SSHD, sshd

pytestmark = pytest.mark.skipif(SSHD is None or shutil.which("ssh") is None, reason="no openssh-server and ssh here")
TOOLS = [pytest.param(True, marks=pytest.mark.skipif(shutil.which("pdsh") is None, reason="no pdsh here")), False]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A finished run on one node in root/out; root/env holds what ssh needs."""
    root = tmp_path_factory.mktemp("ssh")
    make(root, parallel={"pipe": 2}, batch={"global": 6}, optim={"lr": 1e-3, "warmup": 2},
         train={"epochs": 2, "save_every": 3, "keep": 3})  # fmt: skip
    done = train(root)
    assert done.returncode == 0, done.stderr[-2000:]
    (root / "hosts").write_text("127.0.0.1 slots=1\nlocalhost slots=1\n")
    (root / "tools").mkdir()
    for name in ("ssh", "sh"):  # a PATH without pdsh
        (root / "tools" / name).symlink_to(shutil.which(name))
    with sshd(root / "sshd") as arguments:
        (root / "arguments").write_text(arguments)
        yield root


def start(root, out, *more, pdsh=True, arguments=None, hosts="hosts"):
    """One command; in the run's folder lies a .deepspeed_env, which the other host needs: DS_ACCELERATOR does not travel."""
    (root / ".deepspeed_env").write_text("DS_ACCELERATOR=cpu\nOMP_NUM_THREADS=1\nPIPEDOCK_TEST=it's 100%n\n")
    line = command("--config", str(root / "run.yaml"), "--set", "run.out=%s" % (root / out), "--hostfile", str(root / hosts))
    line += ["--master-port", str(free_pair())] + list(more)
    env = dict(ENV, PDSH_SSH_ARGS_APPEND=arguments or (root / "arguments").read_text())
    env["PYTHONPATH"] = str(Path(__file__).resolve().parents[2])  # for node 0; the other host finds an installed pipedock
    if not pdsh:
        env["PATH"] = str(root / "tools")
    with open(str(root / (out + ".txt")), "w") as said:
        return subprocess.Popen(line, stdout=said, stderr=said, env=env, cwd=str(root))


def launchers(root, out):
    """Processes that train into this folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:
            continue
        if b"python" in words[0] and any(str(root / out).encode() in word for word in words):
            found.append(int(path.parent.name))
    return found


def nothing_left(root, out, within_s=60):
    deadline = time.monotonic() + within_s
    while launchers(root, out):
        assert time.monotonic() < deadline, launchers(root, out)
        time.sleep(0.1)


@pytest.mark.parametrize("pdsh", TOOLS)
def test_the_first_host_starts_the_other_and_they_train_as_one(root, pdsh):
    out = "pdsh" if pdsh else "ssh"
    assert start(root, out, pdsh=pdsh).wait(START_S) == 0, (root / (out + ".txt")).read_text()
    same_end(root / "out", root / out)
    said, other = (root / (out + ".txt")).read_text(), (root / out / "logs" / "node_1.log").read_text()
    assert "started on localhost by %s; " % out in said and "node 1 (localhost) of 2: " in other
    nothing_left(root, out, 10)


@pytest.mark.parametrize("pdsh", TOOLS)
def test_killing_the_command_leaves_nothing_on_the_other_host(root, pdsh):
    out = "killed%d" % pdsh
    process = start(root, out, "--set", "train.epochs=200", pdsh=pdsh)
    deadline = time.monotonic() + START_S
    while not has_saved(root / out, 3):
        assert process.poll() is None and time.monotonic() < deadline, (root / (out + ".txt")).read_text()
        time.sleep(0.05)
    found = launchers(root, out)
    assert len(found) >= 4  # two launchers, two ranks
    assert all(b"PIPEDOCK_TEST=it's 100%n" in Path("/proc/%d/environ" % pid).read_bytes().split(b"\0") for pid in found[1:])
    process.send_signal(signal.SIGKILL)
    process.wait()
    nothing_left(root, out)
    assert "pipedock train: node 0 (127.0.0.1) is gone" in (root / out / "logs" / "node_1.log").read_text()


@pytest.mark.parametrize("pdsh", TOOLS)
def test_what_is_wrong_with_a_host_is_one_line(root, pdsh):
    for out, arguments, words in (
        ("login%d" % pdsh, "-p 2 -o ConnectTimeout=2", ["cannot be logged in to", "Connection refused", "`ssh -p 2"]),
        ("key%d" % pdsh, (root / "arguments").read_text() + " -o PubkeyAuthentication=no", ["cannot be logged in to", "denied"]),
    ):  # fmt: skip
        process = start(root, out, pdsh=pdsh, arguments=arguments)
        assert process.wait(60) == 2
        last = (root / (out + ".txt")).read_text().strip().splitlines()[-1]
        assert last.startswith("pipedock train: node 1 (localhost) ") and all(word in last for word in words), last
        assert "must work without a password" in last and last.endswith("node_1.log"), last
