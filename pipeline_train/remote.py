"""The launchers of a hostfile's other hosts: started by pdsh over ssh, or by ssh where there is no pdsh. Standard library only.

Each host gets the command that its user could type there (--nodes, --node-rank, --master-addr), in the same folder, with the
variables of ``.deepspeed_env``. What it says goes into a file of its own. A host's launcher ends by itself when node 0's is gone.
"""

import contextlib
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Callable, Dict, List, NamedTuple, Tuple

from .errors import RunFailed, UserError
from .hostfile import Host

Say = Callable[[str], None]  # takes a line for the user

ENV_FILE = ".deepspeed_env"
SSH_ARGS = "PDSH_SSH_ARGS_APPEND"  # pdsh's own variable, for a port or a key; ssh without pdsh gets it too
SSH_OPTIONS = "-o BatchMode=yes -o ConnectTimeout=20"  # behind the user's, which win
NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
JOIN_S = 120  # node 0 listens already when the others are started
NO_FOLDER, NO_PYTHON, NO_PIPEDOCK, NO_LOGIN = 91, 92, 93, 255  # exit codes of REMOTE; ssh's own
GRACE_S = 15.0  # for the other hosts to end by themselves
# The user's shell there may be any: everything is done by sh.
REMOTE = (
    "cd {folder} 2>/dev/null || exit 91; test -x {python} || exit 92; {python} -c 'import pipedock' 2>/dev/null || exit 93; "
    "exec env {variables} {command}"
)


def variables() -> Dict[str, str]:
    """The NAME=VALUE lines of .deepspeed_env in the home folder, and of the one in this folder, which win; $DS_ENV_FILE names
    another file name, as in DeepSpeed. Raises UserError naming the line."""
    found: Dict[str, str] = {}
    name = os.environ.get("DS_ENV_FILE", ENV_FILE)
    for folder in (os.path.expanduser("~"), "."):
        path = Path(folder) / name
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except FileNotFoundError:
            continue
        except (OSError, UnicodeDecodeError) as error:
            raise UserError("%s: cannot be read: %s" % (path, getattr(error, "strerror", None) or error)) from None
        for number, line in enumerate(lines, 1):
            text = line.strip()
            if not text or text.startswith("#"):
                continue
            key, equals, value = text.partition("=")
            if not equals or not NAME.fullmatch(key):
                raise UserError('%s:%d: expected NAME=VALUE, such as "NCCL_DEBUG=INFO"; found %.60r' % (path, number, text))
            found[key] = value
    return found


