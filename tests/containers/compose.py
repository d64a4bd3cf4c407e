"""``docker compose`` in the repository's root, with folders of its own: what the tests of this folder share."""

import json
import os
import subprocess
import time
from pathlib import Path
from typing import List

import pytest

from tests.free_port import free_port

ROOT = Path(__file__).resolve().parents[2]
OWNER = 1234  # of the folders: what containers write must belong to whoever owns them
FOLDERS = ("data", "models", "runs", "exports", "cluster")

needs_engine = [
    pytest.mark.containers,
    pytest.mark.skipif(os.environ.get("PIPEDOCK_CONTAINERS") != "1", reason="needs a Docker engine: ci/containers.sh starts one"),
]


class Compose:
    """One project. ``env``: more variables for the compose files."""

    def __init__(self, folder: Path, name: str = "road", **env: str) -> None:
        self.folder, self.port = folder, free_port()
        self.env = dict(
            os.environ, COMPOSE_PROJECT_NAME="pipedock-%s-%d" % (name, os.getpid()), PIPEDOCK_PORT=str(self.port), **env
        )
        for kind in FOLDERS:
            (folder / kind).mkdir()
            self.env[kind.upper() + "_DIR"] = str(folder / kind)
            if os.getuid() == 0:
                os.chown(str(folder / kind), OWNER, OWNER)
        self.env.pop("HF_HOME", None)

    def __call__(self, *args: str, timeout: int = 900, ok: bool = True) -> str:
        done = subprocess.run(
            ["docker", "compose", *args], cwd=ROOT, env=self.env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, timeout=timeout,
        )  # fmt: skip
        assert not ok or done.returncode == 0, "docker compose %s\n%s" % (" ".join(args), done.stdout[-6000:])
        return done.stdout

    def owners(self, kind: str) -> set:
        return {p.lstat().st_uid for p in (self.folder / kind).rglob("*")}

    def state(self, service: str) -> dict:
        """Of its container, as `docker compose ps` tells; {} before there is one."""
        lines = self("ps", "--all", "--format", "json", service).splitlines()
        return json.loads(lines[0]) if lines else {}

    def ended(self, service: str, timeout: float) -> int:
        """Wait for its end; its exit code."""
        end = time.monotonic() + timeout
        while True:
            state = self.state(service)
            if state.get("State") == "exited":
                return state["ExitCode"]
            assert time.monotonic() < end, "%s still runs\n%s" % (service, self("logs", "--tail", "30", service))
            time.sleep(0.5)

    def steps(self, run: str) -> List[dict]:
        """The step lines of metrics.jsonl, the later one of a step that was done twice."""
        path = self.folder / "runs" / run / "metrics.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return list({line["step"]: line for line in lines if line["kind"] == "step"}.values())

    def down(self) -> None:
        self("--profile", "ssh", "--profile", "export", "down", "--volumes", "--timeout", "5", ok=False)


def write_run(request: pytest.FixtureRequest, name: str, text: str) -> str:
    """A run.yaml where RUN_CONFIG can name it, relative to the repository's root; gone afterwards."""
    path = ROOT / "build" / ("%s-%d.yaml" % (name, os.getpid()))
    path.parent.mkdir(exist_ok=True)
    request.addfinalizer(path.unlink)
    path.write_text(text, encoding="utf-8")
    return str(path.relative_to(ROOT))
