"""What is wrong when a server's token ids are not training's: the first one that differs, and what that looks like."""

import json
from typing import List, Optional

from pipeline_train.data.encode import TextCodec

AROUND = 24  # characters shown of a text, from where it differs


def of_ids(
    codec: TextCodec, expected: List[int], got: List[int], rendered: Optional[str] = None, text: Optional[str] = None
) -> str:
    """One line. ``rendered``: the text that training's chat template gives, ``text`` what the server's gave (None: it does not
    tell); without ``rendered`` no template was involved."""
    place = next((i for i, (a, b) in enumerate(zip(expected, got)) if a != b), min(len(expected), len(got)))
    return "token %d: expected %s, got %s: %s" % (
        place,
        _token(codec, expected, place),
        _token(codec, got, place),
        _cause(codec, expected, got, rendered, text),
    )


def _cause(codec: TextCodec, expected: List[int], got: List[int], rendered: Optional[str], text: Optional[str]) -> str:
    bos = codec.tokenizer.bos_token_id
    if bos is not None and expected[:1] == [bos] and got == expected[1:]:
        return "BOS (%s) is missing" % codec.tokenizer.bos_token
    if bos is not None and got[:1] == [bos] and got[1:] == expected:
        return "BOS (%s) %s" % (codec.tokenizer.bos_token, "twice" if expected[:1] == [bos] else "is added, training had none")
    if rendered is not None:
        said = _said(codec, got) if text is None else text
        wanted = _said(codec, expected) if text is None else rendered
        if said != wanted:
            return "another chat template: %s" % of_texts(wanted, said)
    return "another tokenizer than training's"


def of_texts(expected: str, got: str) -> str:
    place = next((i for i, (a, b) in enumerate(zip(expected, got)) if a != b), min(len(expected), len(got)))
    return "from character %d on %s instead of %s" % (place, _shown(got, place), _shown(expected, place))


def _shown(text: str, place: int) -> str:
    return json.dumps(text[place : place + AROUND], ensure_ascii=False) if text[place:] else "nothing"


def _said(codec: TextCodec, ids: List[int]) -> str:
    return codec.decode([one for one in ids if one < len(codec.tokenizer)])


def _token(codec: TextCodec, ids: List[int], place: int) -> str:
    if place >= len(ids):
        return "the end"
    return "%d %s" % (ids[place], json.dumps(_said(codec, [ids[place]]), ensure_ascii=False))
