"""Starting launchers on other hosts: what travels, by which tool, and every way in which a host cannot take part. A script stands
for ssh; tests/integration/nodes_ssh_lane.py has real ones."""

import os
import shlex
import stat
import subprocess
import sys
import time

import pytest

from pipeline_train import remote
from pipeline_train.errors import RunFailed, UserError
from pipeline_train.hostfile import Host

FAKE = """#!/bin/sh
printf '%s\\n' "$@" >> "$FAKE_LOG"
[ -z "$FAKE_SAYS" ] || printf '%s\\n' "$FAKE_SAYS"
[ -z "$FAKE_CODE" ] || exit "$FAKE_CODE"
for last in "$@"; do :; done
exec sh -c "$last"
"""
HOSTS = [Host("first", 1, "hosts:1"), Host("second", 1, "hosts:2")]


@pytest.fixture
def tools(tmp_path, monkeypatch):
    """A PATH in which ``ssh`` writes down what it is asked and does it here."""
    folder = tmp_path / "tools"
    folder.mkdir()
    (folder / "ssh").write_text(FAKE)
    (folder / "ssh").chmod(0o755)
    for name in ("sh", "env", "printf", "cat", "sleep"):
        path = next(os.path.join(p, name) for p in ("/bin", "/usr/bin") if os.path.exists(os.path.join(p, name)))
        (folder / name).symlink_to(path)
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setenv("FAKE_LOG", str(tmp_path / "asked"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("PDSH_SSH_ARGS_APPEND", raising=False)
    (tmp_path / "home").mkdir()
    (tmp_path / "run").mkdir()
    monkeypatch.chdir(tmp_path / "run")
    return folder


def started(tmp_path, arguments=("train", "--set", "a=b c"), python=None, monkeypatch=None):
    """All remotes, once the one there is has ended."""
    if python is not None:
        monkeypatch.setattr(remote.sys, "executable", python)
    remotes = remote.Remotes(HOSTS, list(arguments), 29500, tmp_path / "logs", lambda line: None)
    remotes.start()
    remotes.all[0].process.wait(30)
    return remotes


def fake_python(tmp_path, text='printf "%s|" "$@"; printf "%s|" "$X" "$PIPEDOCK_JOIN_S"\n'):
    """In the place of Python there: what it is called with, and two variables."""
    path = tmp_path / "it's python"
    path.write_text('#!/bin/sh\n[ "$1" != -c ] || exit 0\n' + text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def test_the_command_its_folder_and_its_variables_arrive_as_they_are(tmp_path, tools, monkeypatch):
    (tmp_path / "run" / ".deepspeed_env").write_text('X=it\'s 100%n  of "$HOME"\n')
    remotes = started(tmp_path, python=fake_python(tmp_path), monkeypatch=monkeypatch)
    assert remotes.all[0].process.returncode == 0
    said = (tmp_path / "logs" / "node_1.log").read_text().split("|")
    assert said[:6] == ["-m", "pipedock", "train", "--set", "a=b c", "--nodes"]
    assert said[6:13] == ["2", "--node-rank", "1", "--master-addr", "first", "--master-port", "29500"]
    assert said[13:15] == ['it\'s 100%n  of "$HOME"', "120"]
    assert (tmp_path / "asked").read_text().splitlines()[:5] == ["-o", "BatchMode=yes", "-o", "ConnectTimeout=20", "second"]


def test_ssh_gets_what_pdsh_would_get(tmp_path, tools, monkeypatch):
    monkeypatch.setenv("PDSH_SSH_ARGS_APPEND", "-p 2222 -i 'my key'")
    started(tmp_path, python=fake_python(tmp_path), monkeypatch=monkeypatch)
    assert (tmp_path / "asked").read_text().splitlines()[:6] == ["-p", "2222", "-i", "my key", "-o", "BatchMode=yes"]


def test_pdsh_is_taken_where_there_is_one(tmp_path, tools, monkeypatch):
    (tools / "pdsh").write_text('#!/bin/sh\nprintf "%s|" "$PDSH_RCMD_TYPE" "$PDSH_SSH_ARGS_APPEND" "$@"\n')
    (tools / "pdsh").chmod(0o755)
    (tmp_path / "home" / ".deepspeed_env").write_text("X=100%n\n")
    monkeypatch.setenv("PDSH_SSH_ARGS_APPEND", "-p 2222")
    remotes = started(tmp_path, python=fake_python(tmp_path), monkeypatch=monkeypatch)
    said = (tmp_path / "logs" / "node_1.log").read_text().split("|")
    assert said[:6] == ["ssh", "-p 2222 -o BatchMode=yes -o ConnectTimeout=20", "-S", "-N", "-w", "second"]
    there = "|".join(said[6:])
    assert "X=100%%n" in there and there.replace("%%", "").count("%") == 0 and not (tmp_path / "asked").exists()
    assert remotes.all[0].process.returncode == 0


@pytest.mark.parametrize("python, message", [
    ("/no/python3", "node 1 (second) has no /no/python3; install pipedock there as it is here. Log: "),
    ("/bin/false", "node 1 (second) has no pipedock for false (/bin/false); install it there as it is here. Log: "),
])  # fmt: skip
def test_a_host_without_pipedock(tmp_path, tools, monkeypatch, python, message):
    remotes = started(tmp_path, python=python, monkeypatch=monkeypatch)
    with pytest.raises(UserError) as error:
        remotes.check()
    assert str(error.value) == message + str(tmp_path / "logs" / "node_1.log")


def test_a_host_without_the_folder(tmp_path, tools, monkeypatch):
    real, away = os.getcwd(), str(tmp_path / "not there")
    monkeypatch.setattr(remote.os, "getcwd", lambda: away)
    remotes = started(tmp_path, python=fake_python(tmp_path), monkeypatch=monkeypatch)
    with pytest.raises(UserError, match="^node 1 .second. has no folder %s, from where this command was started; make" % away):
        remotes.check()
    assert real != away


@pytest.mark.parametrize("says, code, kind, message", [
    ("Permission denied (publickey).", "255", UserError,
     "cannot be logged in to: Permission denied (publickey). `ssh second true` must work without a password"),
    ("", "255", UserError, "cannot be logged in to: ssh has failed. `ssh second true`"),
    ("pipedock train: no such model", "2", UserError, "pipedock train: no such model"),
    ("pipedock train: a disk is full", "1", RunFailed, "pipedock train: a disk is full"),
    ("", "7", RunFailed, "has ended with exit code 7"),
    ("", "0", RunFailed, "has ended with exit code 0"),
    ("no route\npdsh@here: second: ssh exited with exit code 255", "1", UserError, "cannot be logged in to: no route"),
])  # fmt: skip
def test_a_host_that_ends_while_it_is_waited_for(tmp_path, tools, monkeypatch, says, code, kind, message):
    monkeypatch.setenv("FAKE_SAYS", says)
    monkeypatch.setenv("FAKE_CODE", code)
    remotes = started(tmp_path, python=fake_python(tmp_path), monkeypatch=monkeypatch)
    with pytest.raises(kind) as error:
        remotes.check()
    assert str(error.value).startswith("node 1 (second) " + message) and str(error.value).endswith("node_1.log")


def test_a_host_that_goes_on_is_no_trouble_and_ends_with_us(tmp_path, tools, monkeypatch):
    monkeypatch.setattr(remote, "GRACE_S", 0.5)
    python = fake_python(tmp_path, "echo last words; exec sleep 20\n")
    monkeypatch.setattr(remote.sys, "executable", python)
    remotes = remote.Remotes(HOSTS, ["train"], 29500, tmp_path / "logs", lambda line: None)
    remotes.start()
    deadline = time.monotonic() + 20
    while not remotes.all[0].last_line():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    remotes.check()
    assert remotes.last_words(1) == " It said last: last words. Log: %s" % (tmp_path / "logs" / "node_1.log")
    assert remotes.last_words(5) == ""
    remotes.end()
    assert remotes.all[0].process.poll() is not None


def test_no_ssh_at_all(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError) as error:
        remote.Remotes(HOSTS, [], 1, tmp_path, print).start()
    assert str(error.value).startswith("hosts:2: names 2 machines, but this one has no ssh. Install openssh-client, or start")


def test_logs_that_cannot_be_written(tmp_path, tools):
    (tmp_path / "logs").write_text("a file")
    with pytest.raises(UserError, match="^run.out: .*logs: cannot be written: "):
        remote.Remotes(HOSTS, [], 1, tmp_path / "logs", print).start()


def test_the_first_host_is_this_machine():
    remote.check_first(Host("127.0.0.1", 1, "h:1"))
    for name in ("192.0.2.1", "nowhere.invalid"):
        with pytest.raises(UserError, match=r"^h:1: %s is not this machine \(.*\)\. Start the command on the first host" % name):
            remote.check_first(Host(name, 1, "h:1"))


def test_variables_of_home_and_of_this_folder(tmp_path, tools, monkeypatch):
    assert remote.variables() == {}
    (tmp_path / "home" / ".deepspeed_env").write_text("# both\n\nA=1\nB=x=y z\n")
    (tmp_path / "run" / ".deepspeed_env").write_text("A=2\n")
    assert remote.variables() == {"A": "2", "B": "x=y z"}
    (tmp_path / "run" / "mine").write_text("C=3\n")
    monkeypatch.setenv("DS_ENV_FILE", "mine")
    assert remote.variables() == {"C": "3"}


@pytest.mark.parametrize("text", ["export A=1", "A", "1A=2"])
def test_what_is_no_variable_is_named_with_its_line(tmp_path, tools, text):
    (tmp_path / "run" / ".deepspeed_env").write_text("B=1\n%s\n" % text)
    with pytest.raises(UserError) as error:
        remote.variables()
    assert str(error.value) == '.deepspeed_env:2: expected NAME=VALUE, such as "NCCL_DEBUG=INFO"; found %r' % text


def test_the_real_python_has_pipedock(tmp_path):
    """The script that runs there, with what this is."""
    script = remote.REMOTE.format(
        folder=shlex.quote(os.getcwd()), python=shlex.quote(sys.executable), variables="A=1", command="true"
    )
    assert subprocess.run(["sh", "-c", script], stderr=subprocess.PIPE).returncode == 0
