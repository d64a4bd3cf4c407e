"""Fixtures of the round trips: an honest export of each family to spoil."""

import shutil

import pytest

from export.to_hf import to_hf
from tests.models import tiny_config
from tests.roundtrip.folders import make_checkpoint, seal
from tests.tokenizers import tiny_tokenizer


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """{family: folder with a checkpoint "c" and its export "x"}; the llama one has a tokenizer."""
    folders = {}
    for family in ("llama", "bloom"):
        folder = tmp_path_factory.mktemp(family)
        config = tiny_config(family, tie_word_embeddings=family == "bloom", vocab_size=520)
        make_checkpoint(folder / "c", config)
        if family == "llama":
            tiny_tokenizer(folder / "c", "bpe", vocab=512, chat_template="{{ messages[0]['content'] }}")
            seal(folder / "c")
        to_hf(str(folder / "c"), str(folder / "x"))
        folders[family] = folder
    return folders


@pytest.fixture
def pair(made, tmp_path):
    """A copy that a test may spoil: pair("llama") -> (checkpoint, export)."""

    def copy(family="llama"):
        shutil.copytree(str(made[family]), str(tmp_path / family))
        return tmp_path / family / "c", tmp_path / family / "x"

    return copy
