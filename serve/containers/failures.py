"""What Docker's answer or a server's log says went wrong, in one line with what to do.

The texts are those of text-generation-inference 0.8.2 and 3.3.7, of torch, NCCL and Docker; those of vLLM from its public issues.
"""

import re
from typing import NamedTuple, Optional, Tuple

from pipeline_train.errors import RunFailed, UserError

RAISED = r"^\S*[a-z](Error|Exception): "  # the end of a Python traceback
KILLED = 137  # 128 + SIGKILL


class Kind(NamedTuple):
    """``pattern``: a line of the log that means it. ``what`` went wrong, ``todo`` about it."""

    name: str
    pattern: str
    what: str
    todo: str


STARTING = (  # answers of the engine to create and start; UserError
    Kind("port in use", r"port is already allocated|address already in use|ports are not available",
         "the port is taken", "choose another --port or --host"),
    Kind("driver", r"unsatisfied condition: (cuda|driver)|requirement error|driver/library version mismatch",
         "this machine's NVIDIA driver cannot run the image",
         "pipedock check says which versions it can; after an update of the driver reboot; NVIDIA_DISABLE_REQUIRE=1 pipedock serve "
         "... tries all the same"),
    Kind("no GPU", r"could not select device driver|nvidia-container-cli|unknown or invalid runtime name|unresolvable CDI|"
         r"GPU vendor|libnvidia-ml",
         "Docker cannot hand on this machine's GPUs",
         "install the NVIDIA Container Toolkit, then: sudo nvidia-ctk runtime configure --runtime=docker && sudo systemctl restart "
         "docker"),
    Kind("image", r"exec format error|executable file not found|no such file or directory: unknown|no command specified",
         "this image is not a server for this machine", "see --image and --version"),
    Kind("mount", r"invalid mount config|bind source path does not exist|mounts denied|not shared from the host",
         "Docker does not see the model folder", "it must be on a disk of the engine's own machine, and shared with it"),
)  # fmt: skip
RUNNING = (  # lines of a server's log, the surest first; RunFailed
    Kind("shared memory", r"/dev/shm/nccl|shared memory segment|unable to (open|allocate) shared memory|Bus error",
         "too little shared memory", "a larger --shm-size, say 16g"),
    Kind("out of memory",
         r"CUDA out of memory|OutOfMemoryError|Not enough memory to handle|No available memory for the cache blocks|"
         r"Free memory on device|CUDA error: out of memory|KV cache is needed, which is larger",
         "the GPU's memory is too small",
         "more GPUs (--num-shard), a smaller --max-total-tokens, or end what else runs on it; pipedock check says what fits"),
    Kind("driver",
         r"CUDA driver version is insufficient|forward compatibility was attempted|NVIDIA driver on your system is too old",
         "this machine's NVIDIA driver cannot run the image", "pipedock check says which versions it can"),
    Kind("card", r"no kernel image is available|Bfloat16 is only supported on GPUs",
         "the image has no code for this GPU, or not in this type", "pipedock check says what can; --dtype float16"),
    Kind("no GPU", r"No CUDA GPUs are available|Found no NVIDIA driver|Failed to infer device type|only available on GPU|"
         r"not enough cuda devices|NotEnoughCUDADevices|world_size.*device_count|Each process is one gpu",
         "the server found no GPU, or fewer than shards",
         "nvidia-smi must list them, and docker run --gpus all IMAGE nvidia-smi too; --num-shard is one shard a GPU"),
    Kind("tokenizer", r"Unable to load tokenizer|no usable tokenizer|Can't load tokenizer|instantiate the backend tokenizer|"
         r"did not match any variant of untagged enum ModelWrapper|TokenizerWebServer|tokenizer class .* does not exist",
         "the tokenizer cannot be loaded", "an export for this engine carries what it reads: pipedock to-hf --target"),
    Kind("shards", r"must be divisible by|not compatible with sharding|[Ss]harded .* requires Flash|[Ss]harded is not supported|"
         r"divisible by tensor parallel size|isn't divisible|FLASH_ATT_ERROR",
         "the model cannot be split into that many shards", "pipedock check says which --num-shard can"),
    Kind("weights",
         r"No local weights found|No safetensors weights found|weight \S+ does not exist|uninitialized parameters in model|"
         r"Cannot find any model weights|SafetensorError|Error while deserializing header|incomplete metadata|size mismatch for|"
         r"not initialized from checkpoint|LocalEntryNotFoundError|Name .* -- Current",
         "weights are missing, or not in the layout that this version reads",
         "pipedock check names what is missing; pipedock to-hf --target writes each version's layout"),
    Kind("model",
         r"Unsupported model type|not a supported model|architectures .* not supported|does not recognize this architecture",
         "this version does not know the model's type", "another --version or --engine"),
    Kind("read-only", r"Read-only file system",
         "the server wants to write into the model folder, which it sees read-only",
         "give it weights that it need not convert: pipedock to-hf --target"),
    Kind("permission", r"PermissionError|Permission denied", "files of the model folder may not be read",
         "chmod -R a+rX the folder"),
    Kind("flags", r"unexpected argument|unrecognized arguments|[Ff]ound argument .* which wasn't expected|invalid value .* for '--|"
         r"ArgumentValidation|Invalid argument",
         "this image does not take these flags", "does --version say what --image is?"),
    Kind("NCCL", r"NCCL error|ncclSystemError|ncclUnhandledCudaError|ncclInternalError|ncclRemoteError",
         "the shards cannot talk to each other", "a larger --shm-size; NCCL_DEBUG=INFO pipedock serve ... says more"),
    Kind("disk", r"No space left on device", "a disk is full", "docker system df shows what fills it"),
    Kind("shard", r"ShardCannotStart|[Ss]hard \d+ failed to start|Shard cannot start|Shard complete standard error|ShardFailed|"
         r"Engine core initialization failed|WorkerProc failed to start",
         "a shard cannot start", "its own words are in the log"),
)  # fmt: skip


