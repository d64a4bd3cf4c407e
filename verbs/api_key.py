"""``--api-key-file``: the key that a server asks for, in a file, so that no command line shows it."""

from typing import Optional


def read(path: Optional[str]) -> Optional[str]:
    """The one word that the file holds; None where no file is named. Raises UserError."""
    from pipeline_train.errors import UserError

    if not path:
        return None
    try:
        with open(path, encoding="utf-8") as handle:
            key = handle.read().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError("--api-key-file %s: %s" % (path, getattr(error, "strerror", None) or "not text")) from None
    if len(key.split()) != 1:
        raise UserError("--api-key-file %s: expected one word" % path)
    return key
