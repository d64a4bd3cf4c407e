"""What the compose services run inside their container: ``road.py train run.yaml`` and ``road.py export run.yaml``.

train: makes the example's model and data if run.yaml names them and they are missing, then trains, or goes on where it was stopped;
  with an export: section ``exports/current`` is its export then. NODES, NODE_RANK, MASTER_ADDR and MASTER_PORT in the environment,
  or HOSTFILE: on several nodes.
export: the run's newest checkpoint -> its export folder, the proof, and ``exports/current``, which the serve service loads.
Python 3.8 runs this, too.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, Dict, List, Mapping

from pipeline_train import config as run_yaml
from pipeline_train.errors import UserError

DEMO = Path(__file__).resolve().parent.parent / "ci" / "demo"
EXAMPLE_DATA, EXAMPLE_MODEL = "data/example.jsonl", "models/example-bloom"
TARGETS = {"cuda": "tgi-3", "cu116": "tgi-0.8"}  # by STACK: whom the export is for where run.yaml does not say it
FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
NODE_FLAGS = {"NODES": "--nodes", "NODE_RANK": "--node-rank", "MASTER_ADDR": "--master-addr", "MASTER_PORT": "--master-port"}


def check_kept(where: str, key: str, path: str, folder: str) -> None:
    """Anything written outside the mounted folders would go with the container."""
    if Path(folder).resolve() not in Path(path).resolve().parents:
        raise UserError("%s: %s: %s would be lost with the container; put it under %s/" % (where, key, path, folder))


def export_dir(config: Any) -> str:
    return config.export.dir if config.export is not None else "exports/%s" % (config.run.name or Path(config.run.out).name)


def demo(script: str, *args: str) -> None:
    subprocess.run([sys.executable, str(DEMO / script), *args], check=True)


def make_example(config: Any) -> None:
    if config.data.train == EXAMPLE_DATA and not Path(EXAMPLE_DATA).exists():
        demo("corpus.py", EXAMPLE_DATA, "--english", "64", "--chinese", "16")
    if config.model.path == EXAMPLE_MODEL and not Path(EXAMPLE_MODEL, "config.json").exists():
        demo("bloom.py", EXAMPLE_DATA, EXAMPLE_MODEL)


def node_flags(env: Mapping[str, str]) -> List[str]:
    """How `pipedock train` is told about several nodes; compose passes a variable on only if it is set."""
    given: Dict[str, str] = {name: env[name] for name in NODE_FLAGS if env.get(name)}
    named = [name for name in ("NODES", "NODE_RANK", "MASTER_ADDR") if name in given]
    missing = [name for name in ("NODES", "NODE_RANK", "MASTER_ADDR") if name not in given]
    hostfile = env.get("HOSTFILE")
    if hostfile and named:
        raise UserError("HOSTFILE and %s are two ways to name the nodes; unset one" % ", ".join(named))
    if hostfile and not Path(hostfile).is_file():
        raise UserError("HOSTFILE=%s: no such file in the container; put it into cluster/, HOSTFILE=cluster/hostfile" % hostfile)
    if named and missing:
        raise UserError("%s: set %s too, on every node" % (", ".join(named), " and ".join(missing)))
    flags = ["--hostfile", hostfile] if hostfile else []
    return flags + [part for name, value in given.items() if hostfile or named for part in (NODE_FLAGS[name], value)]


def train(path: str, config: Any) -> int:
    flags = node_flags(os.environ)
    make_example(config)
    # In a session of its own a terminal's Ctrl-C comes once, from here.
    child = subprocess.Popen(["pipedock", "train", "--config", path, "--resume", "auto", *flags], start_new_session=True)
    for number in FORWARDED:
        signal.signal(number, lambda got, frame: child.send_signal(got))
    code = child.wait()
    if code == 0 and config.export is not None and Path(config.export.dir, "config.json").is_file():  # on node 0 only
        make_current(config.export.dir)
    return code if code >= 0 else 128 - code


def export(config: Any) -> None:
    folder = export_dir(config)
    target = config.export.target if config.export is not None else TARGETS.get(os.environ.get("STACK", ""), "hf")
    for command in (
        ["pipedock", "to-hf", "--input", config.run.out, "--output", folder, "--target", target, "--overwrite"],
        ["pipedock", "verify", "--checkpoint", config.run.out, "--export", folder],
    ):
        code = subprocess.run(command).returncode
        if code:
            sys.exit(code)
    make_current(folder)


def make_current(folder: str) -> None:
    """Point exports/current at the export; a relative link, so that it holds in any container that mounts exports/."""
    fresh = Path("exports/.current")
    fresh.unlink(missing_ok=True)
    fresh.symlink_to(Path(folder).resolve().relative_to(Path("exports").resolve()), target_is_directory=True)
    os.replace(fresh, "exports/current")
    print("exports/current -> %s; `docker compose up -d serve` serves it" % folder, file=sys.stderr)


def main(action: str, path: str) -> int:
    try:
        if Path(path).is_dir():  # Docker makes a folder of what it does not find
            raise UserError("%s: a folder here, so RUN_CONFIG names no file; it is relative to the repository's folder, "
                            "RUN_CONFIG=my/run.yaml" % path)  # fmt: skip
        config = run_yaml.load(path)
        check_kept(path, "run.out", config.run.out, "runs")
        check_kept(path, "export.dir", export_dir(config), "exports")
        if action == "train":
            return train(path, config)
        export(config)
    except UserError as error:
        print("%s: %s" % (action, error), file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
