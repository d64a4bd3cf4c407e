"""images/: locks, Dockerfiles, tags and the small programs that images are built with. No engine and no network needed."""

import fnmatch
import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from packaging.markers import Marker

ROOT = Path(__file__).resolve().parents[2]
IMAGES = ROOT / "images"
STACKS = ("cpu", "serve", "cuda", "cu116")
CONSTRAINTS = {"cpu": "current", "serve": "current", "cuda": "current", "cu116": "pinned"}
BUILD_TOOLS = {"pip", "wheel", "chatterbot-corpus"}  # ci/lock.py pins what no constraint does
NVIDIA = re.compile(r"(nvidia|cuda)-|triton$")


def module(path):
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def lock(stack):
    return (IMAGES / stack / "lock.txt").read_text(encoding="utf-8")


def pins(stack):
    return {name: block.partition("==")[2].split()[0] for name, block in blocks(stack).items()}


def blocks(stack):
    return module("images/install_lock.py").blocks(str(IMAGES / stack / "lock.txt"))


def elsewhere(stack):
    match = re.search(r"^# elsewhere: torch==(\S+) from (\S+), hash: unverified$", lock(stack), re.MULTILINE)
    return match.groups() if match else None


def python_of(stack):
    return re.search(r"Python (\d\.\d+)", lock(stack).splitlines()[0]).group(1)


def constrained(stack):
    """name -> version for the stack's Python."""
    found = {}
    env = {"python_version": python_of(stack), "python_full_version": python_of(stack) + ".0"}
    for line in (ROOT / ("ci/constraints-%s.txt" % CONSTRAINTS[stack])).read_text(encoding="utf-8").splitlines():
        pin, _, marker = line.partition(";")
        if pin and not pin.startswith("#") and (not marker or Marker(marker.strip()).evaluate(env)):
            name, version = pin.strip().split("==")
            found[name] = version
    return found


@pytest.mark.parametrize("stack", STACKS)
def test_locks_and_constraints_are_one_truth(stack):
    wanted, found = constrained(stack), pins(stack)
    differing = {name: version for name, version in found.items() if name in wanted and version != wanted[name]}
    assert len(found) > 30 and differing == {}, "bash ci/locks.sh --write"
    free = {name for name in found if name not in wanted} - BUILD_TOOLS
    assert all(stack == "cuda" and NVIDIA.match(name) for name in free), free


@pytest.mark.parametrize("stack", STACKS)
def test_every_package_of_a_lock_has_hashes(stack):
    for name, block in blocks(stack).items():
        hashes = re.findall(r"--hash=sha256:([0-9a-f]+)", block)
        assert hashes and all(len(value) == 64 for value in hashes) and block.count("==") == 1, name
    assert lock(stack).count("==") == len(blocks(stack)) + (2 if elsewhere(stack) else 0), (
        "a line that install_lock.py does not see"
    )


@pytest.mark.parametrize("stack", STACKS)
def test_a_lock_says_what_is_not_in_it(stack):
    """The wheels that the package registry does not have: named, and never replaced by its own of that release."""
    release = constrained(stack)["torch"]
    if stack == "cuda":
        assert elsewhere(stack) is None and pins(stack)["torch"] == release and any(NVIDIA.match(name) for name in pins(stack))
        return
    build = {"cpu": "cpu", "serve": "cpu", "cu116": "cu116"}[stack]
    assert elsewhere(stack) == ("%s+%s" % (release, build), "https://download.pytorch.org/whl/" + build)
    assert not [name for name in pins(stack) if name == "torch" or NVIDIA.match(name)]


@pytest.mark.parametrize(
    "stack, tag",
    [
        ("cpu", "0.1.0-cpu-torch2.13.0-ds0.19.8"),
        ("serve", "0.1.0-serve-torch2.13.0"),
        ("cuda", "0.1.0-cuda-torch2.13.0-ds0.19.8"),
        ("cu116", "0.1.0-cu116-torch1.13.1-ds0.9.2"),
    ],
)
def test_tags_carry_the_stack(stack, tag):
    done = subprocess.run([sys.executable, str(IMAGES / "tag.py"), stack], capture_output=True, text=True, timeout=60)
    version = re.search(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE).group(1)
    assert done.stdout == tag.replace("0.1.0", version) + "\n"


