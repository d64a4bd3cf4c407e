"""The small programs of ci/ that images and installations stand on."""

import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NAME = re.compile(r"^[A-Za-z0-9._-]+")


def plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def locked():
    """name -> pinned versions (two where Python 3.10 has one of its own)."""
    pins = {}
    for line in (ROOT / "ci/constraints-current.txt").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            name, version = line.partition(";")[0].strip().split("==")
            pins.setdefault(plain(name), set()).add(version)
    return pins


def requirements(*extras):
    command = [sys.executable, str(ROOT / "ci/requirements.py"), *extras]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_everything_that_is_installed_is_in_the_lock():
    done = requirements("train", "serve", "demo", "test", "lint", "parquet", "json5")
    names = {plain(NAME.match(line).group()) for line in done.stdout.splitlines()}
    assert len(names) > 20 and names - set(locked()) == set()


def test_this_environment_is_the_locked_one():
    """Anything else would be tested in the images' place."""
    differing = {}
    for name, versions in locked().items():
        try:
            found = metadata.version(name).partition("+")[0]
        except metadata.PackageNotFoundError:
            continue  # of an extra that is not installed here
        if found not in versions:
            differing[name] = found
    assert differing == {}, "ci/install.sh installs the locked versions"


def test_an_unknown_extra_is_named():
    done = requirements("trains")
    assert done.returncode == 1 and done.stderr.startswith("pyproject.toml has no extra trains; it has train, ")


def standin(tmp_path, conf):
    (tmp_path / "pip.conf").write_text(conf, encoding="utf-8")
    env = {k: v for k, v in os.environ.items() if not k.startswith("PIP_")}
    env.update(PIP_CONFIG_FILE=str(tmp_path / "pip.conf"), HOME=str(tmp_path), XDG_CONFIG_DIRS=str(tmp_path))
    command = [sys.executable, str(ROOT / "ci/standin_pip.py"), str(tmp_path / "root"), "2.13.0", "cp311"]
    (tmp_path / "root").mkdir()
    subprocess.run(command, env=env, check=True, timeout=60)
    return (tmp_path / "root/etc/pip.conf").read_text(encoding="utf-8")


def test_the_base_image_reaches_what_this_machine_reaches_and_no_path_of_it(tmp_path):
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    for name in (
        "torch-2.13.0+cpu-cp311-cp311-linux_x86_64.whl",
        "torch-2.13.0+cpu-cp312-cp312-linux_x86_64.whl",
        "numpy-1-any.whl",
    ):
        (wheels / name).write_text(name)
    conf = standin(
        tmp_path,
        "[global]\nindex-url = https://mirror.example/simple\nextra-index-url = file:///somewhere/simple https://more.example/simple\n"
        "find-links = %s\nconstraint = /etc/constraints.txt\n" % wheels,
    )
    lines = conf.splitlines()
    assert "index-url = https://mirror.example/simple" in lines
    assert "extra-index-url = https://more.example/simple" in lines
    assert "find-links = /opt/wheels" in lines
    assert "somewhere" not in conf and str(tmp_path) not in conf and "constraint" not in conf
    assert [p.name for p in (tmp_path / "root/opt/wheels").iterdir()] == ["torch-2.13.0+cpu-cp311-cp311-linux_x86_64.whl"]


def test_without_a_torch_wheel_there_is_no_wheel_folder(tmp_path):
    assert "find-links" not in standin(tmp_path, "[global]\nindex-url = https://mirror.example/simple\n")
    assert not (tmp_path / "root/opt").exists()
