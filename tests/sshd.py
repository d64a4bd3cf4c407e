"""An sshd of our own on the loopback interface, with its own keys, for whoever runs the test; nothing of the
system's is touched."""

import os
import shutil
import socket
import subprocess
import time
from contextlib import contextmanager

from tests.free_port import free_port

SSHD = shutil.which("sshd", path=os.environ.get("PATH", "") + ":/usr/sbin:/usr/local/sbin")


@contextmanager
def sshd(folder):
    """-> what PDSH_SSH_ARGS_APPEND must say to come in."""
    folder.mkdir()
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)], check=True)
    port = free_port()
    (folder / "sshd_config").write_text("".join(line + "\n" for line in (
        "Port %d" % port, "ListenAddress 127.0.0.1", "HostKey %s" % (folder / "host"), "PidFile none", "UsePAM no",
        "AuthorizedKeysFile %s" % (folder / "user.pub"), "StrictModes no", "PasswordAuthentication no", "MaxStartups 100",
    )))  # fmt: skip
    if os.getuid() == 0:
        os.makedirs("/run/sshd", exist_ok=True)  # where sshd wants an empty folder
    with open(str(folder / "log"), "w") as log:
        process = subprocess.Popen([SSHD, "-D", "-e", "-f", str(folder / "sshd_config")], stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 20
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                assert process.poll() is None and time.monotonic() < deadline, (folder / "log").read_text()
                time.sleep(0.05)
        yield "-p %d -i %s -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o LogLevel=ERROR" % (port, folder / "user")
    finally:
        process.terminate()
        process.wait()
