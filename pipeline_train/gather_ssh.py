"""Brings the files of a checkpoint from the nodes that have them by rsync over ssh, or by ssh alone where there is no rsync.

On any node that has its own part; every file is fetched from the first node of its list that answers. What rsync had of a file
when it was cut short stays in <checkpoint>/.gather-rsync, so the same command goes on there. A file gets its name when its size
and sha256 are right.
"""

import contextlib
import os
import shlex
import shutil
import stat
import subprocess
import time
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional

from . import arrival, checkpoint_folder, host, hostfile, manifest, manifest_where, remote
from .arrival import ASIDE, PIECE, Arrival
from .errors import RunFailed, UserError

Say = Callable[[str], None]  # takes a line for the user
ALIVE = ["-o", "ServerAliveInterval=15"]  # a node that dies meanwhile is noticed within a minute
NO_CONNECTION = 255  # ssh's exit code, and rsync's when ssh had it
NO_RSYNC = (12, 127)  # rsync's exit codes when the other end has none


def fetch(path: Path, hosts_file: Path, say: Say, optimizer: bool = True) -> Dict[str, Any]:
    """Complete the checkpoint that ``path`` (a run or a checkpoint) means on this node. ``hosts_file``: DeepSpeed's; a node is the
    host of its name, or of its number if there are as many hosts as nodes. The folders have the same path everywhere; ssh takes
    the user's own settings and PDSH_SSH_ARGS_APPEND. ``optimizer``: False leaves out what only a resume reads.

    -> {"checkpoint", "step", "files", "bytes", "seconds"}. Raises UserError; RunFailed with the first host's line when a file is
    on no host that answers."""
    began = time.monotonic()
    hosts = [found.name for found in hostfile.read(hosts_file)]
    folder = manifest.find_checkpoint(path)
    document = manifest.parse(folder)
    names = arrival.lacking(folder, document, optimizer)
    if names:
        arrival.check_room(folder, document, names)
        _Fetch(folder, document, hosts_of(document, hosts, hosts_file, folder / names[0]), say).all_of(names)
    return {
        "checkpoint": str(folder), "step": document["step"], "files": len(names),
        "bytes": sum(document["files"][name]["size"] for name in names), "seconds": round(time.monotonic() - began, 3),
    }  # fmt: skip


def hosts_of(document: Dict[str, Any], hosts: List[str], hosts_file: Path, missing: Path) -> List[str]:
    """The host of each node that the manifest names. Raises UserError naming one that the hostfile does not have, or the file
    ``missing`` when the manifest names no nodes."""
    if "where" not in document:
        raise UserError("%s: missing, and manifest.json does not say where it is; use another checkpoint" % missing)
    nodes = document["where"]["nodes"]
    if not set(nodes) <= set(hosts) and len(hosts) != len(nodes):
        number = next(number for number, name in enumerate(nodes) if name not in hosts)
        raise UserError("%s: does not name node %d (%s) of the checkpoint; add it, or list the hosts of all %d nodes in their order"
                        % (hosts_file, number, nodes[number], len(nodes)))  # fmt: skip
    return list(nodes) if set(nodes) <= set(hosts) else hosts


