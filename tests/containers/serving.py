"""``pipedock serve`` with a real Docker Engine: what the tests of containers share."""

import json
import os
import subprocess
import sys
import urllib.request

from tests.containers.compose import ROOT
from tests.free_port import free_port

COMMAND = [sys.executable, str(ROOT / "pipedock.py")]


def docker(*args, text=None):
    done = subprocess.run(["docker", *args], input=text, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def pipedock(*argv, folder, ok=True, **environment):
    """The command, on a machine whose GPUs, if there are any, are not to be seen."""
    done = subprocess.run(
        COMMAND + list(argv), env={**surroundings(folder), **environment}, capture_output=True, text=True, timeout=180
    )
    assert not ok or done.returncode == 0, done.stderr
    return done


def surroundings(folder):
    state = str(folder.parent / "state")
    return {**os.environ, "CUDA_VISIBLE_DEVICES": "", "XDG_RUNTIME_DIR": state, "PYTHONPATH": str(ROOT)}


class Serve:
    """``pipedock serve`` on one port."""

    def __init__(self, folder):
        self.folder, self.port = folder, free_port()
        self.name = "pipedock-serve-%d" % self.port

    def __call__(self, *argv, ok=True, **environment):
        return pipedock("serve", "--port", str(self.port), *argv, folder=self.folder, ok=ok, **environment)

    def start(self, *argv, **more):
        return self("--model", str(self.folder), "--detach", *argv, **more)

    def refuses(self, code, *argv, **environment):
        """-> what is said on stderr; nothing is left of it."""
        done = self.start(*argv, ok=False, **environment)
        assert done.returncode == code, (done.returncode, done.stderr)
        assert docker("ps", "--all", "--quiet", "--filter", "name=" + self.name) == ""
        return done.stderr

    def inspect(self):
        return json.loads(docker("inspect", self.name))[0]

    def post(self, route, body):
        request = urllib.request.Request(
            "http://127.0.0.1:%d%s" % (self.port, route), json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as reply:
            return json.load(reply)
