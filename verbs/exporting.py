"""The ``export:`` section of run.yaml, for ``pipedock train``: checked before training, written and proved after it."""

import contextlib
from typing import Any, Dict, Iterator, Optional

from .progress import say


def check_before(config: Any, resume: bool) -> None:
    """Raises UserError when the folder cannot be written: now, not after days of training."""
    if config.export is None:
        return
    from export.aside import check_free

    inputs = [path for path in (config.run.out, config.model.path, config.data.train, config.data.eval) if path is not None]
    with _named():
        check_free(config.export.dir, overwrite=resume, apart_from=inputs)


def check_model(section: Any, dims: Any, dtype: str, room: bool) -> None:
    """Raises UserError when this model cannot be exported for export.target, or with ``room`` when the disk is too full for it."""
    if section is None:
        return
    from export.aside import check_room
    from export.targets import check_run
    from pipeline_train.families import FAMILIES

    check_run(section.target, dims)
    if room:
        numbers = sum(FAMILIES[dims.family].layer_params(dims, layer) for layer in range(dims.layers))
        with _named():
            check_room(section.dir, numbers * (4 if dtype == "fp32" else 2))


@contextlib.contextmanager
def _named() -> Iterator[None]:
    """A UserError says which key it is about."""
    from pipeline_train.errors import UserError

    try:
        yield
    except UserError as error:
        raise UserError("export.dir: %s" % error) from None


def by_ranks(section: Any) -> Optional[str]:
    """What the ranks call when they have trained, for launch; see export.from_ranks."""
    if section is None:
        return None
    from export.from_ranks import WRITE

    return WRITE


@contextlib.contextmanager
def nothing_half_done(section: Any) -> Iterator[None]:
    """What the ranks have begun to export and nobody has finished is removed, however training ends."""
    try:
        yield
    finally:
        if section is not None:
            from export.aside import abandon

            abandon(section.dir)


def to_do(prepared: Any, trained: bool) -> bool:
    """Is anything to be exported, now that training has ended or had ended before?"""
    section = prepared.config.export
    if section is None or trained:
        return section is not None
    from export.verify import proved

    return not proved(section.dir, str(prepared.out), prepared.total)


def export(prepared: Any, trained: bool, written: Optional[Dict[str, Any]] = None) -> Dict[str, Any]:
    """The HF folder and its proof; when nothing was ``trained``, only if that is still to do. ``written``: what the ranks say about
    the weights, which they have written or left to be read from the checkpoint; see export.from_ranks."""
    section, run = prepared.config.export, str(prepared.out)
    if section is None:
        return {}
    from export import from_ranks
    from export.measure import print_progress
    from export.to_hf import to_hf
    from export.verify import verify

    if not to_do(prepared, trained):
        return {"export": section.dir}
    if written is not None:
        say(from_ranks.text_of(written))
    if written is not None and "bytes" in written:
        notes = from_ranks.complete(run, section.dir, section.target)
    else:
        notes = to_hf(run, section.dir, section.target, overwrite=True, progress=print_progress("to-hf"))["notes"]
    for note in notes:
        say("note: %s" % note)
    verify(run, section.dir, progress=print_progress("verify"))
    return {"export": section.dir} if written is None else {"export": section.dir, "written_by_ranks": written}
