"""A CPU accelerator for DeepSpeed 0.9.2, which has none. For tests only: nothing of pipedock imports it.

DeepSpeed 0.9.2 knows one accelerator besides CUDA: where a module of this name can be imported, ``get_accelerator()`` takes its
``XPU_Accelerator``. So this folder in PYTHONPATH (tests/conftest.py puts it there, on that stack only) gives every rank a CPU,
whoever starts it, without importing anything before DeepSpeed itself asks. Newer releases have a CPU accelerator and are told by
DS_ACCELERATOR.
"""

import contextlib
import os
import sys

import torch
from deepspeed.accelerator.cuda_accelerator import CUDA_Accelerator
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors


class Event:
    """A CPU is never behind: whatever was recorded has happened."""

    def __init__(self, enable_timing=False, blocking=False):
        pass

    def record(self, stream=None):
        pass

    def wait(self, stream=None):
        pass

    def synchronize(self):
        pass

    def query(self):
        return True

    def elapsed_time(self, end):
        return 0.0


class Stream:
    def synchronize(self):
        pass

    def wait_event(self, event):
        pass

    def wait_stream(self, stream):
        pass


class UtilsBuilder:
    """The only operation of DeepSpeed that a pipeline with ZeRO-1 uses; compiled, it is these two functions of torch."""

    def load(self, verbose=True):
        return self

    flatten = staticmethod(_flatten_dense_tensors)
    unflatten = staticmethod(_unflatten_dense_tensors)


def by_type(tensors):
    """[tensor] -> [[tensors of one type], ...]"""
    buckets = {}
    for tensor in tensors:
        buckets.setdefault(tensor.dtype, []).append(tensor)
    return list(buckets.values())


def _nothing(*_, **__):
    pass


def _zero(*_, **__):
    return 0


class CPU_Accelerator(CUDA_Accelerator):
    """What asks for a device, a stream or a figure is answered for a CPU; the rest is inherited."""

    Event, Stream = Event, Stream
    ByteTensor, IntTensor, LongTensor = torch.ByteTensor, torch.IntTensor, torch.LongTensor
    FloatTensor, DoubleTensor = torch.FloatTensor, torch.DoubleTensor
    HalfTensor, BFloat16Tensor = torch.HalfTensor, torch.BFloat16Tensor
    set_device = synchronize = empty_cache = reset_peak_memory_stats = _nothing
    reset_max_memory_allocated = reset_max_memory_cached = range_push = range_pop = _nothing
    memory_allocated = max_memory_allocated = memory_cached = max_memory_cached = _zero
    memory_reserved = max_memory_reserved = current_device = _zero

    def __init__(self):
        super().__init__()
        self._name, self._communication_backend_name = "cpu", "gloo"
        self.class_dict["UtilsBuilder"] = UtilsBuilder

    def device_name(self, device_index=None):
        return "cpu"

    def current_device_name(self):
        return "cpu"

    def device(self, device_index=None):
        return contextlib.nullcontext()

    def device_count(self):
        return os.cpu_count()

    def is_available(self):
        """Asked by ZeRO's constructor: when the module is loaded in which one function knows gradients by the names of CUDA's
        tensor types, and would reduce none of ours over the replicas."""
        zero = sys.modules.get("deepspeed.runtime.zero.stage_1_and_2")
        if zero is not None:
            zero.split_half_float_double = by_type
        return True

    def is_bf16_supported(self):
        return False

    def is_fp16_supported(self):
        return False

    def stream(self, stream):
        return contextlib.nullcontext()

    def current_stream(self, device_index=None):
        return Stream()

    default_stream = current_stream

    def manual_seed(self, seed):
        return torch.manual_seed(seed)

    manual_seed_all = manual_seed

    def initial_seed(self, seed=None):
        return torch.initial_seed()

    def get_rng_state(self, device_index=None):
        return torch.get_rng_state()

    def set_rng_state(self, new_state, device_index=None):
        torch.set_rng_state(new_state)

    def lazy_call(self, callback):
        callback()

    def pin_memory(self, tensor):
        return tensor

    def on_accelerator(self, tensor):
        return tensor.device.type == "cpu"


XPU_Accelerator = CPU_Accelerator  # the name that DeepSpeed 0.9.2 looks for
