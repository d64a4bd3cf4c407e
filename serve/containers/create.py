"""One container: what Docker is told, and what it answers."""

import re
import socket
from typing import Any, Dict, List, NamedTuple, Optional

from pipeline_train.errors import UserError

from ..reach import url_of
from ..settings import Settings
from . import failures, found
from .argv import PORT
from .daemon import said
from .found import Found
from .mounts import Mount

SHM = {"tgi": "1g", "vllm": "8g"}  # tmpfs: used only as far as needed
SHM_OLD = "64g"  # TGI 0.8
SIZE = re.compile(r"(\d+(?:\.\d+)?)([bkmgt]?)b?", re.IGNORECASE)
STACK = 67108864  # bytes; what NCCL and torch like


class Plan(NamedTuple):
    """``writable``: the server writes into the model folder. ``address``: to publish the port on;
    ``shm``: bytes. ``gpus``: how many; ``ids``: which, empty for any."""

    image: str
    version: str
    command: List[str]
    environment: Dict[str, str]
    mount: Mount
    writable: bool
    address: str
    shm: int
    gpus: int
    ids: List[str]


def create(client: Any, settings: Settings, plan: Plan) -> Found:
    """-> a started container. UserError when the port is taken, another one has its name or Docker has no GPUs to give; RunFailed.
    Nothing is left of one that could not be started."""
    import docker

    address = "%s port %d" % (settings.host, settings.port)
    name = found.name_of(settings.port)
    try:
        made = client.api.create_container(
            plan.image, plan.command, name=name, environment=plan.environment, labels=_labels(settings, plan), ports=[PORT],
            host_config=_host_config(client, settings, plan), stop_timeout=found.STOP_S, detach=True,
        )  # fmt: skip
    except docker.errors.APIError as error:
        if error.status_code == 409:
            raise UserError(_name_taken(client, name, settings.port)) from None
        raise failures.of_start(said(error), "the image %s" % plan.image) from None
    handle = client.containers.get(made["Id"])
    try:
        handle.start()
    except BaseException as error:
        handle.remove(force=True)
        if isinstance(error, docker.errors.APIError):
            raise failures.of_start(said(error), address) from None
        raise
    handle.reload()
    return Found(client, handle)


def _name_taken(client: Any, name: str, port: int) -> str:
    import docker

    try:
        handle = client.containers.get(name)
    except docker.errors.NotFound:
        return "port %d: another pipedock serve has just begun or ended there; try again" % port
    if handle.labels.get(found.PORT) == str(port):
        return "port %d: pipedock serve is starting a server there already; watch it with --status, or end it with --stop" % port
    return "a container named %s is there that pipedock did not start: rename it (docker rename), or choose another --port" % name


def _labels(settings: Settings, plan: Plan) -> Dict[str, str]:
    return {
        found.PORT: str(settings.port),
        found.MODEL: settings.folder,
        found.ENGINE: settings.engine,
        found.VERSION: plan.version,
        found.URL: url_of(settings.host, settings.port),
        found.IDENTITY: settings.identity(),
        found.KEYED: "true" if settings.api_key else "false",
        found.NAME: plan.mount.name,
    }


def _host_config(client: Any, settings: Settings, plan: Plan) -> Any:
    """The host's side: port, mount, memory, GPUs."""
    from docker import types

    which: Dict[str, Any] = {"device_ids": plan.ids} if plan.ids else {"count": plan.gpus}
    return client.api.create_host_config(
        port_bindings={PORT: (plan.address, settings.port)},
        mounts=[types.Mount(plan.mount.target, plan.mount.source, type="bind", read_only=not plan.writable)],
        shm_size=plan.shm,
        device_requests=[types.DeviceRequest(capabilities=[["gpu"]], **which)] if plan.gpus else None,
        ulimits=[types.Ulimit(name="stack", soft=STACK, hard=STACK)],
        log_config=types.LogConfig(type="json-file", config={"max-size": "50m", "max-file": "2"}),
        init=True,  # signals reach the server even while it is loading, and its dead children are reaped
    )


def shm_of(engine: str, version: str) -> str:
    return SHM_OLD if engine == "tgi" and version.startswith("0.") else SHM[engine]


def shm_bytes(text: str) -> int:
    """ "1g", "512m" or a number of bytes, as docker's --shm-size takes it. UserError."""
    match = SIZE.fullmatch(text.strip())
    size = int(float(match.group(1)) * 1024 ** "bkmgt".index(match.group(2).lower() or "b")) if match else 0
    if size < 1:
        raise UserError("--shm-size %s: expected a size like 1g or 512m" % text)
    return size


def address_of(host: str) -> str:
    """``host`` as an address: Docker publishes on addresses only. UserError."""
    family: Optional[int] = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return str(socket.getaddrinfo(host, None, family or 0, socket.SOCK_STREAM)[0][4][0])
    except OSError as error:
        raise UserError("--host %s: %s; give an address of this machine" % (host, error.strerror or error)) from None
