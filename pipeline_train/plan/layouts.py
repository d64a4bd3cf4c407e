"""Other ways to share the same GPUs between stages and replicas. Standard library only."""

from typing import Any, Dict, List, NamedTuple, Optional

from . import cards
from .fitting import bounds_that_fit
from .memory import Setup, Sizes
from .speed import speed

WORTH = 1.05  # what a plan says of two layouts' speeds may be wrong by some per cent


class Layout(NamedTuple):
    """``micro_batches``: per replica, of a step of as many rows. ``tokens_per_s``: planned, over all replicas."""

    pipe: int
    data: int
    micro_batches: int
    tokens_per_s: float


def best_other(sizes: Sizes, setup: Setup, gpu: str, link: str, share: float) -> Optional[Layout]:
    """The fastest layout of ``setup``'s GPUs but its own that fits on the card, every stage as ``parts: auto`` cuts it. ``share``:
    of the card's peak. None where none fits, or the rows of a step cannot be shared so."""
    found, dims = [], sizes.dims
    gpus, batches = setup.pipe * setup.data, setup.micro_batches * setup.data
    for data in range(1, gpus + 1):
        pipe = gpus // data
        if gpus % data or batches % data or data == setup.data or pipe > dims.layers:
            continue
        other = setup._replace(pipe=pipe, data=data, micro_batches=batches // data)
        cut = bounds_that_fit(sizes, other, "auto", gpu)
        if cut is not None:
            fast = speed(dims, sizes, other, cut, gpu, cards.link_named(link), share)
            found.append(Layout(pipe, data, batches // data, fast.tokens_per_s))
    return max(found, key=lambda layout: layout.tokens_per_s) if found else None


def notes(document: Dict[str, Any], other: Optional[Layout], own_parts: bool, from_file: bool) -> List[str]:
    """What to tell of it beside a plan, if it is worth a line. ``own_parts``: the user's, which would have to go."""
    if other is None or (document["fits"] and other.tokens_per_s < WORTH * document["tokens_per_s"]):
        return []
    if from_file:
        how = "parallel.pipe: %d, parallel.data: %d" % other[:2] + ", parallel.parts: auto" * own_parts
    else:
        how = "--gpus %d --data %d --micro-batches %d" % (document["gpus"], other.data, other.micro_batches)
        how += ", without --parts" * own_parts
    faster = " and be %.2f times as fast" % (other.tokens_per_s / document["tokens_per_s"]) if document["fits"] else ""
    return ["%d stage%s x %d replica%s, as many rows a step, would fit%s: about %.0f tokens/s (%s)" % (
        other.pipe, "s" * (other.pipe > 1), other.data, "s" * (other.data > 1), faster, other.tokens_per_s, how)]  # fmt: skip
