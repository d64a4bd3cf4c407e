"""Text for the page. Whatever comes from a user or a file goes through ``text`` or ``attribute``: nothing else may enter it."""

import html
import json
import re
from typing import Any

# What a browser would not show, or would let change how the text around it is shown: control characters, directions, surrogates.
HIDDEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ufeff\ufff9-\ufffb\ufffe\uffff\ud800-\udfff]"
)


def text(value: Any) -> str:
    """Any value as text of the page; hidden characters are spelled out."""
    shown = HIDDEN.sub(lambda found: "\\u%04x" % ord(found.group()), str(value))
    return html.escape(shown, quote=True)


def attribute(value: Any) -> str:
    """The same for the inside of double quotes."""
    return text(value).replace("\n", " ").replace("\t", " ")


def script_json(value: Any) -> str:
    """JSON that cannot end the script element it stands in."""
    dumped = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return dumped.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def figure(value: float) -> str:
    """A number for a person: thousands apart, four digits, no needless zeros."""
    size = abs(value)
    if size >= 1e7 or 0 < size < 1e-3:
        return "%.3g" % value
    if size >= 1000:
        return f"{value:,.0f}"
    return "%.4g" % value


def count(value: float) -> str:
    """12345678 -> 12,345,678."""
    return f"{value:,.0f}"


def duration(seconds: float) -> str:
    whole = int(seconds + 0.5)
    if whole < 60:
        return "%.1f s" % seconds
    hours = "%d h " % (whole // 3600) if whole >= 3600 else ""
    return "%s%d min %02d s" % (hours, whole // 60 % 60, whole % 60)
