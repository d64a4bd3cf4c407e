"""The three compose commands of README.md with a real engine: images built, a run trained, exported, proved, served and asked."""

import json
import os
import subprocess
import time
import urllib.request
from pathlib import Path

import pytest

from tests.containers.compose import OWNER, Compose, needs_engine, write_run
from tests.free_port import free_port

pytestmark = needs_engine


@pytest.fixture(scope="module")
def compose(tmp_path_factory):
    road = Compose(tmp_path_factory.mktemp("compose"))
    yield road
    road.down()


@pytest.fixture(scope="module")
def trained(images, compose):
    return compose, compose("up", "--no-color", "train")


@pytest.fixture(scope="module")
def exported(trained):
    return trained[0], trained[0]("run", "--rm", "export")


@pytest.fixture(scope="module")
def served(exported):
    """Up and healthy, by the image's own health check."""
    road = exported[0]
    road("up", "-d", "--wait", "--wait-timeout", "180", "serve")
    return road


def ask(road: Compose, route: str, body: dict) -> str:
    """With curl, as README.md does."""
    command = ["curl", "-sSN", "--fail", "--max-time", "120", "http://127.0.0.1:%d%s" % (road.port, route), "-X", "POST"]
    command += ["-H", "Content-Type: application/json", "-d", json.dumps(body)]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=150).stdout


def test_train_runs_to_its_end(trained):
    road, log = trained
    steps = [json.loads(line) for line in (road.folder / "runs/example/metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in steps if line["kind"] == "step"]
    assert steps[-1]["kind"] == "save" or steps[-1]["kind"] == "step", steps[-1]
    assert losses[0] > 5 and losses[-1] < 0.2, losses
    assert "exited with code 0" in log
    assert (road.folder / "runs/example/checkpoints/latest").read_text().strip() == "step_000060"


def test_what_containers_write_belongs_to_the_owner_of_the_folders(exported):
    road = exported[0]
    owner = {OWNER if os.getuid() == 0 else os.getuid()}
    assert [road.owners(name) for name in ("data", "models", "runs", "exports")] == [owner] * 4


def test_train_again_says_that_it_is_finished(trained):
    assert "finished" in trained[0]("up", "--no-color", "train")


def test_a_run_yaml_of_the_users_own_is_taken(trained, request):
    """RUN_CONFIG is relative to the repository's root. Refused by pipedock itself, before anything trains."""
    road = trained[0]
    text = "run: {out: runs/mine}\nmodel: {path: models/none}\ndata: {train: data/example.jsonl}\nparallel: {pipe: 2}\n"
    road.env["RUN_CONFIG"] = write_run(request, "mine", text)
    try:
        log = road("run", "--rm", "train", ok=False)
    finally:
        del road.env["RUN_CONFIG"]
    assert "models/none" in log and "Traceback" not in log


def test_export_is_proved(exported):
    road, log = exported
    proof = json.loads((road.folder / "exports/example/proof.json").read_text())
    assert proof["holds"] is True and proof["logits"]["relative"] <= 1e-5
    assert os.readlink(road.folder / "exports/current") == "example"


def test_the_served_model_answers_as_trained(served):
    asked = json.loads((served.folder / "data/example.jsonl").read_text().splitlines()[2])["rounds"]
    prompt = "### Human: %s\n### Assistant:" % asked[0][1]
    reply = json.loads(ask(served, "/generate", {"inputs": prompt, "parameters": {"max_new_tokens": 40}}))
    assert reply["generated_text"].strip() == asked[1][1]
    stream = ask(served, "/generate_stream", {"inputs": prompt, "parameters": {"max_new_tokens": 40}})
    assert json.loads(stream.strip().splitlines()[-1][len("data:") :])["generated_text"].strip() == asked[1][1]
    chat = {"messages": [{"role": "user", "content": asked[0][1]}], "max_tokens": 40, "temperature": 0}
    assert json.loads(ask(served, "/v1/chat/completions", chat))["choices"][0]["message"]["content"].strip() == asked[1][1]


def test_the_server_stops_within_its_grace(served):
    """And as itself: an answer to SIGTERM, not a kill."""
    begin = time.monotonic()
    served("stop", "serve")
    assert time.monotonic() - begin < 30
    assert served.state("serve")["ExitCode"] == 0


def test_the_image_is_a_drop_in_for_the_tgi_container(served):
    """Its flags, its port 80, its /data; the user's own id by --user."""
    port, name = free_port(), "pipedock-drop-in-%d" % os.getpid()
    command = [
        "docker",
        "run",
        "--rm",
        "--name",
        name,
        "-p",
        "127.0.0.1:%d:80" % port,
        "-v",
        "%s:/data:ro" % (served.folder / "exports"),
    ]
    command += ["--user", "4321:4321", "pipedock-serve:cpu", "--model-id", "/data/example", "--num-shard", "1"]
    command += ["--max-total-tokens", "128", "--max-input-length", "100", "--disable-custom-kernels"]
    make_readable(served.folder / "exports")
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        info = wait_for_info(port, process)
        assert info["max_total_tokens"] == 128 and info["max_input_tokens"] == 100
    finally:
        subprocess.run(["docker", "stop", "--time", "30", name], capture_output=True)
        process.communicate(timeout=60)


def make_readable(folder: Path) -> None:
    """For another user id than the files' owner; safetensors writes them for the owner alone."""
    for path in folder.rglob("*"):
        if not path.is_symlink():
            path.chmod(0o755 if path.is_dir() else 0o644)
    folder.chmod(0o755)


def wait_for_info(port: int, process: subprocess.Popen) -> dict:
    end = time.monotonic() + 120
    while True:
        try:
            with urllib.request.urlopen("http://127.0.0.1:%d/info" % port, timeout=5) as reply:
                return json.load(reply)
        except OSError as error:
            assert process.poll() is None, process.stdout.read()
            assert time.monotonic() < end, error
            time.sleep(1)
