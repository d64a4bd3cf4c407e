"""An output folder that appears whole or not at all: written as ``.<name>.partial`` beside its place, then renamed."""

import contextlib
import json
import os
import shutil
from pathlib import Path
from typing import Any, Dict, Iterator

from pipeline_train.errors import RunFailed, UserError

MARKER = "pipedock-export.json"  # in every export of ours: what --overwrite may replace


@contextlib.contextmanager
def output_folder(output: str, needed: int, overwrite: bool = False) -> Iterator[Path]:
    """Yield an empty folder that becomes ``output`` at the end; an error leaves nothing behind.

    ``needed``: bytes that will be written, checked against the free space. Raises UserError when ``output`` is there and not
    empty (``overwrite`` replaces an export of ours) or cannot be made, RunFailed when writing fails.
    """
    final = Path(os.path.abspath(output))
    check_free(output, overwrite)
    partial = final.parent / (".%s.partial" % final.name)
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        if partial.exists():  # of a run that was killed
            shutil.rmtree(str(partial))
        partial.mkdir()
        free = shutil.disk_usage(str(partial)).free
    except OSError as error:
        raise UserError("%s: cannot be made: %s: %s" % (output, error.filename, error.strerror)) from None
    try:
        if free < needed:
            raise UserError("%s: needs %.2f GiB, only %.2f GiB are free there" % (output, needed / 2**30, free / 2**30))
        yield partial
        _replace(partial, final)
    except OSError as error:
        raise RunFailed("%s: writing failed: %s" % (output, error.strerror or error)) from None
    finally:
        shutil.rmtree(str(partial), ignore_errors=True)


def write_marker(folder: Path, document: Dict[str, Any]) -> None:
    (folder / MARKER).write_text(json.dumps(document, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def check_free(output: str, overwrite: bool = False) -> None:
    """Raise UserError unless ``output`` can be written: absent, empty, or with ``overwrite`` an export of ours."""
    final = Path(os.path.abspath(output))
    if not os.path.lexists(str(final)):
        return
    if not final.is_dir():
        raise UserError("%s: exists and is not a folder; name another --output" % output)
    if not any(final.iterdir()):
        return
    if not overwrite:
        raise UserError("%s: exists and is not empty; name another --output or remove it" % output)
    if not (final / MARKER).is_file():
        raise UserError("%s: is not an export of pipedock (no %s), so --overwrite leaves it alone" % (output, MARKER))


def _replace(partial: Path, final: Path) -> None:
    old = final.parent / (".%s.old" % final.name)
    shutil.rmtree(str(old), ignore_errors=True)
    if final.exists():
        os.replace(str(final), str(old))
    os.replace(str(partial), str(final))
    shutil.rmtree(str(old), ignore_errors=True)
