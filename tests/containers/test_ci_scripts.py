"""The small programs of ci/ that images and installations stand on."""

import json
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


def locked(stack="current"):
    """name -> pinned versions (two where Python 3.10 has one of its own)."""
    pins = {}
    for line in (ROOT / ("ci/constraints-%s.txt" % stack)).read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            name, version = line.partition(";")[0].strip().split("==")
            pins.setdefault(plain(name), set()).add(version)
    return pins


def requirements(*extras):
    command = [sys.executable, str(ROOT / "ci/requirements.py"), *extras]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_everything_that_is_installed_is_in_the_lock():
    done = requirements("train", "serve", "demo", "test", "lint", "parquet", "json5")
    names = {plain(NAME.match(line).group()) for line in done.stdout.splitlines() if "< '3.10'" not in line}
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


def test_the_pinned_lock_is_of_the_pinned_stack():
    """Whatever its extras may install there, and the versions that make it the pinned stack."""
    pins = locked("pinned")
    names = {
        plain(NAME.match(line).group()) for line in requirements("train", "test", "parquet", "json5").stdout.splitlines()
        if ">= '3.1" not in line
    }  # fmt: skip
    assert len(names) > 15 and names - set(pins) == set()
    wanted = {"torch": "1.13.1", "deepspeed": "0.9.2", "transformers": "4.30.2", "protobuf": "3.20.0", "msgspec": "0.18.6"}
    assert {name: pins[name] for name in wanted} == {name: {version} for name, version in wanted.items()}
    assert next(iter(pins["pydantic"])).startswith("1.") and next(iter(pins["numpy"])).startswith("1.24.")


def pinned(tmp_path, **env):
    (tmp_path / "home").mkdir(exist_ok=True)
    env = dict({k: v for k, v in os.environ.items() if k != "PYENV_ROOT"}, HOME=str(tmp_path / "home"), **env)
    return subprocess.run(["bash", str(ROOT / "ci/pinned.sh")], env=env, capture_output=True, text=True, timeout=60)


def test_without_python_3_8_the_pinned_lane_is_skipped_and_says_why(tmp_path):
    for name in ("python3", "python3.8"):  # there, but of another version
        (tmp_path / name).write_text("#!/bin/sh\nexit 1\n")
        (tmp_path / name).chmod(0o755)
    done = pinned(tmp_path, PATH="%s:%s" % (tmp_path, os.environ["PATH"]))
    assert done.returncode == 77 and done.stderr.splitlines()[-1].startswith("pinned: SKIPPED, no Python 3.8 with venv is here")


def test_the_pinned_lane_empties_no_folder_of_other_files(tmp_path):
    (tmp_path / "python").write_text("#!/bin/sh\n")  # says yes to everything
    (tmp_path / "python").chmod(0o755)
    (tmp_path / "venv").mkdir()
    (tmp_path / "venv/letters.txt").write_text("dear")
    done = pinned(tmp_path, PIPEDOCK_PINNED_PYTHON=str(tmp_path / "python"), PIPEDOCK_PINNED_VENV=str(tmp_path / "venv"))
    assert done.returncode == 1 and (tmp_path / "venv/letters.txt").read_text() == "dear"
    assert "is not empty and no virtual environment; name another PIPEDOCK_PINNED_VENV" in done.stderr


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


def test_a_folder_with_other_files_is_not_made_an_environment(tmp_path):
    """Making one empties the folder."""
    (tmp_path / "letters.txt").write_text("dear")
    env = dict(os.environ, PIPEDOCK_VENV=str(tmp_path))
    done = subprocess.run(["bash", str(ROOT / "ci/install.sh")], env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and [p.name for p in tmp_path.iterdir()] == ["letters.txt"]
    assert done.stderr == "install.sh: %s is not empty and no virtual environment; name another PIPEDOCK_VENV\n" % tmp_path


def test_no_python_with_venv_is_said_in_one_line(tmp_path):
    """The message names what to install."""
    without = tmp_path / "python"
    without.write_text("#!/bin/sh\ncase $2 in *ensurepip*) exit 1 ;; esac\n")
    without.chmod(0o755)
    env = dict(os.environ, PIPEDOCK_VENV=str(tmp_path / "venv"))
    for python, reason in ((str(without), "%s has no venv module" % without), ("/nonexistent", "no Python >= 3.10 found")):
        env["PIPEDOCK_PYTHON"] = python
        done = subprocess.run(["bash", str(ROOT / "ci/install.sh")], env=env, capture_output=True, text=True, timeout=60)
        said = done.stderr.splitlines()
        assert (
            done.returncode == 1 and len(said) == 1 and said[0].startswith("install.sh: " + reason) and "apt-get install" in said[0]
        )


def answers(*args):
    command = [sys.executable, str(ROOT / "ci/demo/answers.py"), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, encoding="utf-8")


def test_the_demo_fails_unless_every_route_answers_as_trained(tmp_path):
    """Its verdict on replies as the server writes them, each route wrong once."""
    right = {
        "generate": {"generated_text": " cancer.", "details": {"finish_reason": "eos_token"}},
        "chat": {"choices": [{"message": {"content": "cancer."}}]},
        "client": {"generate": "cancer.", "stream": "cancer.", "chat": "cancer."},
    }
    stream = 'data:{"token":{"text":"%s","special":false},"generated_text":null}\n\n'
    stream += 'data:{"token":{"text":"</s>","special":true},"generated_text":"%s"}\n\n'

    def write(**changed):
        (tmp_path / "0.asked.json").write_text(json.dumps({"question": "q", "prompt": "p", "answer": "cancer."}))
        for name, reply in dict(right, **changed).items():
            (tmp_path / ("0.%s.out" % name)).write_text(reply if isinstance(reply, str) else json.dumps(reply))

    write(stream=stream % ("cancer.", "cancer."))
    assert answers("learnt", tmp_path).returncode == 0
    done = answers("untouched", tmp_path)
    assert done.returncode == 1 and "answered already without training" in done.stderr
    for changed in (
        {"generate": {"generated_text": "no", "details": {"finish_reason": "eos_token"}}},
        {"generate": {"generated_text": "cancer.", "details": {"finish_reason": "length"}}},
        {"stream": stream % ("canc", "cancer.")},
        {"stream": stream % ("cancer.", "canc")},
        {"chat": {"choices": [{"message": {"content": "cancer"}}]}},
        {"client": {"generate": "cancer.", "stream": "cancer.", "chat": ""}},
    ):
        write(**dict({"stream": stream % ("cancer.", "cancer.")}, **changed))
        done = answers("learnt", tmp_path)
        assert done.returncode == 1 and "these are not the trained answers" in done.stderr, changed


def test_the_demo_fails_without_replies(tmp_path):
    assert answers("learnt", tmp_path).returncode == 1
    (tmp_path / "0.asked.json").write_text(json.dumps({"question": "q", "prompt": "p", "answer": "a"}))
    assert "q: no reply" in answers("learnt", tmp_path).stderr
