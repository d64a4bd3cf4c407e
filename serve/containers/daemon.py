"""The Docker Engine of this machine, through its SDK; what it says when it does not do as it is told."""

import contextlib
import os
from typing import Any, Iterator
from urllib.parse import urlsplit

import requests

from pipeline_train.errors import RunFailed, UserError

TIMEOUT_S = 60  # for one answer of the engine
LOCAL = (None, "localhost", "localnpipe", "127.0.0.1", "::1")  # a socket, the SDK's names for sockets, this machine's


class NoEngine(UserError):
    """Docker cannot be used here. ``absent``: nothing suggests that it ever was."""

    def __init__(self, message: str, absent: bool) -> None:
        super().__init__(message)
        self.absent = absent


def connect(engine: str = "tgi") -> Any:
    """-> docker.DockerClient that has answered. NoEngine, or UserError for an engine of another machine, which has neither this
    machine's model folder nor its ports. ``engine``: whose containers are wanted, for the message."""
    try:
        import docker
    except ImportError:
        raise NoEngine(
            "--engine %s runs in a container, and Docker's SDK for Python is missing: pip install 'pipedock[serve]'" % engine, True
        ) from None
    host = os.environ.get("DOCKER_HOST", "")
    _refuse_others(host)
    try:
        client = docker.from_env(timeout=TIMEOUT_S)
        _refuse_others(str(client.api.base_url))  # of a context
        client.ping()
        return client
    except (docker.errors.DockerException, requests.RequestException) as error:
        raise _not_reachable(str(error), host) from None


def _refuse_others(url: str) -> None:
    parts = urlsplit(url)
    if parts.scheme == "ssh" or parts.hostname not in LOCAL:
        raise UserError(
            "Docker's engine is %s, another machine, which does not have this model folder: run pipedock there, or choose this "
            "machine's (unset DOCKER_HOST; docker context use default)" % url
        )


def _not_reachable(error: str, host: str) -> NoEngine:
    where = host or "unix:///var/run/docker.sock"
    if "Permission denied" in error:
        return NoEngine("Docker at %s: permission denied; join its group: sudo usermod -aG docker $USER" % where, False)
    absent = not host and not os.path.exists("/var/run/docker.sock")
    reason = next((text for text in ("No such file or directory", "Connection refused") if text in error), error[:200])
    return NoEngine(
        "no Docker engine answers at %s (%s): start it (sudo systemctl start docker), or set DOCKER_HOST; --engine embedded needs "
        "none" % (where, reason),
        absent,
    )


@contextlib.contextmanager
def answering() -> Iterator[None]:
    """RunFailed for what Docker refuses, or does not answer any more, in the middle of the work."""
    import docker

    try:
        yield
    except docker.errors.NotFound as error:
        raise RunFailed("the container is gone, somebody else has removed it: %s" % said(error)) from None
    except (docker.errors.DockerException, requests.RequestException) as error:
        raise RunFailed("Docker's engine refuses, or answers no more: %s" % said(error)) from None


def said(error: Exception) -> str:
    """What the engine itself said, on one line."""
    text = getattr(error, "explanation", None) or str(error)
    return " ".join((text.decode(errors="replace") if isinstance(text, bytes) else str(text)).split())
