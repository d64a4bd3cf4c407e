"""Start a server, wait until it is healthy, and say why when it is not.

server = launch("exports/my-model", port=8082)                                # a process of this machine
server = launch("exports/my-model", engine="tgi", version="3.3", shards=2)    # TGI's container
server.state.url, server.stop()
"""

import socket
import time
from typing import Any, Callable, Optional, Union

from pipeline_train.errors import RunFailed, UserError

from . import embedded_process, state
from .containers import argv, daemon, found
from .containers import start as container_start
from .embedded_process import Server
from .limits.files import TOKENIZERS
from .limits.folder import listed
from .proved import check_proof
from .reach import healthy
from .settings import Settings

ENGINES = ("embedded", "tgi", "vllm")
CONTAINER_ONLY = ("version", "image", "gpu", "driver", "shm_size")
WEIGHTS = (".safetensors", ".bin")

Say = Callable[[str], None]
Known = Union[state.Running, found.Found]


class ContainerServer:
    """As ``embedded_process.Server``, for a container."""

    def __init__(self, container: found.Found) -> None:
        self.state = container
        self.lines, self.stop = container.lines, container.stop

    def wait(self) -> int:
        """Until it has ended -> exit code. Its log is kept, itself removed."""
        code = self.state.wait()
        self.state.remove()
        return code

    def stop_now(self) -> int:
        """Docker has been asked to stop it, and ends it when its time is over, whoever waits. -> exit code"""
        return self.wait()

    def ended(self, code: int) -> Exception:
        return container_start.ended(self.state, code)


def launch(
    model: str,
    engine: str = "embedded",
    progress: Say = lambda line: None,
    warn: Say = lambda line: None,
    timeout: float = 1800.0,
    own_session: bool = False,
    **more: Any,
) -> Union[Server, ContainerServer]:
    """Check the folder, start, wait for health. ``more``: the other fields of Settings (port, host, api_key, version, shards ...).

    ``progress`` is told what goes on, about once a second, ``warn`` what the user should read; ``own_session``: the server survives
    this process and its terminal (a container always does). UserError or RunFailed."""
    return start(Settings(model, engine, **more), progress, warn, timeout, own_session)


def start(settings: Settings, progress: Say, warn: Say, timeout: float, own_session: bool) -> Union[Server, ContainerServer]:
    """``launch`` for settings that are made already."""
    check(settings)
    check_port(settings)
    check_proof(settings.model, progress, settings.need_proof)
    if settings.engine == "embedded":
        return embedded_process.start(settings, progress, timeout, own_session)
    return ContainerServer(container_start.start(daemon.connect(settings.engine), settings, progress, warn, timeout))


def running(settings: Settings) -> Optional[Known]:
    """The living server of this port if it is exactly what ``settings`` ask for."""
    known = find(settings.port, settings.engine)
    return known if known is not None and known.alive and known.identity == settings.identity() else None


def settled(settings: Settings, progress: Say, seconds: float) -> Optional[Known]:
    """``running``, a process once it answers or has ended: it may be loading, or finishing its last requests. RunFailed when it
    does neither."""
    end = time.monotonic() + seconds
    known = running(settings)
    while isinstance(known, state.Running) and not healthy(known.url):
        if time.monotonic() > end:
            raise RunFailed(
                "port %d: the server there (%s) neither answers nor ends: see pipedock serve --logs --port %d; --stop ends it"
                % (known.port, known.where, known.port)
            )
        progress("waiting for the server on port %d (%s), which is loading or stopping" % (known.port, known.where))
        time.sleep(0.5)
        known = running(settings)
    return known


def find(port: int, engine: str = "embedded") -> Optional[Known]:
    """The server on this port that pipedock started: a process, or a container, living or ended. UserError when Docker cannot be
    asked; for an embedded server it need not be."""
    known = state.read(port)
    if known is not None:
        return known
    try:
        return found.find(daemon.connect(engine), port)
    except UserError:
        if engine == "embedded":
            return None
        raise


def not_asked() -> Optional[str]:
    """Why Docker could not be asked for containers of ours, None where it was, or where nobody uses it."""
    try:
        daemon.connect()
        return None
    except UserError as error:
        return None if getattr(error, "absent", False) else str(error)


def check(settings: Settings) -> None:
    """What is wrong with the wishes or the folder; UserError."""
    if settings.engine not in ENGINES:
        raise UserError("--engine %s: expected one of %s" % (settings.engine, ", ".join(ENGINES)))
    if settings.shards < 1:
        raise UserError("--num-shard %d: at least 1" % settings.shards)
    if settings.engine == "embedded":
        given = [name for name in CONTAINER_ONLY if getattr(settings, name) is not None] + ["num_shard"] * (settings.shards != 1)
        if given:
            flag = "--" + given[0].replace("_", "-")
            raise UserError("%s goes with --engine tgi and vllm; the embedded engine is one process, in no container" % flag)
    argv.check_tokens(settings)
    check_model(settings.model)


def check_port(settings: Settings) -> None:
    """UserError unless it is free; a container of ours that has ended is removed."""
    port, host = settings.port, settings.host
    known = state.read(port) if settings.engine == "embedded" else find(port, settings.engine)
    if isinstance(known, found.Found) and not known.alive:
        known.remove()
    elif known is not None:
        raise _served(known)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except (OSError, OverflowError) as error:
            raise _in_the_way(port) or UserError(
                "cannot listen on %s port %d: %s; choose another --port or --host"
                % (host, port, getattr(error, "strerror", None) or error)
            )


def _served(known: Known) -> UserError:
    return UserError(
        "port %d: already served (%s, %s); stop it with pipedock serve --stop --port %d"
        % (known.port, known.model, known.where, known.port)
    )


def _in_the_way(port: int) -> Optional[UserError]:
    """When it is a container of ours that has the port."""
    known = find(port)
    return _served(known) if known is not None and known.alive else None


def check_model(model: str) -> None:
    """A folder that transformers can load."""
    names = listed(model)
    if "config.json" not in names:
        raise UserError("--model %s: no config.json; expected a Hugging Face model folder (pipedock to-hf writes one)" % model)
    if not set(TOKENIZERS) & set(names):
        raise UserError("--model %s: no tokenizer (none of %s)" % (model, ", ".join(TOKENIZERS)))
    if not any(name.endswith(WEIGHTS) for name in names):
        raise UserError("--model %s: no weights (*.safetensors or *.bin)" % model)
