"""A model path -> a folder: a local one as it is, a hub name through the hub's cache."""

import os
import re
from pathlib import Path
from typing import List

from ..errors import UserError

SMALL = ["*.json", "*.model", "*.txt", "*.jinja"]  # config, index, tokenizer, template
HUB_NAME = re.compile(r"^[A-Za-z0-9][\w.-]*(/[\w.-]+)?$")


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


def _snapshot(name: str, patterns: List[str]) -> Path:
    """One line instead of the hub library's traceback: no network and nothing in the cache, no such model, not allowed."""
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.utils import HfHubHTTPError

    try:
        return Path(snapshot_download(name, allow_patterns=patterns, local_files_only=bool(constants.HF_HUB_OFFLINE)))
    except (OSError, ValueError, HfHubHTTPError) as error:
        reason = re.split(r"\n|(?<=\w)\.? Please|\. ", str(error).strip())[0][:200]  # its first sentence
        raise UserError(
            "%s: no such folder here, and the hub did not give a model of that name (%s). "
            "Name a local folder, or download it first where there is a network." % (name, reason or type(error).__name__)
        ) from None