class _Fetch:
    """``hosts``: by node."""

    def __init__(self, folder: Path, document: Dict[str, Any], hosts: List[str], say: Say) -> None:
        self.folder, self.document, self.hosts, self.say = folder, document, hosts, say
        self.there = os.path.abspath(str(folder))  # not resolved: a link may lead elsewhere on another node
        self.ssh = ["ssh"] + shlex.split(os.environ.get(remote.SSH_ARGS, "")) + shlex.split(remote.SSH_OPTIONS) + ALIVE
        self.aside = folder / (ASIDE + "rsync")

    def all_of(self, names: List[str]) -> None:
        """From the first of each file's nodes that has it. Raises RunFailed."""
        failed: Optional[RunFailed] = None
        left, where = list(names), self.document["where"]["files"]
        here = manifest_where.node_of(self.folder, self.document)
        for node in [node for node in range(len(self.hosts)) if node != here]:
            mine = [name for name in left if node in where[name]]
            try:
                self._from(node, mine)
            except RunFailed as error:
                failed = failed or error
            lacking = arrival.lacking(self.folder, self.document)
            left = [name for name in left if name in lacking]
        with contextlib.suppress(OSError):
            self.aside.rmdir()
        if left:
            raise failed or RunFailed("%s: only this node had it; use another checkpoint" % (self.folder / left[0]))
        checkpoint_folder.sync(self.folder)

    def _from(self, node: int, names: List[str]) -> None:
        """Raises RunFailed for the first that does not come."""
        if names:
            size = sum(self.document["files"][name]["size"] for name in names)
            self.say("%s: %d files, %s, from %s" % (self.folder, len(names), host.size(size), self._named(node)))
        if names and (shutil.which("rsync") is None or not self._rsync(node, names)):
            for name in names:
                self._cat(node, name)

    def _rsync(self, node: int, names: List[str]) -> bool:
        """False where the other end has no rsync."""
        try:
            self.aside.mkdir(exist_ok=True)
        except OSError as error:
            raise arrival.unwritable(self.aside, error) from None
        command = ["rsync", "--partial", "--inplace", "--protect-args", "--files-from=-", "--from0", "-e", _quoted(self.ssh)]
        command += ["%s:%s/" % (self.hosts[node], self.there), "%s/" % self.aside]
        done = subprocess.run(command, input="\0".join(names).encode(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        if done.returncode in NO_RSYNC:
            return False
        came = [name for name in names if self._came(name)]
        for name in came:
            self._accept(node, name)
        for name in [name for name in names if name not in came]:
            if done.returncode:
                raise self._failed(node, name, done.stderr, done.returncode)
            with contextlib.suppress(OSError):
                (self.aside / name).unlink()
            raise arrival.refused(self.folder / name, self._named(node))
        return True

    def _came(self, name: str) -> bool:
        """Whether it is here, and what was saved."""
        path, entry = self.aside / name, self.document["files"][name]
        regular = os.path.lexists(str(path)) and stat.S_ISREG(os.lstat(str(path)).st_mode)
        return regular and manifest.file_entry(path) == {key: entry[key] for key in ("size", "sha256")}

    def _accept(self, node: int, name: str) -> None:
        path = self.aside / name
        try:
            checkpoint_folder.sync(path)
            os.replace(str(path), str(self.folder / name))
        except OSError as error:
            raise arrival.unwritable(self.folder / name, error) from None
        self._said(node, name)

    def _cat(self, node: int, name: str) -> None:
        command = self.ssh + [self.hosts[node], "cat " + shlex.quote("%s/%s" % (self.there, name))]
        incoming = Arrival(self.folder, name, self.document["files"][name])
        try:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        except OSError as error:
            incoming.drop()
            raise RunFailed("ssh: cannot be started: %s; install it" % error.strerror) from None
        with process:
            assert process.stdout is not None and process.stderr is not None
            try:
                for data in iter(lambda: process.stdout.read(PIECE), b""):  # type: ignore[union-attr]
                    incoming.write(data)
            except BaseException:
                process.kill()
                incoming.drop()
                raise
            told = process.stderr.read()
        if process.returncode:
            incoming.drop()
            raise self._failed(node, name, told, process.returncode)
        incoming.accept(self._named(node))
        self._said(node, name)

    def _named(self, node: int) -> str:
        return "node %d (%s)" % (node, self.hosts[node])

    def _said(self, node: int, name: str) -> None:
        self.say("%s: %s from %s" % (self.folder / name, host.size(self.document["files"][name]["size"]), self._named(node)))

    def _failed(self, node: int, name: str, told: bytes, code: int) -> RunFailed:
        lines = [line.strip() for line in told.decode("utf-8", "replace").splitlines() if line.strip()]
        lines = [line for line in lines if not line.startswith("Warning: ")]  # ssh's, of a host that it did not know
        reason = lines[0] if lines else "ended with exit code %d" % code
        if code == NO_CONNECTION:
            return RunFailed("%s cannot be reached by ssh: %s. Set its port and key in PDSH_SSH_ARGS_APPEND or ~/.ssh/config"
                             % (self._named(node), reason))  # fmt: skip
        return RunFailed("%s: does not come from %s: %s" % (self.folder / name, self._named(node), reason))


def _quoted(command: List[str]) -> str:
    return " ".join(shlex.quote(part) for part in command)
