"""``pipedock train --self-test``: start the ranks of selftest.py, judge what they measured, remember what has passed.

A passed test is recorded in $XDG_CACHE_HOME/pipedock/self-test/<key>.json (~/.cache without that variable). The key is a hash of
the installed versions, the devices, what is tested (family, dtype, stages) and the source of this package: ``train`` tests once
for every such environment.
"""

import hashlib
import json
import os
import platform
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional

from . import compat, config, device, families, host, launch, manifest, prepare, weights
from .config_schema import RunConfig
from .errors import RunFailed
from .families import FAMILIES, Dims

Say = Callable[[str], None]  # takes a line for the user

STEPS = 5
MOST_ON_CPU = 4  # processes of a self-test; more would only share the cores
FIGURES = {
    "loss": "the loss",
    "grad_norm": "the gradient norm",
    "gradients": "a gradient",
    "losses": "a loss of the first %d steps" % STEPS,
}
EPSILON = {"bf16": 2.0**-7, "fp16": 2.0**-10}  # torch.finfo(dtype).eps, without importing torch
# Bound to the launcher's life before torch is imported, which takes seconds.
RANK = ["-c", "from pipeline_train import worker; worker.die_with_parent(); from pipeline_train import selftest; selftest.main()"]
DRIVER = Path("/proc/driver/nvidia")
MACHINE = {"run": {"out": "-"}, "model": {"path": "-"}, "data": {"train": "-"}, "parallel": {"pipe": 2}}


def limits(dtype: str, cuda: bool) -> Dict[str, float]:
    """Allowed relative differences. fp32 on a GPU: its kernels add up in another order than the CPU, ten times as far off.
    bf16, fp16: dozens of rounded operations follow each other (measured in bf16: 10 to 20 epsilon on gradients); the faults that
    this is for, a wrong scale, clip norm or label, are off by half or more."""
    if dtype == "fp32":
        near = 1e-4 if cuda else 1e-5
        return {"loss": near, "grad_norm": near, "gradients": near, "losses": 10 * near}
    near = EPSILON[dtype]
    return {"loss": 8 * near, "grad_norm": 8 * near, "gradients": 32 * near, "losses": 16 * near}


def case(family: str, tied: Optional[bool], grouped: bool, run: RunConfig, gpus: int) -> Dict[str, Any]:
    """What is tested, as JSON: a tiny model of the family (``tied`` None: as the family does) on the run's dtype and as many of
    its stages and replicas as fit this machine. 4 micro-batches in a step, so that a wrong scale shows."""
    model = dict(FAMILIES[family].tiny)
    if tied is not None:
        model["tie_word_embeddings"] = tied
    if not grouped:
        model.pop("num_key_value_heads", None)
    parallel, room = run.parallel, gpus or MOST_ON_CPU
    pipe = min(parallel.pipe, room, families.dims_of(model).layers)
    data = 2 if parallel.data > 1 and 2 * pipe <= room else 1
    raw = {
        "run": {"out": "-", "seed": 0}, "model": {"path": "-", "dtype": run.model.dtype}, "data": {"train": "-", "seq_len": 32},
        "parallel": {"pipe": pipe, "data": data, "recompute": parallel.recompute, "axes": list(parallel.axes)},
        "batch": {"micro": 1, "global": 4 * data},
        "optim": {"lr": 2e-3, "clip": 0.5, "warmup": 2, "loss_scale": {"initial": 256}},
    }  # fmt: skip
    return {"family": family, "model": model, "run": raw, "steps": STEPS}


def cases_of(run: RunConfig, dims: Optional[Dims], gpus: int) -> List[Dict[str, Any]]:
    """The model of a run; with ``dims`` None every family."""
    modern = compat.has_grouped_queries(compat.versions()["transformers"])
    if dims is not None:
        return [case(dims.family, dims.tied, modern and dims.kv_heads < dims.heads, run, gpus)]
    return [case(family, None, modern, run, gpus) for family in sorted(FAMILIES)]


def key_of(cases: List[Dict[str, Any]], gpus: int) -> str:
    """The environment, as a hash."""
    source, root = hashlib.sha256(), Path(__file__).resolve().parent
    for path in sorted(root.rglob("*.py")):
        source.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    device = _driver() if gpus else [platform.machine()]
    everything = {"versions": compat.versions(), "device": [gpus, device], "cases": cases, "source": source.hexdigest()}
    return hashlib.sha256(json.dumps(everything, sort_keys=True).encode()).hexdigest()[:32]


def _driver() -> List[str]:
    """The NVIDIA driver and the cards' names, from the kernel: asking torch takes seconds. Empty where it does not say."""
    found = []
    for path in sorted(DRIVER.glob("gpus/*/information")) + [DRIVER / "version"]:
        try:
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:
            continue
        found += [line for line in lines if line.startswith(("Model", "NVRM version"))]
    return found


