"""A model path -> a folder: a local one as it is, a hub name through the hub's cache."""

import re
from pathlib import Path
from typing import Callable, Optional

from ..errors import UserError

SMALL = ["*.json", "*.model", "*.txt", "*.jinja"]  # config, index, tokenizer, template
HUB_NAME = re.compile(r"^[A-Za-z0-9][\w.-]*(/[\w.-]+)?$")


def resolve(path: str, weights: bool = True) -> Path:
    """The folder that ``path`` names. A hub name is downloaded (``weights=False``: config and tokenizer only).

    The cache, HF_HUB_OFFLINE, HF_TOKEN and HF_ENDPOINT work as in huggingface_hub. Raises UserError, one line.
    """
    folder = Path(path)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise UserError("%s: is a file; name the folder that holds config.json and the weights" % path)
    if not HUB_NAME.match(str(path)):
        raise UserError("%s: no such folder" % path)
    return _snapshot(str(path), weights)


def _snapshot(name: str, weights: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import HfHubHTTPError

    def get(patterns: list) -> Path:
        return Path(snapshot_download(name, allow_patterns=patterns))

    folder = _quietly(name, get, SMALL, HfHubHTTPError)
    if not weights:
        return folder
    for patterns in (["model*.safetensors"], ["pytorch_model*.bin"]):
        folder = _quietly(name, get, SMALL + patterns, HfHubHTTPError)
        if any(True for p in patterns for _ in folder.glob(p)):
            break
    return folder


def _quietly(name: str, get: Callable, patterns: list, http_error: Optional[type]) -> Path:
    """One line instead of the hub library's traceback. OSError: no network, nothing in the cache, offline; ValueError: bad name."""
    try:
        return get(patterns)
    except (OSError, ValueError, http_error) as error:  # type: ignore[misc]
        reason = str(error).strip().split("\n")[0][:200]
        raise UserError(
            "%s: no such folder here, and the hub did not give a model of that name (%s). "
            "Name a local folder, or download it first where there is a network." % (name, reason or type(error).__name__)
        ) from None
