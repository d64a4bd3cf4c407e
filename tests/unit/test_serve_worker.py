"""One thread for everything that a model computes, from its loading on."""

import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

pytest.importorskip("starlette", reason="the embedded server needs Python 3.10")
from serve.embedded import args, build  # noqa: E402
from serve.embedded.engine import Engine  # noqa: E402
from serve.embedded.worker import Worker  # noqa: E402
from tests.contract.jobs import ended, job, play  # noqa: E402
from tests.models import make_hf, tiny_config  # noqa: E402
from tests.tokenizers import tiny_tokenizer  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]


def test_what_is_done_is_returned_or_raised():
    worker, where = Worker(), []
    assert worker.do(lambda: where.append(threading.current_thread()) or 7) == 7 and where[0] is not threading.current_thread()
    with pytest.raises(ValueError, match="^no$"):
        worker.do(lambda: (_ for _ in ()).throw(ValueError("no")))
    assert worker.do(lambda: threading.current_thread()) is where[0] and worker.alive
    worker.end_with(lambda: where.append(None))
    worker.join(30)
    assert where[1:] == [None] and not worker.alive


def test_a_model_is_loaded_and_run_in_one_thread(tmp_path, monkeypatch):
    """Else there are two sets of OpenMP threads, and each step takes twice as long."""
    seen = []

    class Spied(Engine):
        def __init__(self, *how):
            seen.append(threading.get_ident())
            super().__init__(*how)

        def prefill(self, *how):
            seen.append(threading.get_ident())
            return super().prefill(*how)

        def decode(self, *how):
            seen.append(threading.get_ident())
            return super().decode(*how)

    monkeypatch.setattr(build, "Engine", Spied)
    tiny_tokenizer(tmp_path, "bpe")
    make_hf(tmp_path, tiny_config("llama", vocab_size=600))
    _, service = build.build(args.read(["--model-id", str(tmp_path), "--no-proof"], {}))
    loaded = len(seen)
    one = job([5, 6], 4)

    async def work():
        service.scheduler.submit(one)
        await ended(one)

    play(service.scheduler, work())
    assert loaded >= 3 and len(seen) >= loaded + 2 and len(set(seen)) == 1 and seen[0] != threading.get_ident()


LOADING = """
import sys, torch
from serve.embedded import __main__, build

def load(options):
    print("loading", file=sys.stderr, flush=True)
    left = torch.ones(700, 700)
    while True:
        torch.linalg.svd(left)  # long in C++, where a thread that Python ends aborts the process

build.load_text = lambda options: None
build.load_engine = load
__main__.end(__main__.main(["--model-id", sys.argv[1], "--no-proof", "--port", "0"]))
"""


def test_an_interrupt_while_the_model_is_loaded_is_a_quiet_end(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", LOADING, str(tmp_path)], stderr=subprocess.PIPE, cwd=str(ROOT), text=True)
    try:
        assert any(line == "loading\n" for line in process.stderr)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 128 + signal.SIGINT and not said


@pytest.mark.parametrize("most, said", [(64, False), (65, True)])
def test_more_rows_than_products_are_alike_for_are_said(tmp_path, monkeypatch, caplog, most, said):
    tiny_tokenizer(tmp_path, "bpe")
    make_hf(tmp_path, tiny_config("llama", vocab_size=512))
    monkeypatch.setattr(Engine, "graphs", True)
    build.build(args.read(["--model-id", str(tmp_path), "--no-proof", "--max-batch-size", str(most)], {}))
    text = "--max-batch-size: with more than 64 requests at once the last bits of an answer may depend on the others"
    assert (text in caplog.text) is said
