"""<out>/resolved: what a run is made of, as it was started last."""

import json
import shutil
from pathlib import Path
from typing import Any, Dict

from . import config
from .config_schema import RunConfig
from .data.encode import TextCodec
from .errors import UserError


def file(out: Path, evaluate: bool = False) -> Path:
    """What the ranks are started with: the record of what is trained, or that run as it is to be evaluated."""
    return out / "resolved" / ("evaluation.yaml" if evaluate else "run.yaml")


def write(run: RunConfig, out: Path, source: Path, folder: Path, codec: TextCodec, documents: Dict[str, Any]) -> None:
    """``source``: the user's run.yaml; ``folder``: the model's; ``documents``: file name -> content. Raises UserError."""
    resolved = out / "resolved"
    try:
        (resolved / "model").mkdir(parents=True, exist_ok=True)
        (out / "logs").mkdir(exist_ok=True)
        shutil.copyfile(str(source), str(resolved / "original.yaml"))
        file(out).write_text(config.resolved_yaml(run), encoding="utf-8")
        for name, document in documents.items():
            (resolved / name).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        shutil.copyfile(str(folder / "config.json"), str(resolved / "model" / "config.json"))
        codec.save(str(resolved / "model"))
    except OSError as error:
        raise _unwritable(out, error) from None


def stays(run: RunConfig, out: Path) -> bool:
    """Nothing is left to train: what was trained stays as it was written, but for its export. False: it is not there."""
    path = file(out)
    try:
        trained = config.load(path)
    except UserError:
        return False
    if trained.export != run.export:
        trained.export = run.export
        try:
            path.write_text(config.resolved_yaml(trained), encoding="utf-8")
        except OSError as error:
            raise _unwritable(out, error) from None
    return True


def evaluates(out: Path) -> bool:
    """Whether the run was to be evaluated when it was started last."""
    try:
        return config.load(file(out)).data.eval is not None
    except UserError:
        return False


def for_evaluation(run: RunConfig, out: Path) -> RunConfig:
    """Nothing is left to train: what ``run`` says of how and where to evaluate, and what was trained for the rest. Written for the
    ranks, beside the record of what was trained. Raises UserError."""
    made = config.load(file(out))
    made.parallel, made.batch, made.data, made.export = run.parallel, run.batch, run.data, run.export
    made.run.out, made.model.path = run.run.out, run.model.path
    try:
        file(out, evaluate=True).write_text(config.resolved_yaml(made), encoding="utf-8")
    except OSError as error:
        raise _unwritable(out, error) from None
    return made


def _unwritable(out: Path, error: OSError) -> UserError:
    return UserError("run.out: %s: cannot be written: %s" % (error.filename or out, error.strerror))