def check_first(host: Host) -> None:
    """Whether the first host is this machine. Raises UserError."""
    try:
        family, _, _, _, place = socket.getaddrinfo(host.name, 0, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.bind(place)
    except OSError:
        raise UserError("%s: %s is not this machine (%s). Start the command on the first host of the hostfile, or name this "
                        "one first" % (host.where, host.name, os.uname().nodename)) from None  # fmt: skip


class Remote(NamedTuple):
    """One other host's launcher, seen from here."""

    node: int
    host: Host
    process: "subprocess.Popen[bytes]"
    log: Path

    def named(self) -> str:
        return "node %d (%s)" % (self.node, self.host.name)

    def trouble(self, code: int) -> str:
        """Why it has ended with this exit code."""
        last, python = self.last_line(), os.path.basename(_python())
        ssh = " ".join(["ssh"] + _ssh_options() + [self.host.name])
        if code == NO_LOGIN:
            return "cannot be logged in to: %s. `%s true` must work without a password" % (
                last.rstrip(".") or "ssh has failed",
                ssh,
            )
        if code == NO_FOLDER:
            return "has no folder %s, from where this command was started; make it the same there" % os.getcwd()
        if code == NO_PYTHON:
            return "has no %s; install pipedock there as it is here" % _python()
        if code == NO_PIPEDOCK:
            return "has no pipedock for %s (%s); install it there as it is here" % (python, _python())
        return last or "has ended with exit code %d" % code

    def last_line(self) -> str:
        """What it said last, without what pdsh says about it."""
        try:
            lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:
            return ""
        said = [line.strip() for line in lines if line.strip() and not line.startswith("pdsh@")]
        line = said[-1] if said else ""
        return line[len(self.host.name) + 2 :] if line.startswith(self.host.name + ": ") else line


class Remotes:
    """All of them. ``arguments``: the verb and what it gets on every node."""

    def __init__(self, hosts: List[Host], arguments: List[str], port: int, logs: Path, say: Say) -> None:
        self.hosts, self.arguments, self.port, self.logs, self.say = hosts, arguments, port, logs, say
        self.all: List[Remote] = []

    def start(self) -> None:
        """Raises UserError when there is no ssh, or no place for the logs."""
        if shutil.which("ssh") is None:
            raise UserError("%s: names %d machines, but this one has no ssh. Install openssh-client, or start every node yourself "
                            "with --nodes, --node-rank and --master-addr" % (self.hosts[1].where, len(self.hosts)))  # fmt: skip
        exported = dict(variables(), PIPEDOCK_JOIN_S=str(JOIN_S))
        tool = "pdsh" if shutil.which("pdsh") else "ssh"
        for node, host in list(enumerate(self.hosts))[1:]:
            log = self.logs / ("node_%d.log" % node)
            line, env = self._line(tool, node, host, exported)
            try:
                self.logs.mkdir(parents=True, exist_ok=True)
                with open(str(log), "wb") as file:
                    process = subprocess.Popen(line, env=env, stdin=subprocess.DEVNULL, stdout=file, stderr=file)
            except OSError as error:
                raise UserError("run.out: %s: cannot be written: %s" % (error.filename or log, error.strerror)) from None
            self.all.append(Remote(node, host, process, log))
        names = ", ".join(host.name for host in self.hosts[1:])
        self.say("started on %s by %s; what they say: %s" % (names, tool, self.logs / "node_*.log"))

    def _line(self, tool: str, node: int, host: Host, exported: Dict[str, str]) -> Tuple[List[str], Dict[str, str]]:
        command = [_python(), "-m", "pipedock"] + self.arguments
        command += ["--nodes", str(len(self.hosts)), "--node-rank", str(node)]
        command += ["--master-addr", self.hosts[0].name, "--master-port", str(self.port)]
        script = REMOTE.format(
            folder=shlex.quote(os.getcwd()), python=shlex.quote(_python()), command=_quoted(command),
            variables=_quoted(["%s=%s" % pair for pair in exported.items()]),
        )  # fmt: skip
        there = "sh -c " + shlex.quote(script)
        if tool == "ssh":
            return ["ssh"] + _ssh_options() + shlex.split(SSH_OPTIONS) + [host.name, there], dict(os.environ)
        env = dict(os.environ, PDSH_RCMD_TYPE="ssh")
        env[SSH_ARGS] = ("%s %s" % (os.environ.get(SSH_ARGS, ""), SSH_OPTIONS)).strip()
        return ["pdsh", "-S", "-N", "-w", host.name, there.replace("%", "%%")], env

    def check(self) -> None:
        """While node 0 waits for them to come. Raises UserError or RunFailed for one that has ended."""
        for remote in self.all:
            code = remote.process.poll()
            if code is not None:
                code = NO_LOGIN if code and "exited with exit code 255" in _text(remote.log) else code
                line = "%s %s. Log: %s" % (remote.named(), remote.trouble(code), remote.log)
                raise (UserError if code in (2, NO_FOLDER, NO_PYTHON, NO_PIPEDOCK, NO_LOGIN) else RunFailed)(line)

    def last_words(self, node: int) -> str:
        """What that node said last, for the line about its end."""
        remote = next((one for one in self.all if one.node == node), None)
        said = remote.last_line() if remote is not None else ""
        return " It said last: %s. Log: %s" % (said.rstrip("."), remote.log) if said and remote is not None else ""

    def end(self) -> None:
        """When this launcher has left the channel: the others end by themselves; then nothing of ours is left here."""
        until = time.monotonic() + GRACE_S
        for remote in self.all:
            with contextlib.suppress(subprocess.TimeoutExpired):
                remote.process.wait(max(0.0, until - time.monotonic()))
            if remote.process.poll() is None:
                remote.process.kill()
            remote.process.wait()


def _python() -> str:
    """The interpreter that runs this, by the path that leads into its environment."""
    return sys.executable


def _ssh_options() -> List[str]:
    return shlex.split(os.environ.get(SSH_ARGS, ""))


def _quoted(words: List[str]) -> str:
    return " ".join(shlex.quote(word) for word in words)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