def test(cases: List[Dict[str, Any]], gpus: int, folder: Path, check: Callable[[], None] = lambda: None) -> Dict[str, Any]:
    """Run the cases, their logs in ``folder`` -> {"ok", "cases", "worst", "seconds"}. Raises RunFailed saying what
    differs, with that as its document. ``check`` may raise a better reason why it has been stopped."""
    began = time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cases.json").write_text(json.dumps(cases), encoding="utf-8")
    parallel = cases[0]["run"]["parallel"]
    world = parallel["pipe"] * parallel["data"]
    command = [sys.executable] + RANK + [str(folder.resolve())]
    try:
        ranks = launch.Ranks(command, world, launch.environment(world, gpus), folder, lambda message: None)
        figures = launch.supervise(ranks)["figures"]
    except RunFailed as error:
        check()
        raise RunFailed("self-test: %s" % error) from None
    judged = [_judge(tested, found, gpus) for tested, found in zip(cases, figures)]
    worst = {name: max(found[name] for found in judged) for name in FIGURES}
    answer = {"ok": all(found["ok"] for found in judged), "cases": judged, "worst": worst}
    answer["seconds"] = round(time.monotonic() - began, 1)
    if not answer["ok"]:
        problems = "; ".join(found["problem"] for found in judged if not found["ok"])
        raise RunFailed("self-test: %s. This installation trains wrongly (run.self_test: false trains all the same). Log: %s"
                        % (problems, folder / "rank_0.log"), answer)  # fmt: skip
    shutil.rmtree(str(folder), ignore_errors=True)
    return answer


def _judge(tested: Dict[str, Any], found: Dict[str, Any], gpus: int) -> Dict[str, Any]:
    run, allowed = tested["run"], limits(tested["run"]["model"]["dtype"], gpus > 0)
    out = {
        "family": tested["family"], "tied": families.dims_of(tested["model"]).tied, "dtype": run["model"]["dtype"],
        "pipe": run["parallel"]["pipe"], "data": run["parallel"]["data"], "steps": tested["steps"], "limits": allowed,
    }  # fmt: skip
    out.update(found)
    wrong = [
        "%s is %.1e away from transformers' (limit %.0e)" % (text, found[name], allowed[name])
        for name, text in FIGURES.items()
        if not found[name] <= allowed[name]
    ]
    out["ok"] = not wrong
    if wrong:
        layer, slot = found["where"].split("/", 1)
        out["problem"] = "%s, %d stages x %d replicas, %s: %s; furthest: layer %s, %s" % (
            out["family"], out["pipe"], out["data"], out["dtype"], ", ".join(wrong), layer, slot)  # fmt: skip
    return out


def here(path: Optional[str], sets: Any, say: Say) -> Dict[str, Any]:
    """--self-test: the run.yaml's model family, dtype and stages, or without one every family on this machine."""
    raw = config.parse(MACHINE, "--self-test") if path is None else config.load(path, tuple(sets))
    where = "--self-test" if path is None else Path(path).name
    found = compat.versions()
    compat.check_deepspeed(found["deepspeed"])
    if path is None and os.environ.get("DS_ACCELERATOR") != "cpu" and compat.gpus().number == 1:
        raw.parallel.pipe = 1
    gpus = device.resolve_device(raw, found, where, say)
    dims = None if path is None else families.dims_of(families.read_config(str(_folder(raw.model.path))))
    cases = cases_of(raw, dims, gpus)
    answer = dict(test(cases, gpus, Path(tempfile.mkdtemp(prefix="pipedock-self-test-"))), key=key_of(cases, gpus))
    _record(answer, say)
    return answer


def _folder(path: str) -> Path:
    folder = weights.resolve(path, weights=False)
    return manifest.find_checkpoint(folder) if (folder / "checkpoints").is_dir() else folder


def once(prepared: prepare.Prepared, say: Say, node: int = 0, check: Callable[[], None] = lambda: None) -> None:
    """Before step 1 of a run: test this environment unless that has been done; the figures go into <out>/resolved. Each ``node``
    tests itself: it is its installation and its cards that may be broken. ``check`` raises what has happened on another node."""
    run, out, name = prepared.config, prepared.out, "self_test" if node == 0 else "self_test_node_%d" % node
    if not run.run.self_test:
        say("self-test: skipped (run.self_test: false)")
        return
    cases = cases_of(run, prepared.dims, prepared.gpus)
    key = key_of(cases, prepared.gpus)
    answer = recorded(key)
    if answer is None:
        say(
            "self-test: this environment is new; a tiny %s is compared with transformers first, under a minute"
            % prepared.dims.family
        )
        answer = dict(test(cases, prepared.gpus, out / "logs" / name, check), key=key)
        say(told(answer))
        _record(answer, say)
    (out / "resolved" / (name + ".json")).write_text(json.dumps(answer, indent=1) + "\n", encoding="utf-8")


def told(answer: Dict[str, Any]) -> str:
    """A passed test in one line."""
    return "self-test: passed in %.0f s, furthest from transformers: gradients %.0e, losses %.0e" % (
        answer["seconds"], answer["worst"]["gradients"], answer["worst"]["losses"])  # fmt: skip


def _file(key: str) -> Optional[Path]:
    folder = host.cache_folder()
    return folder / "self-test" / (key + ".json") if folder is not None else None


def recorded(key: str) -> Optional[Dict[str, Any]]:
    """The answer of a test that this environment has passed."""
    path = _file(key)
    try:
        answer = json.loads(path.read_text(encoding="utf-8")) if path is not None else None
    except (OSError, ValueError):
        return None
    return answer if isinstance(answer, dict) and answer.get("ok") is True and answer.get("key") == key else None


def _record(answer: Dict[str, Any], say: Say) -> None:
    path = _file(answer["key"])
    if path is None:
        say("self-test: passed, but that cannot be recorded: no home folder is known (set HOME or XDG_CACHE_HOME); the next train "
            "tests again")  # fmt: skip
        return
    aside = path.with_name("%s.%d" % (path.name, os.getpid()))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside.write_text(json.dumps(answer, indent=1) + "\n", encoding="utf-8")
        os.replace(str(aside), str(path))
    except OSError as error:
        say("self-test: passed, but that cannot be recorded (%s: %s); the next train tests again" % (path, error.strerror))
