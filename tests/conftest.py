"""What every test gets: the same examples from hypothesis every time (HYPOTHESIS_PROFILE=default draws others); on DeepSpeed 0.9.2,
which knows no CPU, an accelerator of our own for this process and all it starts."""

import gc
import os
import sys
from pathlib import Path

from hypothesis import settings

from pipeline_train import compat

FOLDER = str(Path(__file__).with_name("cpu_accelerator"))

if not compat.has_cpu_accelerator(compat.versions()["deepspeed"]):
    sys.path.insert(0, FOLDER)
    os.environ["PYTHONPATH"] = os.pathsep.join([FOLDER] + os.environ.get("PYTHONPATH", "").split(os.pathsep)).rstrip(os.pathsep)

settings.register_profile("same", derandomize=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))


def pytest_collection_finish() -> None:
    """All that is imported by now stays: the garbage collector need not look through it again for each file of weights that
    transformers 4.30 loads, which was two seconds of many a test."""
    gc.collect()
    gc.freeze()