def of_start(error: str, what: str) -> Exception:
    """The engine refused to create or start the container: ``error`` is its answer, ``what`` the address or image it was about."""
    for kind in STARTING:
        if re.search(kind.pattern, error):
            return UserError("%s: %s; %s (%s)" % (what, kind.what, kind.todo, error))
    return RunFailed("%s: Docker cannot start the container: %s" % (what, error))


def kind_of(log: str) -> Optional[Tuple[Kind, str]]:
    """-> what went wrong and the line that says so, cut to a readable length; None when no line is known."""
    lines = log.splitlines()
    for kind in RUNNING:
        found = next((line for line in lines if re.search(kind.pattern, line)), None)
        if found is not None:
            if kind.name == "shard":  # why not is in the traceback before
                found = ([line for line in lines if re.search(RAISED, line)] or [found])[-1]
            return kind, " ".join(found.split())[:240]
    return None


def of_end(log: str, code: int, killed_for_memory: bool, kept: str, before: str = "before it was ready") -> Exception:
    """The container ended by itself with ``code``; ``log``: all it has said, which lies in the file ``kept``."""
    last = [line for line in log.splitlines() if line.strip()][-20:]
    if last and last[-1].startswith("serve: "):  # the embedded server's own words, in its image
        return (UserError if code == 2 else RunFailed)(last[-1][len("serve: ") :])
    known = kind_of(log)
    if killed_for_memory or (code == KILLED and known is None):
        how = "for memory" if killed_for_memory else "(code 137), most likely for memory"
        why = "it was killed %s: this machine has too little (free -g); loading takes the weights, and some GB a shard" % how
    elif known is not None:
        why = "%s (%s); %s" % (known[0].what, known[1], known[0].todo)
    else:
        why = "it ended with code %d" % code
    return RunFailed("the server ended %s: %s. The end of %s:\n%s" % (before, why, kept, "\n".join(last)))
