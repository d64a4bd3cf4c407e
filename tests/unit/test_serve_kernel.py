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


def interpreted(*command, cache=None):
    """``cache``: compile into that folder instead."""
    env = dict(os.environ, PYTHONPATH=os.pathsep.join([str(ROOT), TRITON]))
    env.update({"TRITON_INTERPRET": "1"} if cache is None else {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(cache)})
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


def test_a_row_without_numbers_is_not_made_one_with():
    assert interpreted("broken", "48,", "200,") == {"48,": True, "200,": True}


SHARED = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024}  # bytes that a block may have: CUDA's guide, technical specifications


def test_it_compiles_for_cards_that_are_not_here(tmp_path):
    """A100, Ada and Hopper; heads of the usual sizes, grouped or not; with chunks and without. Heads of 128 and more in fp32 would
    not fit everywhere: there the engine takes torch's kernel."""
    cases = [
        "90, 'bf16', 64, 8, True, False, 0",
        "90, 'bf16', 128, 1, False, False, 0",
        "90, 'bf16', 128, 8, False, False, 4096",
        "90, 'fp16', 64, 1, False, True, 0",
        "89, 'bf16', 128, 4, False, False, 0",
        "80, 'fp16', 128, 1, True, True, 0",
        "80, 'bf16', 256, 2, False, False, 0",
        "80, 'fp32', 64, 1, False, False, 0",
    ]
    found = interpreted("machine_code", *cases, cache=tmp_path)
    assert list(found) == cases
    for case, shared in found.items():
        assert 0 < shared <= SHARED[int(case[:2])], case


SMALL = {
    "llama": {"num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 1, "max_position_embeddings": 60},
    "bloom": {"n_head": 2, "n_layer": 1, "seq_length": 60},
}


@pytest.mark.parametrize("family", sorted(SMALL))
def test_the_engine_takes_it(family, tmp_path):
    make_hf(tmp_path, tiny_config(family, **SMALL[family]))
    found = interpreted("engine", str(tmp_path))
    assert "our kernel" in found["kernels"] and found["same"] and "torch's choice" not in found["kernels"]
