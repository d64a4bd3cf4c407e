"""Values of options that argparse reads: what is wrong with one is said before anything is done."""

import argparse
import math
from typing import Callable
from urllib.parse import urlsplit

RECOMPUTE = ("none", "selective", "blocks")  # parallel.recompute


def whole(least: int) -> Callable[[str], int]:
    """A whole number, ``least`` or more."""

    def read(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = least - 1
        if number < least:
            raise argparse.ArgumentTypeError("%r: expected a whole number of at least %d" % (text, least))
        return number

    return read


def seconds(text: str) -> float:
    """More than none."""
    found = _number(text)
    if not found > 0:
        raise argparse.ArgumentTypeError("%r: expected seconds, more than 0" % text)
    return found


def temperature(text: str) -> float:
    found = _number(text)
    if not found >= 0:
        raise argparse.ArgumentTypeError("%r: expected a number of at least 0 (0: always the likeliest token)" % text)
    return found


def url(text: str) -> str:
    """Of a server: http or https, a host, perhaps a port and a path."""
    try:
        parts = urlsplit(text)
        fine = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:  # a port that is none
        fine = False
    if not fine:
        raise argparse.ArgumentTypeError("%s: expected http://HOST:PORT" % text)
    return text


def _number(text: str) -> float:
    """NaN, which compares with nothing, where ``text`` is no finite number."""
    try:
        found = float(text)
    except ValueError:
        return math.nan
    return found if math.isfinite(found) else math.nan
