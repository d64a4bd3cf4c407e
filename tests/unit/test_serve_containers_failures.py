"""What is said when a server in a container cannot be had: one line with what to do, the end of the log; Docker is a fake here."""

import builtins
import socket
import threading

import pytest

docker = pytest.importorskip("docker", reason="the Docker SDK is in the serve extra, for Python 3.10 and newer")
from pipeline_train.errors import RunFailed, UserError  # noqa: E402
from serve.containers import daemon, failures  # noqa: E402
from tests.docker_fixtures import TGI, cli, engine_fixture, fails, folder_fixture, surroundings  # noqa: E402, F401
from tests.fake_docker import refused  # noqa: E402
from tests.free_port import free_port  # noqa: E402


def unreachable(monkeypatch, host=None):
    monkeypatch.delenv("DOCKER_HOST", raising=False)
    monkeypatch.setenv("DOCKER_CONTEXT", "default")
    if host is not None:
        monkeypatch.setenv("DOCKER_HOST", host)
    with pytest.raises(UserError) as caught:
        daemon.connect("vllm")
    return str(caught.value)


def test_no_engine_there(monkeypatch, tmp_path):
    host = "unix://%s/none.sock" % tmp_path
    assert unreachable(monkeypatch, host) == (
        "no Docker engine answers at %s (No such file or directory): start it (sudo systemctl start docker), or set DOCKER_HOST; "
        "--engine embedded needs none" % host
    )
    port = free_port()
    assert "at tcp://127.0.0.1:%d (Connection refused)" % port in unreachable(monkeypatch, "tcp://127.0.0.1:%d" % port)


