"""The import rule of CONTRIBUTING.md, read from the syntax trees, and what a bare Python can still do."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("pipeline_train", "export", "serve", "bench", "verbs")

# Lowest first: a module may import its own row and the rows above it in this list.
ROWS = [
    {"leaving", "errors", "pulse", "watch", "hostfile", "place", "link", "joining", "control", "network", "trace"},
    {"families", "manifest", "manifest_values", "manifest_where", "arrival", "proof", "safetensors_header", "host", "native",
     "content", "hub", "data.records", "data.shapes", "data.files", "data.json_text", "data.template"},
    {"config", "config_reading", "config_schema", "migrate", "migrate_keys", "deepspeed_keys", "run_folder", "checkpoint_folder",
     "checkpoint_job", "scattered", "gather", "loss_scale", "metrics"},
    {"compat"},
    {"models", "data", "plan", "random_model", "identity"},
    {"stages", "weights", "instructions", "accumulate"},
    {"engine", "optimizer", "checkpoint", "masters", "sinks"},
    {"loop", "window", "worker", "selftest"},
    {"prepare", "resolved", "device", "nodes", "remote", "gather_ssh"},
    {"launch", "processes", "team", "preflight", "report", "selftest_run"},
]  # fmt: skip
EXPORT_MAY = {"errors", "families", "manifest", "proof", "host", "config", "models", "weights", "data.template"}
SERVE_MAY = {"errors", "leaving", "families", "manifest", "proof", "config", "compat", "plan", "data.template"}
LIMITS_MAY = {"errors", "families", "plan", "safetensors_header"}  # serve/limits: what a bare Python can import
PROVE_MAY = SERVE_MAY | {"host", "data.records", "data.encode"}  # serve/prove compares a server with training itself
LIBRARIES = {  # library -> where it may be imported
    "deepspeed": tuple("pipeline_train/%s.py" % name for name in ("compat", "stages", "engine", "optimizer"))
    + ("serve/ds_generate.py", "bench/peers.py", "bench/ancestor.py"),
    "transformers": (
        "pipeline_train/data/encode.py",
        "pipeline_train/selftest.py",
        "pipeline_train/random_model.py",
        "bench/peers.py",
        "bench/ancestor.py",
        "bench/servers.py",
        "export/",
        "serve/embedded/",
        "serve/ds_generate.py",
        "serve/prove/",
    ),
    "torch": ("pipeline_train/", "export/", "bench/", "serve/embedded/", "serve/ds_generate.py", "serve/prove/"),
    "docker": ("serve/",),
}
NO_TORCH = tuple("pipeline_train/" + name for name in (
    "families/", "config.py", "plan/", "data/", "manifest.py", "hub.py", "prepare.py", "launch.py", "migrate.py",
)) + ("export/naming.py",)  # fmt: skip


def files():
    return sorted(p.relative_to(ROOT) for name in PACKAGES for p in (ROOT / name).rglob("*.py"))


def imported(path):
    """Absolute dotted names a file imports, wherever in the file (relative ones resolved)."""
    package = list(path.parts[:-1])
    for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            stem = ".".join(base + ([node.module] if node.module else []))
            for alias in node.names:
                yield "%s.%s" % (stem, alias.name)


def row_of(name):
    """Row of a dotted name below pipeline_train, most specific match first."""
    for depth in (2, 1):
        key = ".".join(name.split(".")[:depth])
        for number, row in enumerate(ROWS):
            if key in row:
                return number
    return None


def own(path):
    return ".".join(path.with_suffix("").parts[1:]).replace(".__init__", "")


def modules(names):
    """The part of each imported name that is a module of pipeline_train."""
    return [
        n[len("pipeline_train.") :]
        for n in names
        if n.startswith("pipeline_train.") and row_of(n[len("pipeline_train.") :]) is not None
    ]


@pytest.mark.parametrize("path", [p for p in files() if p.parts[0] == "pipeline_train" and own(p) != "__init__"], ids=str)
def test_layers_point_down(path):
    mine = row_of(own(path))
    assert mine is not None, "%s has no row in the import rule; add it here and to CONTRIBUTING.md" % path
    too_high = [n for n in modules(imported(path)) if row_of(n) > mine]
    assert not too_high, "%s (row %d) imports %s" % (path, mine, too_high)
    assert not [n for n in imported(path) if n.split(".")[0] in ("export", "serve", "bench", "verbs", "pipedock")]


@pytest.mark.parametrize("path", [p for p in files() if p.parts[0] in ("export", "serve")], ids=str)
def test_export_and_serve_stay_beside(path):
    may, other = (EXPORT_MAY, "serve") if path.parts[0] == "export" else (SERVE_MAY, "export")
    may = PROVE_MAY if path.parts[:2] == ("serve", "prove") else may
    may = LIMITS_MAY if path.parts[:2] == ("serve", "limits") else may
    used = {n for n in modules(imported(path)) if not any(n == m or n.startswith(m + ".") for m in may)}
    assert not used, "%s imports %s" % (path, used)
    assert not [n for n in imported(path) if n.split(".")[0] in (other, "bench", "verbs", "pipedock")]


@pytest.mark.parametrize("library", sorted(LIBRARIES))
def test_libraries_stay_in_their_place(library):
    users = [p.as_posix() for p in files() if any(n.split(".")[0] == library for n in imported(p))]
    assert [u for u in users if not u.startswith(LIBRARIES[library])] == []


def test_no_torch_where_planning_and_validation_live():
    users = [p.as_posix() for p in files() if any(n.split(".")[0] == "torch" for n in imported(p))]
    assert [u for u in users if u.startswith(NO_TORCH)] == []


@pytest.mark.parametrize("module", [
    "pipeline_train.families", "pipeline_train.plan", "pipeline_train.manifest", "pipeline_train.manifest_values",
    "pipeline_train.proof", "export.naming", "serve.limits",
])  # fmt: skip
def test_runs_in_a_bare_venv(module):
    """-S -I leaves only the standard library: no site-packages at all."""
    code = "import sys; sys.path.insert(0, %r); import %s" % (str(ROOT), module)
    done = subprocess.run([sys.executable, "-S", "-I", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "path", [Path("pipedock.py")] + [p for p in files() if p.parts[0] != "serve" or p.name.startswith("ds_")], ids=str
)
def test_python_38_can_parse(path):
    """The pinned stack is Python 3.8; feature_version refuses newer syntax."""
    ast.parse((ROOT / path).read_text(encoding="utf-8"), feature_version=(3, 8))
