"""What argparse says of an option's value."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ASK = ["ask", "hi", "--url", "http://127.0.0.1:9"]


@pytest.mark.parametrize("arguments, text", [
    (ASK + ["--timeout", "0"], "argument --timeout: '0': expected seconds, more than 0"),
    (ASK + ["--timeout", "nan"], "argument --timeout: 'nan': expected seconds, more than 0"),
    (ASK + ["--temperature", "-1"], "argument --temperature: '-1': expected a number of at least 0"),
    (ASK + ["--temperature", "nan"], "argument --temperature: 'nan': expected a number of at least 0"),
    (ASK + ["--max-new-tokens", "-3"], "argument --max-new-tokens: '-3': expected a whole number of at least 1"),
    (ASK + ["--seed", "x"], "argument --seed: 'x': expected a whole number of at least 0"),
    (["ask", "hi", "--url", "http://127.0.0.1:808x"], "argument --url: http://127.0.0.1:808x: expected http://HOST:PORT"),
    (["ask", "hi", "--url", "http://127.0.0.1:99999"], "argument --url: http://127.0.0.1:99999: expected http://HOST:PORT"),
    (["ask", "hi", "--url", "http://"], "argument --url: http://: expected http://HOST:PORT"),
    (["ask", "hi", "--url", "127.0.0.1:80"], "argument --url: 127.0.0.1:80: expected http://HOST:PORT"),
    (["prove", "--model", "x", "--url", "localhost"], "argument --url: localhost: expected http://HOST:PORT"),
    (["prove", "--model", "x", "--url", "http://a:1", "--timeout", "-1"], "argument --timeout: '-1': expected seconds, more than"),
    (["serve", "--model", "x", "--num-shard", "0"], "argument --num-shard: '0': expected a whole number of at least 1"),
])  # fmt: skip
def test_a_value_that_is_none_is_said_before_anything_is_done(arguments, text):
    done = subprocess.run([sys.executable, str(ROOT / "pipedock.py"), *arguments], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and text in done.stderr and "Traceback" not in done.stderr