def test_an_engine_that_is_none(monkeypatch):
    """Something listens there, and hangs up."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        threading.Thread(target=lambda: server.accept()[0].close(), daemon=True).start()
        assert "no Docker engine answers at tcp://" in unreachable(monkeypatch, "tcp://127.0.0.1:%d" % server.getsockname()[1])


def test_an_engine_of_another_machine(monkeypatch):
    for host in ("tcp://10.0.0.7:2375", "ssh://user@gpu1"):
        assert "Docker's engine is %s, another machine, which does not have this model folder" % host in unreachable(
            monkeypatch, host
        )


def test_not_in_dockers_group(monkeypatch):
    def denied(**options):
        raise docker.errors.DockerException("Error while fetching server API version: ('Connection aborted.', PermissionError(13, "
                                            "'Permission denied'))")  # fmt: skip

    monkeypatch.setattr(docker, "from_env", denied)
    assert unreachable(monkeypatch) == (
        "Docker at unix:///var/run/docker.sock: permission denied; join its group: sudo usermod -aG docker $USER"
    )


def test_no_sdk(monkeypatch):
    real = builtins.__import__

    def without(name, *rest, **more):
        if name == "docker":
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    assert unreachable(monkeypatch) == (
        "--engine vllm runs in a container, and Docker's SDK for Python is missing: pip install 'pipedock[serve]'"
    )


def test_status_says_when_containers_could_not_be_looked_for(monkeypatch, tmp_path, capfd):
    monkeypatch.setenv("DOCKER_HOST", "unix://%s/none.sock" % tmp_path)
    port = str(free_port())
    for verb, text in (("--status", "no server of ours"), ("--stop", "nothing to stop")):
        code, out, _ = cli(capfd, verb, "--port", port)
        assert code == 0 and out.startswith(
            "%s on port %s (containers were not looked for: no Docker engine answers at" % (text, port)
        )


START = {
    "driver failed programming external connectivity: Bind for 127.0.0.1:1 failed: port is already allocated":
        "127.0.0.1 port %d: the port is taken; choose another --port or --host",
    'could not select device driver "" with capabilities: [[gpu]]':
        "127.0.0.1 port %d: Docker cannot hand on this machine's GPUs; install the NVIDIA Container Toolkit, then: sudo nvidia-ctk",
    "nvidia-container-cli: requirement error: unsatisfied condition: cuda>=12.4":
        "127.0.0.1 port %d: this machine's NVIDIA driver cannot run the image; pipedock check says which versions it can",
    'exec: "/tgi-entrypoint.sh": stat: no such file or directory: unknown':
        "127.0.0.1 port %d: this image is not a server for this machine; see --image and --version",
    "invalid mount config for type bind: bind source path does not exist: /m":
        "127.0.0.1 port %d: Docker does not see the model folder; it must be on a disk of the engine's own machine",
}  # fmt: skip


@pytest.mark.parametrize("error", START)
def test_a_container_that_cannot_start(folder, engine, error):
    port = free_port()
    engine.start_error = refused(error)
    said = fails(UserError, folder, port=port)
    assert said.startswith(START[error] % port) and said.endswith("(%s)" % error) and "\n" not in said
    assert len(engine.created) == 1 and engine.handles == []


def test_what_docker_says_and_nobody_knows(folder, engine):
    engine.start_error = refused("something new")
    assert fails(RunFailed, folder, port=free_port()).endswith(": Docker cannot start the container: something new")
    engine.create_error = refused("no such thing")
    assert fails(RunFailed, folder, port=free_port()) == "the image %s: Docker cannot start the container: no such thing" % TGI
    assert engine.handles == []


SHARD = "ERROR text_generation_launcher: Shard 0 failed to start\nError: ShardCannotStart"
ENDS = {  # the name of a kind -> logs that mean it
    "shared memory": ["misc/shmutils.cc:72 NCCL WARN Error: failed to extend /dev/shm/nccl-aB to 9637892 bytes\n" + SHARD,
                      "RuntimeError: unable to allocate shared memory(shm) for file </torch_1>"],
    "out of memory": ["torch.cuda.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB\n" + SHARD,
                      "RuntimeError: Not enough memory to handle 4096 prefill tokens. You need to decrease\n" + SHARD,
                      "ValueError: No available memory for the cache blocks. Try increasing gpu_memory_utilization",
                      "ValueError: Free memory on device cuda:0 (1.0/14.7 GiB) on startup is less than desired"],
    "driver": ["RuntimeError: The NVIDIA driver on your system is too old (found version 11040)."],
    "card": ["RuntimeError: CUDA error: no kernel image is available for execution on the device",
             "ValueError: Bfloat16 is only supported on GPUs with compute capability of at least 8.0."],
    "no GPU": ["RuntimeError: No CUDA GPUs are available", "Error: NotEnoughCUDADevices(\"`sharded` is true but 1\")",
               "AssertionError: Each process is one gpu", "RuntimeError: Failed to infer device type",
               "NotImplementedError: FlashLlama is only available on GPU\n" + SHARD],
    "tokenizer": ["Error: WebServer(Tokenizer(\"Unable to load tokenizer.\"))",
                  "OSError: Can't load tokenizer for '/data/m'.\n" + SHARD,
                  "Exception: data did not match any variant of untagged enum ModelWrapper at line 1 column 9"],
    "shards": ["ValueError: `num_heads` must be divisible by `num_shards` (got `num_heads`: 52 and `num_shards`: 8\n" + SHARD,
               "AssertionError: The choosen size 52 is not compatible with sharding on 8 shards\n" + SHARD,
               "NotImplementedError: Sharded Llama requires Flash Attention CUDA kernels to be installed.\n" + SHARD],
    "weights": ["FileNotFoundError: No local weights found in /data/m with extension .safetensors\nError: DownloadError",
                "RuntimeError: weight word_embeddings.weight does not exist\n" + SHARD,
                "RuntimeError: found uninitialized parameters in model BLOOMSharded: ['lm_head.weight']\n" + SHARD,
                "safetensors_rust.SafetensorError: Error while deserializing header: HeaderTooLarge",
                "RuntimeError: Cannot find any model weights with `/data/m`"],
    "model": ["ValueError: Unsupported model type mamba9\n" + SHARD],
    "read-only": ["OSError: [Errno 30] Read-only file system: '/data/m/model.safetensors'\nError: DownloadError"],
    "permission": ["PermissionError: [Errno 13] Permission denied: '/data/m/model.safetensors'"],
    "flags": ["error: unexpected argument '--hostname' found", "vllm: error: unrecognized arguments: --model-id",
              "error: Found argument '--dtype' which wasn't expected, or isn't valid in this context",
              "Error: ArgumentValidation(\"`max_input_tokens` must be < `max_total_tokens`\")"],
    "NCCL": ["torch.distributed.DistBackendError: NCCL error in: ProcessGroupNCCL.cpp:1970, unhandled system error"],
    "disk": ["OSError: [Errno 28] No space left on device: '/tmp/x'"],
    "shard": ["KeyError: 'some new thing'\n" + SHARD, "RuntimeError: Engine core initialization failed. See root cause above."],
}  # fmt: skip


@pytest.mark.parametrize("name, log", [(name, log) for name, logs in ENDS.items() for log in logs])
def test_each_end_is_told_by_its_log(name, log):
    [kind] = [kind for kind in failures.RUNNING if kind.name == name]
    error = failures.of_end("INFO Args { model_id: x }\n" + log, 1, False, "/l/1.log")
    assert isinstance(error, RunFailed)
    first, *rest = str(error).split("\n")
    assert first.startswith("the server ended before it was ready: %s (%s" % (kind.what, log.split("\n")[0][:30]))
    assert first.endswith("; %s. The end of /l/1.log:" % kind.todo) and "\n".join(rest).endswith(log)


def test_every_kind_of_end_is_tried():
    assert {kind.name for kind in failures.RUNNING} == set(ENDS)


def test_killed_for_memory():
    for code, killed, how in (
        (137, True, "for memory"),
        (137, False, "(code 137), most likely for memory"),
        (1, True, "for memory"),
    ):
        said = str(failures.of_end("loading\n", code, killed, "f"))
        assert "ready: it was killed %s: this machine has too little (free -g)" % how in said and said.endswith("\nloading")


def test_an_end_that_nobody_knows():
    said = str(failures.of_end("\n".join("line %d" % number for number in range(100)), 9, False, "f"))
    assert said.startswith("the server ended before it was ready: it ended with code 9. The end of f:\nline 80\n")
    assert said.endswith("line 99")
    assert str(failures.of_end("", 9, False, "f")).endswith("it ended with code 9. The end of f:\n")


@pytest.mark.parametrize("code, kind", [(2, UserError), (1, RunFailed)])
def test_our_own_image_says_it_itself(folder, engine, code, kind):
    """And names the folder that the user knows, not the one inside."""
    engine.script, engine.log = [("exited", code)], b"loading\nserve: /data/my-model: no usable tokenizer (why)\n"
    assert fails(kind, folder) == "%s: no usable tokenizer (why)" % folder
    assert engine.handles == []


def test_a_container_that_ends_while_it_is_loading(folder, engine, capfd):
    port = free_port()
    engine.script, engine.log = ["running", ("exited", 1)], (ENDS["weights"][0] + "\n").encode()
    said = fails(RunFailed, folder, port=port)
    assert "weights are missing, or not in the layout that this version reads (FileNotFoundError: No local weights" in said
    assert engine.handles == []
    code, out, _ = cli(capfd, "--logs", "--port", str(port))  # its log has outlived it
    assert code == 0 and out.endswith("Error: DownloadError\n")
