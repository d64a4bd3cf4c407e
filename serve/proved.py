"""Whether a folder may be served: an export must carry a proof that holds for its files as they are."""

import sys
from pathlib import Path
from typing import Callable

from pipeline_train import proof
from pipeline_train.errors import UserError


def check_proof(model: str, say: Callable[[str], None], required: bool = True) -> None:
    """A folder that never was an export needs no proof. UserError, or, with ``required`` False, a warning on stderr. ``say`` is
    told before the files are read."""
    objection = proof.objection(Path(model), say)
    if objection is None:
        return
    if required:
        raise UserError("%s (--no-proof serves it all the same)" % objection)
    sys.stderr.write("WARNING: --no-proof: served although nothing proves that this is the trained model: %s\n" % objection)
