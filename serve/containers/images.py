"""The image a container is made of: found here, or pulled with progress."""

import time
from typing import Any, Callable, Dict, Optional, Tuple

from pipeline_train.errors import RunFailed, UserError

from .daemon import said

Say = Callable[[str], None]
EVERY_S = 1.0


def ensure(client: Any, reference: str, digest: Optional[str], progress: Say) -> None:
    """The image ``reference`` ("name:tag") is here; ``digest`` ("sha256:..."), where known, is held against it. UserError when it
    is not here and cannot be pulled; RunFailed when there is no room for it."""
    import docker

    pinned = "%s@%s" % (reference.rpartition(":")[0], digest) if digest else reference
    try:
        image = client.images.get(reference)
    except docker.errors.ImageNotFound:
        _pull(client, pinned, progress)
        try:
            image = client.images.get(pinned)
            if digest:  # pulled by its digest it has no tag, and would not be found by it the next time
                image.tag(*reference.rsplit(":", 1))
        except docker.errors.ImageNotFound:
            raise RunFailed("%s: pulled, and yet not there; see docker images" % pinned) from None
    listed = [entry.partition("@")[2] for entry in image.attrs.get("RepoDigests") or []]
    if digest and digest not in listed:
        raise UserError(
            "%s: the image here is not the one that was pinned (%s); pull it again: docker pull %s, or take yours with --image"
            % (reference, digest, pinned)
        )


def _pull(client: Any, reference: str, progress: Say) -> None:
    import docker

    layers: Dict[str, Tuple[int, int]] = {}
    begin = last = time.monotonic()
    progress("pulling %s" % reference)
    try:
        for event in client.api.pull(reference, stream=True, decode=True):
            if "error" in event:
                raise _cannot(reference, event["error"])
            detail = event.get("progressDetail") or {}
            if event.get("status") == "Downloading" and detail.get("total"):
                layers[event["id"]] = (detail.get("current", 0), detail["total"])
            elif event.get("status") in ("Download complete", "Pull complete") and event.get("id") in layers:
                layers[event["id"]] = (layers[event["id"]][1],) * 2
            if time.monotonic() - last >= EVERY_S:
                last = time.monotonic()
                progress("pulling %s ... %s%d s" % (reference, _done(layers), last - begin))
    except docker.errors.APIError as error:
        raise _cannot(reference, said(error)) from None


def _done(layers: Dict[str, Tuple[int, int]]) -> str:
    done, total = sum(one for one, _ in layers.values()), sum(one for _, one in layers.values())
    return "%.1f of %.1f GB, " % (done / 1e9, total / 1e9) if total else ""


def _cannot(reference: str, error: str) -> Exception:
    """A pull ended with ``error``."""
    if "no space left" in error:
        return RunFailed("%s: no room for the image (%s); docker system df shows what fills it" % (reference, error))
    if any(text in error for text in ("denied", "unauthorized")):
        hint = "docker login, or --image NAME of a copy that you may read"
    elif any(text in error for text in ("manifest unknown", "not found", "manifest for", "does not exist")):
        hint = "there is no such image; see --version and --image"
    else:
        hint = "load it (docker load -i FILE), or --image NAME of a mirror or of an image that is here"
    return UserError("the image %s is not here and cannot be pulled: %s; %s" % (reference, error.rstrip("."), hint))
