"""Judge, fetch the image, start a container, wait until it answers, and say why when it does not."""

import contextlib
import os
import re
import time
from typing import Any, Callable, Mapping, Tuple

from pipeline_train.errors import RunFailed, UserError

from .. import limits
from ..reach import healthy, tail
from ..settings import Settings
from . import argv, create, failures, gpus, images
from .daemon import answering
from .found import Found
from .mounts import mount

Say = Callable[[str], None]
LOOK_S = 0.2  # between two looks at the server; at its log every fifth time
STAGES = (  # a line of the log -> what is going on; the last one found counts
    (r"Starting (?:check and )?download process", "looking for weights"),
    (r"Convert(?:ing|ed)? ", "converting weights"),
    (r"Starting shard|Starting to load model", "loading shards"),
    (r"Loading safetensors checkpoint shards: +(\d+%)", "loading weights"),
    (r"Shard (?:\d+ )?ready|Loading weights took", "shards are ready"),
    (r"Starting Webserver|Warming up model|Capturing CUDA graphs", "warming up"),
    (r"Connected$|Application startup complete", "almost there"),
)


@answering()
def start(client: Any, settings: Settings, progress: Say, warn: Say, timeout: float) -> Found:
    """-> a server that has answered. ``warn`` gets what the user should read, ``progress`` what goes on, about once a second.
    UserError or RunFailed; then nothing of it is left but its log."""
    have = gpus.seen()
    verdict, config = judged(settings, have, warn)
    taken = gpus.take(have, settings.shards)
    place = mount(settings.model)
    plan = create.Plan(
        image=settings.image or verdict.image,
        version=verdict.version,
        command=argv.argv(settings, verdict.version, place.model_id, place.name, config, verdict.flags),
        environment={**argv.environment(settings, verdict.version, place.target, os.environ), **verdict.env},
        mount=place,
        writable=verdict.writable,
        address=create.address_of(settings.host),
        shm=create.shm_bytes(settings.shm_size or create.shm_of(settings.engine, verdict.version)),
        gpus=len(taken),
        ids=taken if have.chosen else [],
    )
    if not taken:
        warn("WARNING: no GPU is seen on this machine (nvidia-smi lists none): %s is started without one" % settings.engine)
    if settings.api_key and settings.engine == "tgi":  # launcher/src/main.rs:1947 and 2079 of v3.3.7
        warn("note: TGI gives the key to its router on a command line and prints it (docker logs): who may log in here can read it")
    images.ensure(client, plan.image, None if settings.image else verdict.digest, progress)
    container = create.create(client, settings, plan)
    try:
        _wait_until_healthy(container, place.model_id, progress, timeout)
    except BaseException:
        with contextlib.suppress(RunFailed):  # why it is to be removed is what counts
            if container.alive:
                container.stop()
            else:
                container.remove()
        raise
    return container


def judged(settings: Settings, have: gpus.Gpus, warn: Say) -> Tuple[limits.Verdict, Mapping[str, Any]]:
    """-> what the engine needs, and config.json. UserError with every reason why it cannot serve this model here."""
    config, files, nbytes = limits.look(settings.model)
    question = limits.Question(
        config,
        settings.engine,
        settings.version,
        settings.shards,
        gpu=settings.gpu or (have.card if have.ids else "cpu"),
        gpus=len(have.ids) or None,
        driver=settings.driver or have.driver,
        files=files,
        nbytes=nbytes,
        dtype=settings.dtype,
        max_input=settings.max_input_tokens,
        max_total=settings.max_total_tokens,
        where=settings.model,
    )
    verdict = limits.judge(question)
    if verdict.reasons:
        raise UserError("\n".join(verdict.reasons))
    for note in verdict.notes:
        warn("note: " + note)
    return verdict, config


def _wait_until_healthy(container: Found, model_id: str, progress: Say, timeout: float) -> None:
    started, looks = time.monotonic(), 0
    while True:
        container.handle.reload()
        if not container.alive:
            log, code = container.said(), container.exit_code or 0
            error = failures.of_end(log, code, container.killed_for_memory, container.log)
            raise type(error)(str(error).replace(model_id, container.model))  # the folder as the user knows it
        if healthy(container.url):
            return
        passed = time.monotonic() - started
        if passed > timeout:
            kept = container.keep_log()
            raise RunFailed("not healthy after %d s; the end of %s:\n%s" % (timeout, kept, container.said(20)))
        if looks % 5 == 0:
            progress("%s: %s ... %d s" % (container.model, stage(container.said(200)), passed))
        looks += 1
        time.sleep(LOOK_S)


def ended(container: Found, code: int) -> Exception:
    """What to tell of a server that had answered, and ended with ``code`` although nobody asked it to."""
    log = tail(container.log, None)
    return failures.of_end(log, code, container.killed_for_memory, container.log, "after it was ready")


def stage(log: str) -> str:
    """What a server that is not ready is doing, from what it has said."""
    doing = "starting"
    for line in log.splitlines():
        for pattern, text in STAGES:
            match = re.search(pattern, line.rstrip())
            if match:
                doing = " ".join([text, *match.groups()])
    return doing
