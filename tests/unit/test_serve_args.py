"""Launcher flags and environment: names of 3.3 and 0.8, what wins, what is refused, and the HOSTNAME trap."""

import socket
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("starlette", reason="the embedded server needs Python 3.10")
from pipeline_train.errors import UserError  # noqa: E402
from serve.embedded import args  # noqa: E402
from serve.embedded.__main__ import main, model_folder  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
MODEL = ["--model-id", "m"]


def read(*argv, **environment):
    return args.read(MODEL + list(argv), environment)


def test_defaults_are_the_originals_and_the_address_is_this_machine_only():
    options = read()
    assert (options.hostname, options.port, options.max_concurrent_requests, options.max_best_of) == ("127.0.0.1", 3000, 128, 2)
    assert (options.max_stop_sequences, options.max_top_n_tokens, options.max_client_batch_size) == (4, 5, 4)
    assert (options.payload_limit, options.validation_workers, options.graceful_termination_timeout) == (2000000, 2, 90)
    assert options.max_input_tokens is options.max_total_tokens is options.api_key is None
    assert options.cors_allow_origin == () and options.notes == ()


def test_command_line_then_environment_then_default():
    assert read(PORT="80").port == 80
    assert read("--port", "81", PORT="80").port == 81
    assert read("-p", "82").port == 82
    options = read(MAX_TOTAL_TOKENS="2048", MAX_INPUT_TOKENS="1024", TRUST_REMOTE_CODE="true", JSON_OUTPUT="1", API_KEY="k")
    assert (options.max_total_tokens, options.max_input_tokens, options.api_key) == (2048, 1024, "k")
    assert options.trust_remote_code is True and options.json_output is False  # the word is "true"
    assert args.read([], {"MODEL_ID": "/data/m"}).model_id == "/data/m"
    assert read("--cors-allow-origin", "http://a", "--cors-allow-origin", "http://b").cors_allow_origin == ("http://a", "http://b")


def test_flags_of_the_older_version():
    options = read(
        "--max-input-length", "1000", "--max-total-tokens", "1512", "--disable-custom-kernels", "--max-batch-total-tokens", "32000"
    )
    assert options.max_input_tokens == 1000 and options.max_batch_total_tokens == 32000
    assert options.notes == ("without effect here: --disable-custom-kernels",)
    assert read(MAX_INPUT_LENGTH="7").max_input_tokens == 7


def test_flags_without_meaning_here_are_said_to_have_no_effect():
    options = read(
        "--sharded", "true", "--num-shard", "4", "--cuda-memory-fraction", "0.5", "--usage-stats", "off", "--json-output"
    )
    assert "--sharded" in options.notes[0] and "--usage-stats" in options.notes[0]
    assert "--num-shard has no effect" in options.notes[1]


@pytest.mark.parametrize("name", ["3f2a9c01b7de", "my-box", "web.example"])
def test_a_containers_hostname_is_no_address(name):
    options = read(HOSTNAME=name)
    assert options.hostname == "127.0.0.1" and "HOSTNAME is no address" in options.notes[0]
    assert read("--hostname", "0.0.0.0", HOSTNAME=name).hostname == "0.0.0.0"


@pytest.mark.parametrize("address", ["0.0.0.0", "::1", "localhost", "127.0.0.5"])
def test_an_address_in_hostname_is_meant(address):
    assert read(HOSTNAME=address).hostname == address


@pytest.mark.parametrize(
    "argv, environment, text",
    [
        (["--quantize", "awq"], {}, "--quantize would change the model's answers"),
        ([], {"ROPE_SCALING": "linear"}, "--rope-scaling would change"),
        (["--max-input-tokens", "5", "--max-input-length", "5"], {}, "are the same setting"),
        (["--max-input-tokens", "5", "--max-total-tokens", "5"], {}, "must be less than --max-total-tokens 5"),
        (["--dtype", "int8"], {}, "--dtype int8: expected one of float32, float16, bfloat16"),
        (["--port", "70000"], {}, "--port 70000"),
        (["--max-concurrent-requests", "0"], {}, "--max-concurrent-requests 0: too small"),
        (["--prot", "1"], {}, "unrecognized arguments: --prot"),
        (["--port", "x"], {}, "invalid int value"),
        ([], {"PORT": "eighty"}, "the environment's PORT: expected a number, got 'eighty'"),
    ],
)
def test_refused(argv, environment, text):
    with pytest.raises(UserError) as caught:
        read(*argv, **environment)
    assert text in str(caught.value)


def test_without_a_model():
    with pytest.raises(UserError, match="--model-id DIR .* is missing"):
        args.read([], {})


def test_main_answers_in_one_line_before_torch_is_there(capsys, tmp_path, monkeypatch):
    monkeypatch.delenv("HOSTNAME", raising=False)
    assert main(["--model-id", str(tmp_path / "absent")]) == 2
    assert capsys.readouterr().err == "serve: %s: no such folder\n" % (tmp_path / "absent")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert main(["--model-id", str(tmp_path), "--port", str(port)]) == 2
    error = capsys.readouterr().err
    assert "cannot listen on 127.0.0.1 port %d: Address already in use" % port in error and "Traceback" not in error
    assert main(["--model-id", str(tmp_path), "--port", "0", "--hostname", "256.1.1.1"]) == 2
    assert "cannot listen on 256.1.1.1" in capsys.readouterr().err


def test_a_hub_name_is_not_taken_for_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert model_folder("bigscience/bloom-560m") is False and model_folder(str(tmp_path)) is True
    with pytest.raises(UserError, match="no such folder"):
        model_folder("./absent")


def test_help_needs_no_torch():
    code = "import sys; from serve.embedded import args; args.parser().format_help(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=str(ROOT))
    assert done.stdout.strip() == "False", done.stderr
