"""Where a model folder lies inside the container."""

import os
import re
from pathlib import Path
from typing import NamedTuple, Set

from pipeline_train.errors import UserError

DATA = "/data"
UNSAFE = re.compile(r"[^A-Za-z0-9._-]+")  # TGI's entrypoint splits its arguments at spaces


class Mount(NamedTuple):
    """``source``, outside, is mounted at ``target``; the server is told ``model_id``; ``name``: what people call the model."""

    source: str
    target: str
    model_id: str
    name: str


def mount(model: str) -> Mount:
    """The folder itself, or, when files in it are links (a hub cache), the folder that holds what they lead to as well. UserError
    when that would show the container more than a model."""
    folder = Path(model).resolve()
    name = UNSAFE.sub("-", folder.name).strip(".-") or "model"
    source = Path(os.path.commonpath([str(folder)] + sorted(str(path) for path in _linked(folder))))
    if source != folder and (len(source.parts) < 3 or source in (Path.home(), Path.home().parent, Path("/tmp"))):
        raise UserError("--model %s: its files are links to different places; copy them: cp -rL %s COPY" % (model, model))
    target = "%s/%s" % (DATA, name)
    inside = folder.relative_to(source).as_posix()
    return Mount(str(source), target, target if inside == "." else "%s/%s" % (target, inside), name)


def _linked(folder: Path) -> Set[Path]:
    """The folders of files outside that links in ``folder`` lead to."""
    found = set()
    for path in folder.iterdir():
        real = path.resolve()
        if path.is_symlink() and folder not in real.parents:
            found.add(real.parent)
    return found
