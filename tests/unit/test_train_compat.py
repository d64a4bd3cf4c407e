"""What differs between the stacks, and which DeepSpeed releases are refused."""

import inspect
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from pipeline_train import compat, config, device
from pipeline_train.errors import RunFailed, UserError


@pytest.mark.parametrize("version", ["0.9.2", "0.15.4", "0.19.3", "0.19.8", "0.20.0", "1.0"])
def test_releases_with_right_gradients_are_accepted(version):
    compat.check_deepspeed(version)


@pytest.mark.parametrize("version, reason", [
    ("0.16.0", "sums gradients"), ("0.17.5", "sums gradients"), ("0.18.2", "sums gradients"), ("0.18.3", "hang"),
    ("0.18.9", "divides gradients again"), ("0.19.0", "divides gradients again"), ("0.19.2+cu124", "divides gradients again"),
])  # fmt: skip
def test_releases_with_wrong_gradients_are_refused_with_the_reason(version, reason):
    with pytest.raises(UserError, match=reason) as refused:
        compat.check_deepspeed(version)
    assert str(refused.value).startswith("deepspeed %s is refused" % version)
    assert str(refused.value).endswith("Install 0.19.8 or 0.9.2.") and "\n" not in str(refused.value)


def test_a_missing_deepspeed_says_what_to_install():
    with pytest.raises(UserError, match=r'deepspeed is not installed; install "pipedock\[train\]"'):
        compat.check_deepspeed(None)


def test_every_refused_row_names_its_evidence():
    assert all("DeepSpeed #" in row.reason and row.first <= row.last for row in compat.REFUSED)


def test_bf16_is_refused_before_0_9_3():
    with pytest.raises(UserError, match="model.dtype: bf16 does not work in deepspeed 0.9.2"):
        compat.check_dtype("0.9.2", "bf16")
    compat.check_dtype("0.9.2", "fp16")
    compat.check_dtype("0.19.8", "bf16")


def test_a_deepspeed_without_cpus_is_refused_where_no_gpu_is(monkeypatch):
    monkeypatch.setattr(compat.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"deepspeed 0.9.2 trains on GPUs only, and none is here; on CPUs use deepspeed 0.19.8"):
        compat.check_cpu("0.9.2")
    compat.check_cpu("0.19.8")
    compat.check_cpu(None)  # said by check_deepspeed
    monkeypatch.setattr(compat.importlib.util, "find_spec", lambda name: name == "intel_extension_for_deepspeed")
    compat.check_cpu("0.9.2")


