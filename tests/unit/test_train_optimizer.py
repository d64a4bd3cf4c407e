"""The schedule's exact values, which optimizer is built where, and what a machine without compilers is told."""

import importlib.util
import logging
import sys
import types

import pytest

pytest.importorskip("deepspeed")
import torch  # noqa: E402

from pipeline_train import compat, config, device, native, optimizer  # noqa: E402
from pipeline_train.errors import UserError  # noqa: E402


def run(**sections):
    raw = {"run": {"out": "o"}, "model": {"path": "m"}, "data": {"train": "t"}, "parallel": {"pipe": 1}}
    for name, section in sections.items():
        raw[name] = dict(raw.get(name, {}), **section)
    return config.parse(raw)


def rates(total, **optim):
    made = run(optim=dict({"lr": 8.0}, **optim)).optim
    return [optimizer.learning_rate(made, step, total) for step in range(total)]


@pytest.mark.parametrize(
    "optim, wanted",
    [
        ({"schedule": "constant", "warmup": 4}, [2, 4, 6, 8, 8, 8]),
        ({"schedule": "linear", "warmup": 2, "floor": 0.0}, [4, 8, 8, 6, 4, 2]),
        ({"schedule": "linear", "warmup": 2, "floor": 0.5}, [4, 8, 8, 7, 6, 5]),
        # 8 x (0.25 + 0.75 x (1 + cos(pi k / 4)) / 2): cos is 1, 0.70710678, 0, -0.70710678
        ({"schedule": "cosine", "warmup": 2, "floor": 0.25}, [4, 8, 8, 7.12132034, 5, 2.87867966]),
        ({"schedule": "cosine", "floor": 0.0}, [8, 7.46410162, 6, 4, 2, 0.53589838]),
        ({"schedule": "cosine", "floor": 1.0, "warmup": 1}, [8, 8, 8, 8, 8, 8]),
        ({"schedule": "cosine", "warmup": 12}, [8 / 12, 16 / 12, 2, 32 / 12, 40 / 12, 4]),
    ],
)
def test_schedules_step_by_step(optim, wanted):
    assert rates(6, **optim) == pytest.approx(wanted, rel=1e-8)


def groups():
    return [{"params": [torch.nn.Parameter(torch.ones(6))], "weight_decay": 0.1},
            {"params": [torch.nn.Parameter(torch.ones(2))], "weight_decay": 0.0}]  # fmt: skip


def test_adamw_and_lion_get_every_key():
    optim = run(optim={"lr": 3e-4, "betas": [0.8, 0.7], "eps": 1e-5}).optim
    made = optimizer.build(groups(), optim, cuda=False, offload=False)
    assert type(made) is torch.optim.AdamW and [g["weight_decay"] for g in made.param_groups] == [0.1, 0.0]
    assert all((g["lr"], g["betas"], g["eps"]) == (3e-4, (0.8, 0.7), 1e-5) for g in made.param_groups)
    optim.type = "lion"
    made = optimizer.build(groups(), optim, cuda=False, offload=False)
    assert type(made).__module__.startswith("lion_pytorch") and [g["weight_decay"] for g in made.param_groups] == [0.1, 0.0]
    assert all((g["lr"], g["betas"]) == (3e-4, (0.8, 0.7)) for g in made.param_groups)


@pytest.mark.parametrize("wanted, cuda, reason, offload, triton", [
    ("auto", True, None, False, True), (True, True, None, False, True), (False, True, None, False, False),
    ("auto", True, "no compiler", False, False), ("auto", False, None, False, False), ("auto", True, None, True, False),
])  # fmt: skip
def test_lion_takes_the_triton_kernel_where_it_runs(monkeypatch, wanted, cuda, reason, offload, triton):
    asked = []

    def lion(groups, use_triton, **keys):
        asked.append(use_triton)
        return types.SimpleNamespace(update_fn=print)

    monkeypatch.setitem(sys.modules, "lion_pytorch", types.SimpleNamespace(Lion=lion))
    monkeypatch.setattr(native, "without_triton", lambda gpus: reason if gpus else "there is no GPU")
    monkeypatch.setattr(native, "without_cpu_adam", lambda: "there is no C++ compiler")
    optimizer.build(groups(), run(optim={"type": "lion", "use_triton": wanted}).optim, cuda, offload)
    assert asked == [triton]


def test_lion_by_pieces_is_lion(monkeypatch):
    from lion_pytorch import Lion

    monkeypatch.setattr(optimizer, "LION_PIECE", 4)
    results = []
    for build in (lambda made: optimizer.build(made, run(optim={"type": "lion", "lr": 0.1}).optim, False, False),
                  lambda made: Lion(made, lr=0.1, betas=(0.9, 0.95))):  # fmt: skip
        made = groups()
        lion = build(made)
        for step in range(3):
            for group in made:
                group["params"][0].grad = torch.randn(len(group["params"][0]), generator=torch.Generator().manual_seed(step))
            lion.step()
        results.append([x for g in made for x in (g["params"][0].detach(), lion.state[g["params"][0]]["exp_avg"])])
    assert all(torch.equal(a, b) for a, b in zip(*results)) and not torch.equal(results[0][0], torch.ones(6))


