"""What a safetensors file says about itself, read without torch and without the library. Standard library only.

The format (huggingface/safetensors, README "Format"): 8 bytes little-endian length n, n bytes of JSON, then the tensors' bytes.
"""

import json
from pathlib import Path
from typing import Any, Dict, Tuple, Union

MOST = 100_000_000  # bytes of a header: the limit of the safetensors library


def read(path: Union[str, Path]) -> Tuple[Dict[str, Any], int]:
    """(the header's object, where the data begins). Raises OSError, ValueError or RecursionError for what is no such file;
    weights.files says what is wrong with it."""
    with open(str(path), "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        text = file.read(min(length, MOST))
    if length > len(text):
        raise ValueError("not a safetensors file")
    header = json.loads(text.decode("utf-8"))
    if not isinstance(header, dict):
        raise ValueError("not a safetensors file")
    return header, 8 + length