def test_training_asks_for_cpu_support_when_there_is_no_gpu(monkeypatch):
    run = config.parse({"run": {"out": "o"}, "model": {"path": "m"}, "data": {"train": "t"}, "parallel": {"pipe": 1}})
    monkeypatch.setattr(compat.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    with pytest.raises(UserError, match="trains on GPUs only"):
        device.resolve_device(run, {"deepspeed": "0.9.2"}, "run.yaml", print)
    monkeypatch.delenv("DS_ACCELERATOR")
    monkeypatch.setattr(compat, "gpus", lambda: compat.Gpus(1, "Tesla V100", False))
    assert device.resolve_device(run, {"deepspeed": "0.9.2"}, "run.yaml", print) == 1 and run.model.dtype == "fp16"


def test_untested_releases_get_a_note():
    assert compat.notes({"deepspeed": "0.19.8"}) == []
    assert "0.15.4 is not one of the tested releases" in compat.notes({"deepspeed": "0.15.4"})[0]


def test_versions_are_read_without_importing_anything():
    code = "import sys; from pipeline_train import compat; print(compat.versions()['torch'], 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == [compat.versions()["torch"], "False"]


def test_gpus_are_asked_of_torch_in_another_process(monkeypatch, tmp_path):
    monkeypatch.setattr(compat.shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    (tmp_path / "torch.py").write_text("raise OSError('libcudart.so is missing')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(RunFailed, match="torch cannot be imported: OSError: libcudart.so is missing"):
        compat.gpus()
    fake = "class cuda:\n    device_count = staticmethod(lambda: 2)\n    get_device_name = staticmethod(lambda i: 'Tesla V100')\n"
    fake += "    get_device_capability = staticmethod(lambda i: (7, 0))\n"
    fake += "class version:\n    hip = None\n"
    (tmp_path / "torch.py").write_text(fake)
    assert compat.gpus() == compat.Gpus(2, "Tesla V100", False, False)
    (tmp_path / "torch.py").write_text(fake.replace("(7, 0)", "(9, 0)"))
    assert compat.gpus() == compat.Gpus(2, "Tesla V100", True, True)
    (tmp_path / "torch.py").write_text(fake.replace("(7, 0)", "(9, 0)").replace("hip = None", "hip = '7.0'"))  # its fp8 is another
    assert compat.gpus() == compat.Gpus(2, "Tesla V100", True, False)


def test_grouped_queries_are_compared_where_transformers_has_them():
    assert [compat.has_grouped_queries(version) for version in (None, "4.30.2", "4.31.0", "5.17.0")] == [False, False, True, True]


class Zero:
    """What clip_fp32 sees of ZeRO-1's optimizer: one gradient of norm 5, or one that overflowed."""

    def __init__(self, dtype, overflow=False, offload=False):
        self.dtype, self.overflow, self.cpu_offload, self.loss_scale = dtype, overflow, offload, 1.0
        self._global_grad_norm, self.looked = 0.0, 0
        self.gradient = torch.tensor([3.0, 4.0])
        self.averaged_gradients = {} if offload else {0: [self.gradient]}
        flat = torch.nn.Parameter(torch.zeros(2))
        flat.grad = self.gradient if offload else None
        self.single_partition_of_fp32_groups = [flat]

    def check_overflow(self, partition_gradients=True):
        self.looked += 1

    def scaled_global_norm(self):
        return float(self.gradient.norm())

    def unscale_and_clip_grads(self, gradients, norm):
        for part in gradients:
            for gradient in part if isinstance(part, list) else [part]:
                gradient.mul_(1 / max(1.0, norm / 0.5))


@pytest.mark.parametrize("offload", [False, True])
def test_fp32_gradients_are_clipped_where_deepspeed_does_it_for_fp16_only(offload):
    zero = Zero(torch.float32, offload=offload)
    compat.clip_fp32(zero, "0.9.2")
    zero.check_overflow()
    assert (zero.looked, zero._global_grad_norm) == (1, 5.0) and zero.gradient.tolist() == pytest.approx([0.3, 0.4])


@pytest.mark.parametrize("dtype, version, overflow", [
    (torch.float16, "0.9.2", False), (torch.float32, "0.19.8", False), (torch.float32, "0.9.2", True),
])  # fmt: skip
def test_nothing_is_clipped_twice_and_no_overflow_is_hidden(dtype, version, overflow):
    zero = Zero(dtype, overflow)
    compat.clip_fp32(zero, version)
    zero.check_overflow()
    assert (zero.looked, zero._global_grad_norm, zero.gradient.tolist()) == (1, 0.0, [3.0, 4.0])


def test_what_this_torch_has():
    release = compat.release(torch.__version__)
    assert compat.has_sdpa() == (release >= (2, 0, 0))
    assert (compat.fused_adamw(True), compat.fused_adamw(False)) == (release >= (2, 0, 0), release >= (2, 4, 0))


def test_what_a_release_knows():
    assert [compat.has_bf16(version) for version in ("0.9.2", "0.9.3", "0.19.8", None)] == [False, True, True, True]
    assert [compat.has_grouped_queries(version) for version in ("4.30.2", "4.31.0", None)] == [False, True, False]


def test_quiet_cpu_ops_is_there_on_every_stack():
    import deepspeed

    compat.quiet_cpu_ops()
    assert deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] is False


def test_operators_of_our_own_are_there_where_torch_makes_them():
    assert compat.has_custom_ops() == hasattr(torch.library, "custom_op")
    assert compat.has_wide_products() == hasattr(torch.ops.aten.addmm, "dtype_out")


def test_deepspeeds_timer_waits_for_no_gpu_any_more(monkeypatch):
    from deepspeed.utils import timer

    waited = []
    monkeypatch.setattr(timer, "get_accelerator", lambda: SimpleNamespace(synchronize=lambda: waited.append(1)))
    settings = SimpleNamespace(enabled=True, synchronized=True)
    arguments = (settings, 1, 0) if "config" in inspect.signature(timer.ThroughputTimer.__init__).parameters else (1, 0)
    engine = SimpleNamespace(tput_timer=timer.ThroughputTimer(*arguments))
    engine.tput_timer.start()
    engine.tput_timer.stop(global_step=True)
    before = len(waited)
    compat.stop_timing(engine)
    engine.tput_timer.start()
    engine.tput_timer.stop(global_step=True, report_speed=False)
    assert before > 0 and len(waited) == before
