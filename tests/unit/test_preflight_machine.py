"""What preflight finds on one machine: each check fails on facts that are wrong, with cause and fix, and passes on good ones."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Dict, List

import pytest

from pipeline_train import config, families, host
from pipeline_train.preflight import gpus, machine
from pipeline_train.preflight.finding import FAILURE, NOTE, OK, WARNING, Finding, lines
from pipeline_train.preflight.need import need, stage_of
from tests.models import tiny_config

ROOT = Path(__file__).resolve().parents[2]
MIB, GIB = 1 << 20, 1 << 30


def card(index: int = 0, free: int = 79 * GIB, **changed: Any) -> Dict[str, Any]:
    row = {"index": index, "uuid": "GPU-%d" % index, "name": "NVIDIA H100 80GB HBM3", "driver": "550.54", "total": 80 * GIB,
           "free": free, "processes": []}  # fmt: skip
    return dict(row, **changed)


def facts(**changed: Any) -> Dict[str, Any]:
    """A healthy machine with two GPUs."""
    good: Dict[str, Any] = {
        "versions": {"python": "3.11.7", "deepspeed": "0.19.8", "torch": "2.13.0", "transformers": "4.57.6"},
        "shm": {"size": 8 * GIB, "free": 8 * GIB}, "limits": {"memlock": [None, None], "stack": [8 * MIB, None],
                                                              "nofile": [65536, 65536]},
        "memory": {"available": 100 * GIB, "limit": None}, "infiniband": False, "container": False,
        "disk": {"path": "runs/x", "size": 900 * GIB, "free": 800 * GIB, "wrong": ""}, "ranks": 2, "files": {},
        "weights": "",
        "gpus": {"cards": [card(0), card(1)], "torch": 2, "error": "", "cpu": False, "no_cpu": ""},
        "need": {"gpu": [40 * GIB, 40 * GIB], "host": 0, "copy": 20 * GIB, "checkpoint": 80 * GIB, "checkpoints": 4}, "world": 2,
    }  # fmt: skip
    for key, value in changed.items():
        good[key] = dict(good[key], **value) if isinstance(value, dict) and isinstance(good[key], dict) else value
    return json.loads(json.dumps(good))  # as it travels


def only(findings: List[Finding], level: str, *words: str) -> None:
    """One finding, of this level, with all these words in it."""
    assert [finding.level for finding in findings] == [level], findings
    [line] = lines(findings, level, "abcde")
    assert [word for word in words if word not in line] == [], line
    assert bool(findings[0].fix) or level in (OK, NOTE), "nothing said about what to do: %s" % line


def test_a_healthy_machine_passes() -> None:
    assert {finding.level for finding in machine.check(facts()) + gpus.check(facts())} == {OK}


@pytest.mark.parametrize("version, words", [
    ("0.16.4", ["deepspeed 0.16.4 is refused", "DeepSpeed #7773", "pip install deepspeed==0.19.8"]),
    (None, ["deepspeed is not installed", "pip install deepspeed==0.19.8"]),
])  # fmt: skip
def test_a_refused_deepspeed(version: Any, words: List[str]) -> None:
    only(machine.check_versions(facts(versions={"deepspeed": version})), FAILURE, "versions:", *words)


def test_other_versions() -> None:
    only(machine.check_versions(facts(versions={"torch": None})), FAILURE, "torch is not installed", "pip install torch")
    only(machine.check_versions(facts(versions={"deepspeed": "0.19.4"})), WARNING, "0.19.4 is not one of the tested", "==0.19.8")
    old = machine.check_versions(facts(versions={"deepspeed": "0.17.0", "torch": "1.13.1"}))
    only(old, FAILURE, "pip install deepspeed==0.9.2")


def test_a_small_shm_in_a_container_and_outside() -> None:
    small = {"size": 64 * MIB, "free": 64 * MIB}
    only(machine.check_shm(facts(shm=small)), FAILURE, "/dev/shm: 64 MiB", "NCCL needs", "sudo mount -o remount,size=8G /dev/shm")
    only(machine.check_shm(facts(shm=small, container=True)), FAILURE, "--shm-size 8g", "--ipc host", "shm_size: 8gb")
    only(machine.check_shm(facts(shm={"free": MIB})), FAILURE, "8.0 GiB, 1 MiB free", "remove what fills it: ls -lS /dev/shm")
    only(machine.check_shm(dict(facts(), shm=None)), FAILURE, "is not there", "sudo mount -t tmpfs")


def test_a_small_shm_harms_nobody_on_one_gpu_or_none() -> None:
    small = {"size": 64 * MIB, "free": 64 * MIB}
    only(machine.check_shm(facts(shm=small, ranks=1)), OK, "64 MiB")
    only(machine.check_shm(facts(shm=small, gpus={"cards": []})), OK, "64 MiB")
    only(machine.check_shm(dict(facts(gpus={"cards": []}), shm=None)), NOTE, "is not there")


def test_limits() -> None:
    low = facts(limits={"memlock": [8 * MIB, 8 * MIB]})
    only(machine.check_limits(low), WARNING, "ulimit memlock: 8 MiB", "ulimit -l unlimited", "limits.conf")
    only(machine.check_limits(dict(low, infiniband=True)), FAILURE, "InfiniBand pins more", "ulimit -l unlimited")
    only(machine.check_limits(dict(low, container=True)), WARNING, "--ulimit memlock=-1")
    only(machine.check_limits(facts(limits={"memlock": [8 * MIB, 8 * MIB]}, gpus={"cards": []})), OK, "memlock 8 MiB")
    only(machine.check_limits(facts(limits={"stack": [MIB, None]})), WARNING, "ulimit stack: 1 MiB", "ulimit -s 65536")
    few = facts(limits={"nofile": [1024, 4096]}, world=64)
    only(machine.check_limits(few), FAILURE, "ulimit nofile: 1024", "64 processes need about 1536", "ulimit -n 65536")
    only(machine.check_limits(facts(limits={"nofile": [1024, 4096]})), OK, "nofile 1024")


def test_a_real_limit_is_measured() -> None:
    """As a container sets it: in a process of its own, which cannot raise it again."""
    code = "import json, resource\nresource.setrlimit(resource.RLIMIT_NOFILE, (300, 300))\n" \
           "from pipeline_train.preflight import machine\nprint(json.dumps(machine.measure(None)))"  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=dict(os.environ, PYTHONPATH=str(ROOT))
    )
    assert done.returncode == 0, done.stderr
    measured = dict(facts(), **json.loads(done.stdout))
    [found] = [f for f in machine.check_limits(measured) if f.check == "ulimit nofile"]
    only([found], FAILURE, "ulimit nofile: 300", "need about 544")


def test_where_a_run_cannot_be_kept(tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "file").write_text("x")
    assert machine.measure(tmp_path / "file")["disk"]["wrong"] == "%s is no folder" % (tmp_path / "file")
    assert machine.measure(tmp_path / "new" / "run")["disk"]["wrong"] == ""
    monkeypatch.setattr(machine.os, "access", lambda path, mode: False)  # a read-only disk; root may write everywhere else
    assert machine.measure(tmp_path / "new" / "run")["disk"]["wrong"] == "%s cannot be written" % tmp_path


def test_disk() -> None:
    only(machine.check_disk(facts(disk={"free": 10 * GIB})), FAILURE, "disk: runs/x: 10.0 GiB free",
         "one checkpoint needs 80.0 GiB", "run.out")  # fmt: skip
    only(machine.check_disk(facts(disk={"free": 200 * GIB})), WARNING, "room for 4 checkpoints, 320.0 GiB", "train.keep")
    only(machine.check_disk(facts(disk={"wrong": "/data cannot be written"})), FAILURE, "disk: runs/x: /data cannot be written",
         "run.out")  # fmt: skip
    assert machine.check_disk(dict(facts(), need=None)) == machine.check_disk(dict(facts(), disk=None)) == []


def test_memory_and_a_containers_limit() -> None:
    tight = facts(memory={"available": GIB}, need={"host": 2 * GIB})
    only(machine.check_memory(tight), FAILURE, "memory: 1.0 GiB available", "take 2.0 GiB here", "more stages")
    limited = facts(memory={"available": GIB, "limit": 2 * GIB}, need={"host": 2 * GIB})
    only(machine.check_memory(limited), FAILURE, "limit of the container: 2.0 GiB", "docker run --memory", "mem_limit")
    only(machine.check_memory(facts(memory={"available": 10 * GIB})), WARNING, "steps wait for saves")
    only(machine.check_memory(dict(facts(), memory={"available": None, "limit": None})), NOTE, "does not tell")
    only(machine.check_memory(dict(facts(), need=None)), OK, "100.0 GiB available")


def test_the_limit_of_a_container_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "GROUPS", tmp_path)
    assert host.memory_limit() is None
    (tmp_path / "memory.max").write_text("max\n")
    assert host.memory_limit() is None
    (tmp_path / "memory.max").write_text("%d\n" % GIB)
    assert host.memory_limit() == GIB
    (tmp_path / "memory").mkdir()
    (tmp_path / "memory" / "memory.limit_in_bytes").write_text("9223372036854771712\n")
    (tmp_path / "memory.max").unlink()
    assert host.memory_limit() is None


def test_files_that_are_not_here() -> None:
    only(
        machine.check_files(facts(files={"data.train": "data/x.jsonl"})),
        FAILURE,
        "data.train: data/x.jsonl is not here",
        "rsync -a",
    )
    only(machine.check_files(facts(files={"model.path": "/models/x"})), FAILURE, "model.path: /models/x is not here")
    only(machine.check_files(facts(files={"model.path": "org/name"})), NOTE, "asks the hub for it")


def test_weights_that_training_could_not_start_from() -> None:
    said = "/models/x: no weights here"
    only(machine.check_files(facts(weights=said)), FAILURE, "model.path: " + said, "copy the model again, or set model.path")


def test_no_gpu_is_said_plainly() -> None:
    none = {"cards": [], "torch": 0}
    only(gpus.check(facts(gpus=none)), NOTE, "GPUs: no GPU here: training runs on the CPU")
    old = "deepspeed 0.9.2 trains on GPUs only, and none is here; on CPUs use deepspeed 0.19.8 (Python >= 3.10)"
    only(
        gpus.check(facts(gpus=dict(none, no_cpu=old))),
        FAILURE,
        "deepspeed 0.9.2 trains on GPUs only",
        "on CPUs use deepspeed 0.19.8",
    )
    only(gpus.check(facts(gpus=dict(none, cpu=True))), NOTE, "DS_ACCELERATOR=cpu: training runs on the CPU")


def test_a_driver_that_does_not_work() -> None:
    broken = {"cards": [], "torch": None, "error": "nvidia-smi: Failed to initialize NVML: Driver/library version mismatch"}
    only(gpus.check(facts(gpus=broken)), FAILURE, "version mismatch", "sudo reboot")
    broken["error"] = "torch cannot be imported: No module named 'torch'"
    only(gpus.check(facts(gpus=broken)), FAILURE, "torch cannot be imported", "pip install")
    only(gpus.check(facts(gpus={"torch": 0})), FAILURE, "nvidia-smi sees 2 (NVIDIA H100 80GB HBM3, driver 550.54)",
         "torch 2.13.0 can use none", "install a torch built for this driver's CUDA")  # fmt: skip


def test_too_few_gpus() -> None:
    only(gpus.check(facts(ranks=4)), FAILURE, "4 processes are to run here, 2 GPUs can be used", "lower slots in the hostfile")


def test_a_full_gpu_and_who_fills_it() -> None:
    guest = [{"pid": 123, "name": "python3", "bytes": 70 * GIB}]
    full = facts(gpus={"cards": [card(0), card(1, free=10 * GIB, processes=guest)]})
    only(gpus.check(full), FAILURE, "GPU 1 (NVIDIA H100 80GB HBM3): 10.0 GiB of 80.0 GiB are free, this run needs about 40.0 GiB",
         "held by pid 123 (python3, 70.0 GiB)", "kill 123")  # fmt: skip
    hidden = facts(gpus={"cards": [card(0), card(1, free=10 * GIB)]})
    only(gpus.check(hidden), FAILURE, "GPU 1", "sudo fuser -v /dev/nvidia*")
    large = facts(need={"gpu": [90 * GIB, 40 * GIB]})
    only(gpus.check(large), FAILURE, "GPU 0", "needs about 90.0 GiB", "use more stages (parallel.pipe)")
    # Free cards beside the run's may be full.
    assert gpus.check(facts(gpus={"cards": [card(0), card(1), card(2, free=0)], "torch": 3}))[0].level == OK


def test_foreign_processes_that_leave_enough() -> None:
    guest = [{"pid": 7, "name": "Xorg", "bytes": None}]
    shared = facts(gpus={"cards": [card(0, processes=guest), card(1)]})
    only(gpus.check(shared), WARNING, "other processes are on it: pid 7 (Xorg, ?)", "kill 7")
    only(gpus.check(dict(facts(gpus={"cards": [card(0, free=70 * GIB), card(1)]}), need=None)), WARNING, "cannot be seen from here")


def test_nvidia_smi_is_read() -> None:
    cards = "0, GPU-aa, NVIDIA H100 80GB HBM3, 550.54.15, 81559, 81000\n1, GPU-ab, NVIDIA H100 80GB HBM3, 550.54.15, 81559, [N/A]\n"
    found = gpus.parse(cards, "GPU-ab, 4242, /usr/bin/python3 -c a, b, 1000\nGPU-zz, 1, gone, 5\nGPU-aa, [N/A], x, 1\n")
    assert [row["index"] for row in found] == [0, 1] and found[0]["free"] == 81000 * MIB and found[1]["free"] is None
    assert found[0]["processes"] == []
    assert found[1]["processes"] == [{"pid": 4242, "name": "/usr/bin/python3 -c a,b", "bytes": 1000 * MIB}]


@pytest.mark.parametrize("wish, kept", [(None, [0, 1, 2]), ("1", [1]), ("2,0", [2, 0]), ("GPU-1", [1]), ("", []), ("0,9,1", [0])])
def test_cuda_visible_devices(wish: Any, kept: List[int]) -> None:
    assert [row["index"] for row in gpus.visible([card(0), card(1), card(2)], wish)] == kept


def test_a_real_nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of this test's own: it answers, fails, hangs."""
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\ncase $1 in --query-gpu*) echo '0, GPU-aa, Tesla T4, 515.65.01, 15360, 15000';; esac\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path) + os.pathsep + os.environ["PATH"])
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(gpus.compat, "gpus", lambda: gpus.compat.Gpus(1, "Tesla T4", False))
    found = gpus.measure()
    assert found["error"] == "" and found["torch"] == 1 and found["cards"][0]["driver"] == "515.65.01"
    tool.write_text("#!/bin/sh\necho 'No devices were found'; exit 6\n")
    assert gpus.measure()["error"] == "" and gpus.measure()["cards"] == []
    tool.write_text("#!/bin/sh\necho 'Driver/library version mismatch'; exit 18\n")
    assert gpus.measure()["error"] == "nvidia-smi: Driver/library version mismatch"
    tool.write_text("#!/bin/sh\nexec sleep 20\n")
    monkeypatch.setattr(gpus, "PATIENCE_S", 0.2)
    assert "does not answer" in gpus.measure()["error"]
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert gpus.measure()["error"] == ""