def test_a_tag_of_an_unknown_stack():
    done = subprocess.run([sys.executable, str(IMAGES / "tag.py"), "cu118"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (1, "usage: tag.py cpu | cu116 | cuda | serve\n")


def dockerfile(stack):
    return (IMAGES / stack / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ")


@pytest.mark.parametrize("stack", STACKS)
def test_labels_say_what_is_in_the_image(stack):
    labels = dict(re.findall(r'pipedock\.([a-z]+)="([^"]*)"', dockerfile(stack)))
    found = pins(stack)
    wanted = {"stack": stack, "python": python_of(stack), "transformers": found["transformers"]}
    wanted["torch"] = elsewhere(stack)[0] if elsewhere(stack) else found["torch"]
    if "deepspeed" in found:
        wanted["deepspeed"] = found["deepspeed"]
    base = re.search(r"^ARG BASE_IMAGE=nvidia/cuda:([\d.]+)-", dockerfile(stack), re.MULTILINE)
    if base:
        wanted["cuda"] = base.group(1)
        assert "ARG RUNTIME_IMAGE=nvidia/cuda:%s-" % base.group(1) in dockerfile(stack), "both stages of one CUDA"
    assert labels == wanted
    assert "org.opencontainers.image.revision=$GIT_HASH" in dockerfile(stack)
    assert "org.opencontainers.image.version=$TAG" in dockerfile(stack)


def test_the_cu116_image_takes_that_wheel_and_no_other():
    line = re.search(r"pip install (.*)torch==(\S+)", dockerfile("cu116"))
    assert line.group(2) == elsewhere("cu116")[0]
    assert shlex.split(line.group(1)) == ["--no-deps", "--index-url", elsewhere("cu116")[1]]


def test_gpu_images_compile_every_operator_that_they_ask_for():
    """What is set in DS_BUILD_* is looked for afterwards: DeepSpeed only warns about what it leaves out."""
    for stack in ("cu116", "cuda"):
        asked = {name.lower() for name in re.findall(r"DS_BUILD_([A-Z_]+)=1", dockerfile(stack))}
        checked = set(re.search(r"for op in ([a-z_ ]+);", dockerfile(stack)).group(1).split())
        assert asked == checked and "cpu_adam" in asked
        assert "python%s/site-packages" % python_of(stack) in dockerfile(stack)


def admitted(path):
    """Whether .dockerignore lets it into the build context; its last matching line wins."""
    said = True
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        pattern = line.lstrip("!")
        if line and not line.startswith("#") and (fnmatch.fnmatch(path, pattern) or path.startswith(pattern + "/")):
            said = line.startswith("!")
    return said


@pytest.mark.parametrize("stack", STACKS)
def test_what_a_dockerfile_copies_is_there_and_in_the_context(stack):
    copies = [line.split()[1:-1] for line in re.findall(r"^COPY (?!--from).*$", dockerfile(stack), re.MULTILINE)]
    sources = [source for line in [c if c[0] != "COPY" else c[1:] for c in copies] for source in line]
    assert "images/install_lock.py" in sources
    for source in sources:
        assert (ROOT / source).exists() and (source == "." or admitted(source)), source


def test_every_package_that_an_image_installs_is_in_the_context():
    line = re.search(r"^packages = \[(.*)\]$", (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE).group(1)
    packages = [name.strip(' "').replace(".", "/") for name in line.split(",")]
    assert "serve/containers" in packages and [name for name in packages if not admitted(name + "/__init__.py")] == []


@pytest.mark.parametrize("path", ["cluster/ssh/id_ed25519", "data/mine.jsonl", "runs/a/x", ".git/config", ".env"])
def test_what_no_image_may_hold_stays_out_of_the_context(path):
    assert not admitted(path)


@pytest.mark.parametrize("stack", ("cpu", "cuda", "cu116"))
def test_training_images_have_ssh_and_no_host_key(stack):
    step = next(line for line in dockerfile(stack).splitlines() if "openssh-server" in line)
    assert {"openssh-server", "openssh-client", "pdsh", "rsync"} <= set(step.split())
    assert step.index("openssh-server") < step.index("rm -rf /var/lib/apt/lists/* /etc/ssh/ssh_host_*"), "in the same layer"
    assert "sshd" not in dockerfile(stack).partition("ENTRYPOINT")[2]


def test_operators_are_built_for_other_processors_too(tmp_path):
    (tmp_path / "g++").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (tmp_path / "g++").chmod(0o755)
    given = ["-O3", "-march=native", "-D__AVX512__", "-DNAME=two words", "x.cpp"]
    env = dict(os.environ, PATH="%s:%s" % (tmp_path, os.environ["PATH"]))
    done = subprocess.run(["sh", str(IMAGES / "portable-cxx.sh"), *given], env=env, capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines() == ["-O3", "-march=haswell", "-D__AVX256__", "-DNAME=two words", "x.cpp"]


LOCK = """# elsewhere: torch==9+cpu from somewhere, hash: unverified
deepspeed==1 \\
    --hash=sha256:aa
numpy==2 \\
    --hash=sha256:bb \\
    --hash=sha256:cc
pip==3 \\
    --hash=sha256:dd
"""


@pytest.mark.parametrize("what", [(), ("wheels",), ("sources",)])
def test_a_lock_is_installed_with_hashes_and_nothing_besides(monkeypatch, tmp_path, what):
    installer, ran = module("images/install_lock.py"), []

    def run(command):
        text = Path(command[-1]).read_text() if "-r" in command else ""
        ran.append((command[3:], [line.split("==")[0] for line in text.splitlines() if "==" in line], text.count("--hash")))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(installer.subprocess, "run", run)
    (tmp_path / "lock.txt").write_text(LOCK)
    assert installer.main(str(tmp_path / "lock.txt"), *what) == 0
    installs = [(names, hashes) for command, names, hashes in ran if command[0] == "install"]
    wheels, sources = [(["pip"], 1), (["numpy"], 2)], [(["deepspeed"], 1)]
    assert installs == {(): wheels + sources, ("wheels",): wheels, ("sources",): sources}[what]
    commands = [command for command, _, _ in ran if command != ["check"]]
    assert all({"--no-deps", "--require-hashes"} <= set(command) for command in commands)
    assert [name for command in commands for name in ("--only-binary", "--no-build-isolation") if name in command] == {
        (): ["--only-binary", "--no-build-isolation"], ("wheels",): ["--only-binary"], ("sources",): ["--no-build-isolation"],
    }[what]  # fmt: skip
    assert (["check"] in [command for command, _, _ in ran]) is (what != ("wheels",))


def test_a_wheel_with_another_hash_stops_the_installation(monkeypatch, tmp_path):
    installer = module("images/install_lock.py")
    monkeypatch.setattr(installer.subprocess, "run", lambda command: subprocess.CompletedProcess(command, 1))
    (tmp_path / "lock.txt").write_text(LOCK)
    with pytest.raises(SystemExit) as stopped:
        installer.main(str(tmp_path / "lock.txt"))
    assert stopped.value.code == 1


def test_engines_are_pinned_by_tag_and_no_digest_is_invented():
    engines = json.loads((ROOT / "serve/engines.json").read_text())["engines"]
    assert {(e["engine"], e["version"]) for e in engines} >= {("tgi", "0.8"), ("tgi", "3.3")} and "vllm" in {
        e["engine"] for e in engines
    }
    for engine in engines:
        assert engine["tag"].lstrip("v").startswith(engine["version"] + ".")
        assert engine["digest"] == "unverified" or re.fullmatch(r"sha256:[0-9a-f]{64}", engine["digest"])
        if engine["engine"] == "tgi":
            compose = (ROOT / "compose" / (engine["stack"] + ".yaml")).read_text()
            assert "image: %s:${TGI_VERSION:-%s}\n" % (engine["image"], engine["tag"]) in compose


WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_actions_are_pinned(path):
    text = path.read_text(encoding="utf-8")
    assert yaml.safe_load(text)["jobs"]
    uses = re.findall(r"uses: *(\S+)", text)
    assert uses and all(re.search(r"@(v\d+\.\d+\.\d+|[0-9a-f]{40})$", name) for name in uses), uses


def test_a_release_builds_scans_and_publishes_every_stack():
    release = yaml.safe_load((ROOT / ".github/workflows/release.yml").read_text(encoding="utf-8"))
    assert list(release[True]) == ["push"] and release[True]["push"] == {"tags": ["v*"]}  # YAML reads "on" as true
    job = release["jobs"]["images"]
    assert sorted(job["strategy"]["matrix"]["stack"]) == sorted(path.parent.name for path in IMAGES.glob("*/Dockerfile"))
    steps = json.dumps(job["steps"])
    build, scan, push = (steps.index(word) for word in ("docker/build-push-action", "aquasecurity/trivy-action", "docker push"))
    assert build < scan < push and "python3 images/tag.py" in steps


def test_the_sample_has_every_variable_of_the_compose_files_and_no_other():
    """With the values that hold when nothing is set."""
    files = [path.read_text(encoding="utf-8") for path in sorted((ROOT / "compose").glob("*.yaml")) if path.name != "run.yaml"]
    defaults, used = {}, set()
    for text in files:
        text = re.sub(r"#.*", "", text)
        used |= set(re.findall(r"\$\{([A-Z_]+)", text)) | set(re.findall(r"^ +([A-Z_]+): *$", text, re.MULTILINE))
        used |= {name.strip() for line in re.findall(r"args: \[(.*)\]", text) for name in line.split(",")}
        defaults.update(re.findall(r"\$\{([A-Z_]+):-([^./}][^}]*)\}", text))
    sample = (ROOT / "compose/example.env").read_text(encoding="utf-8")
    assert set(re.findall(r"^#?([A-Z_]+)=", sample, re.MULTILINE)) == used | {"STACK"}
    said = dict(re.findall(r"^([A-Z_]+)=(\S+)", sample, re.MULTILINE))
    assert said.pop("STACK") == "cpu" and all(defaults[name] == value for name, value in said.items()), (said, defaults)
