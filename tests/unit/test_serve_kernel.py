"""The GPU kernel of a decode step, in Triton's interpreter (benchmarks/serve_alike.py asks a real GPU)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.models import make_hf, tiny_config

pytest.importorskip("starlette", reason="the embedded server needs Python 3.10")
ROOT = Path(__file__).resolve().parents[2]
TRITON = os.environ.get("PIPEDOCK_TRITON", str(ROOT / "build" / "triton"))
pytestmark = pytest.mark.skipif(
    not os.path.isdir(os.path.join(TRITON, "triton")), reason="ci/test.sh installs Triton beside the environment"
)


def interpreted(*command):
    env = dict(os.environ, TRITON_INTERPRET="1", PYTHONPATH=os.pathsep.join([str(ROOT), TRITON]))
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.kernel_cases", *command],
        env=env,
        cwd=str(ROOT),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


CASES = [
    "torch.float32, 4, 4, 16, 16, None, False",
    "torch.float32, 8, 2, 24, 40, None, False",
    "torch.float32, 4, 4, 16, 16, None, True",
    "torch.float32, 4, 2, 16, 16, 150, False",
    "torch.float16, 4, 1, 64, 64, None, False",
    "torch.float16, 4, 4, 16, 16, None, True",
    "torch.float16, 4, 2, 16, 16, 30, False",
]


def test_the_kernel_is_attention():
    for case, worst in interpreted("against_torch", *CASES).items():
        # A float32's ALiBi is large, and rounding its sum with the score one way or the other shows.
        assert worst < (128 if case.startswith("torch.float32") and case.endswith("True") else 16), case


def test_a_row_gets_the_same_bits_in_any_company():
    cases = ["None, False", "30, False", "None, True"]
    assert interpreted("company", *cases) == dict.fromkeys(cases, True)


SMALL = {
    "llama": {"num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 1, "max_position_embeddings": 60},
    "bloom": {"n_head": 2, "n_layer": 1, "seq_length": 60},
}


@pytest.mark.parametrize("family", sorted(SMALL))
def test_the_engine_takes_it(family, tmp_path):
    make_hf(tmp_path, tiny_config(family, **SMALL[family]))
    found = interpreted("engine", str(tmp_path))
    assert "our kernel" in found["kernels"] and found["same"] and "torch's choice" not in found["kernels"]