def test_nodes_with_other_cards() -> None:
    other = facts(gpus={"cards": [card(0, name="NVIDIA A100", driver="535.1")], "torch": 1})
    assert gpus.check_same([facts(), facts()]) == []
    only(gpus.check_same([facts(), other]), WARNING, "node 1: NVIDIA A100, driver 535.1", "parallel.parts")
    none = facts(gpus={"cards": [], "torch": 0})
    only(gpus.check_same([facts(), none]), FAILURE, "some have none", "node 1: none", "DS_ACCELERATOR=cpu")


def run_of(**sections: Any) -> config.RunConfig:
    raw: Dict[str, Any] = {"run": {"out": "x"}, "model": {"path": "x"}, "data": {"train": "x", "seq_len": 64},
                           "parallel": {"pipe": 2, "data": 2}}  # fmt: skip
    return config.parse(dict(raw, **sections))


def test_what_a_run_takes_of_a_node() -> None:
    raw = tiny_config("llama", vocab_size=600)
    dims = families.dims_of(raw)
    run = run_of()
    first, second = need(run, dims, raw, True, 0, 2), need(run, dims, raw, True, 2, 2)
    assert first["checkpoints"] == 4 and first["checkpoint"] == second["checkpoint"] > 0
    assert len(first["gpu"]) == 2 and first["gpu"][0] == first["gpu"][1] > GIB, "two replicas of a stage"
    cpu = need(run, dims, raw, False, 0, 4)
    assert cpu["gpu"] is None and cpu["host"] > need(run, dims, raw, False, 0, 2)["host"] > 0
    assert need(run_of(train={"async_save": False}), dims, raw, True, 0, 2)["copy"] == 0 < first["copy"]
    assert run == run_of(), "the run itself is left as it was"


def test_the_stage_of_a_rank() -> None:
    run = run_of()
    assert [stage_of(run, rank) for rank in range(4)] == [0, 0, 1, 1]
    run.parallel.axes = ["data", "pipe"]
    assert [stage_of(run, rank) for rank in range(4)] == [0, 1, 0, 1]


def test_facts_are_not_changed_by_checks() -> None:
    before = facts(gpus={"cards": [card(0, free=0), card(1)]})
    after = copy.deepcopy(before)
    machine.check(after), gpus.check(after)
    assert after == before
