"""A model path -> a folder: a local one as it is, a hub name through the hub's cache. No torch: plan asks here, too."""

import os
import re
import socket
from pathlib import Path
from typing import Any, Callable, List, Optional
from urllib.parse import urlsplit
from urllib.request import getproxies

from .errors import UserError

SMALL = ["*.json", "*.model", "*.txt", "*.jinja"]  # config, index, tokenizer, template
HUB_NAME = re.compile(r"^[A-Za-z0-9][\w.-]*(/[\w.-]+)?\Z")


def resolve(path: str, weights: bool = True) -> Path:
    """The folder that ``path`` names. A hub name is downloaded (``weights=False``: config and tokenizer only).

    The cache, HF_HUB_OFFLINE, HF_TOKEN and HF_ENDPOINT work as in huggingface_hub. Raises UserError, one line.
    """
    folder = Path(path)
    if os.path.isdir(str(folder)):  # unlike Path.is_dir, False for a name that is too long
        return folder
    if os.path.exists(str(folder)):
        raise UserError("%s: is a file; name the folder that holds config.json and the weights" % path)
    if not HUB_NAME.match(str(path)):
        raise UserError("%s: no such folder" % path)
    folder = _snapshot(str(path), SMALL)
    if weights:
        for pattern in ("model*.safetensors", "pytorch_model*.bin"):  # .bin only where there are no safetensors
            folder = _snapshot(str(path), SMALL + [pattern])
            if any(folder.glob(pattern)):
                break
    return folder


def config_of(name: str) -> str:
    """The config.json of a hub name, and no other file of it. Raises UserError, one line."""

    def fetch(hub: Any, local: bool) -> str:
        return str(hub.hf_hub_download(name, "config.json", local_files_only=local))

    return _asked(name, fetch)


def _snapshot(name: str, patterns: List[str]) -> Path:
    return Path(_asked(name, lambda hub, local: hub.snapshot_download(name, allow_patterns=patterns, local_files_only=local)))


def _asked(name: str, fetch: Callable[[Any, bool], str]) -> str:
    """``fetch(huggingface_hub, only from the cache)``; one line instead of the library's traceback: no network and nothing in the
    cache, no such model, not allowed. Without a network it retries for 23 s, so what can be known before is asked before."""
    try:
        import huggingface_hub as hub
    except ImportError:
        raise UserError("%s: no such folder or file, and huggingface_hub is not installed to ask the hub" % name) from None
    from huggingface_hub import constants
    from huggingface_hub.utils import HfHubHTTPError

    offline = bool(constants.HF_HUB_OFFLINE)
    away = None if offline else _away(constants.ENDPOINT)
    try:
        return fetch(hub, offline or away is not None)
    except (OSError, ValueError, HfHubHTTPError) as error:
        first = re.split(r"\n|(?<=\w)\.? Please|\. ", str(error).strip())[0][:200]  # its first sentence
        reason = away or first or type(error).__name__
        raise UserError(
            "%s: no such folder or file here, and the hub did not give a model of that name (%s). "
            "Name a local folder, or download it first where there is a network." % (name, reason)
        ) from None


def _away(endpoint: str) -> Optional[str]:
    """Why the hub cannot be reached, as far as a name service says so; with a proxy that is the proxy's affair."""
    address = urlsplit(endpoint)
    if getproxies().get(address.scheme):
        return None
    try:
        socket.getaddrinfo(address.hostname, address.port or 443, type=socket.SOCK_STREAM)
    except OSError as error:
        return "no network: the name %s is not known here (%s)" % (address.hostname, error.strerror or error)
    return None