def test_offload_without_a_compiler_takes_torchs_optimizer(monkeypatch, caplog):
    monkeypatch.setenv("CXX", "/no/compiler")
    with caplog.at_level(logging.WARNING, "pipedock"):
        made = optimizer.build(groups(), run().optim, cuda=True, offload=True)
    assert type(made) is torch.optim.AdamW
    assert "DeepSpeed's CPU adamw cannot be built (there is no C++ compiler); a slower one takes its place" in caplog.text


def test_offload_where_the_build_fails_takes_torchs_optimizer(monkeypatch, caplog):
    from deepspeed.ops import adam

    def broken(*args, **keys):
        raise RuntimeError("the op failed") from OSError("CUDA_HOME does not exist,\nunable to compile")

    monkeypatch.setattr(native, "without_cpu_adam", lambda: None)
    monkeypatch.setattr(adam, "DeepSpeedCPUAdam", broken)
    with caplog.at_level(logging.WARNING, "pipedock"):
        assert type(optimizer.build(groups(), run().optim, cuda=True, offload=True)) is torch.optim.AdamW
    assert "cannot be built (CUDA_HOME does not exist, unable to compile)" in caplog.text


def test_the_step_counter_is_what_each_optimizer_keeps():
    class Own(torch.optim.SGD):
        pass

    Own.__module__ = "deepspeed.ops.adam.cpu_adam"
    made, state = optimizer.build(groups(), run().optim, False, False), {}
    optimizer.set_step(made, made.param_groups[0], state, 7)
    assert torch.is_tensor(state["step"]) and float(state["step"]) == 7
    optimizer.set_step(Own(groups(), lr=1.0), {}, state, 8)
    assert state["step"] == 8 and isinstance(state["step"], int)
    before = dict(state)
    lion = optimizer.build(groups(), run(optim={"type": "lion"}).optim, False, False)
    optimizer.set_step(lion, lion.param_groups[0], state, 9)
    assert state == before


def test_what_cannot_be_compiled_here(monkeypatch, tmp_path):
    for name in ("CC", "CXX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert native.without_cpu_adam() == "there is no C++ compiler"
    assert native.without_triton(0) == "there is no GPU" and native.without_triton(1) == "triton is not installed"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    assert native.without_triton(1) == "there is no C compiler"
    for name in ("gcc", "g++", "mine"):
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    assert native.without_cpu_adam() is None and native.without_triton(1) is None
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert native.without_cpu_adam() == "ninja is not installed"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setenv("CXX", "/no/compiler")
    assert native.without_cpu_adam() == "there is no C++ compiler"
    monkeypatch.setenv("CXX", "mine -O2")
    assert native.without_cpu_adam() is None


@pytest.mark.parametrize(
    "ops, reason", [("{'cpu_adam': 1, 'utils': 1}", None), ("{'cpu_adam': False, 'utils': 1}", "there is no C++ compiler")]
)
def test_an_operator_that_was_installed_compiled_needs_no_compiler(monkeypatch, tmp_path, ops, reason):
    (tmp_path / "deepspeed").mkdir()
    (tmp_path / "deepspeed/git_version_info_installed.py").write_text("version='0.9.2'\ninstalled_ops=%s\ntorch_info={}\n" % ops)
    monkeypatch.setattr(sys, "path", [str(tmp_path / "none"), str(tmp_path)])
    monkeypatch.setenv("CXX", "/no/compiler")
    assert native.without_cpu_adam() == reason


def resolve(monkeypatch, gpus, **sections):
    """-> (the configuration, what was said) after prepare has looked at a machine with so many GPUs."""
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.setattr(compat, "gpus", lambda: compat.Gpus(gpus, "NVIDIA H100 80GB HBM3", True))
    made, said = run(**sections), []
    device.resolve_device(made, compat.versions(), "run.yaml", said.append)
    return made, said


def test_offload_says_what_does_the_step(monkeypatch):
    monkeypatch.setattr(native, "without_cpu_adam", lambda: "there is no C++ compiler")
    made, said = resolve(monkeypatch, 1, parallel={"offload": True})
    assert made.parallel.offload is True and said == [
        "parallel.offload: there is no C++ compiler, so DeepSpeed's CPU optimizer cannot be built; a slower one does the step"
    ]  # fmt: skip
    made, said = resolve(monkeypatch, 0, parallel={"offload": True})
    assert made.parallel.offload is False and said == ["parallel.offload: has no effect on the CPU"]
    monkeypatch.setattr(native, "without_cpu_adam", lambda: None)
    assert resolve(monkeypatch, 1, parallel={"offload": True})[1] == []


def test_a_triton_kernel_that_cannot_run_is_refused_when_it_was_demanded(monkeypatch):
    monkeypatch.setattr(native, "without_triton", lambda gpus: None if gpus else "there is no GPU")
    with pytest.raises(UserError, match="run.yaml: optim.use_triton: there is no GPU; use false, or auto"):
        resolve(monkeypatch, 0, optim={"type": "lion", "use_triton": True})
    resolve(monkeypatch, 1, optim={"type": "lion", "use_triton": True})
    resolve(monkeypatch, 0, optim={"type": "lion"})


def test_offload_param_is_told_to_do_nothing(monkeypatch):
    said = resolve(monkeypatch, 1, deepspeed={"zero_optimization": {"offload_param": {"device": "cpu"}}})[1]
    assert said == ["deepspeed.zero_optimization.offload_param: has no effect below stage 3"]
