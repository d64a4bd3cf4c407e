"""A model folder with code in it: nothing that serves or proves runs it unasked."""

import pytest
import torch

from pipeline_train.errors import UserError
from tests.models import make_hf, tiny_config, with_code
from tests.tokenizers import tiny_tokenizer

pytest.importorskip("starlette", reason="the embedded server needs Python 3.10")
from serve.embedded import loading  # noqa: E402
from serve.prove.reference import Reference  # noqa: E402


def test_code_in_a_folder_does_not_run_in_a_server_or_its_proof(tmp_path):
    model = tmp_path / "model"
    tiny_tokenizer(model)
    make_hf(model, tiny_config("llama", vocab_size=512))
    path = with_code(model, tmp_path / "ran")
    with pytest.raises(UserError) as error:
        loading.load(str(model), None, torch.device("cpu"), None, False)
    wanted = "%s: is code that transformers would run; read it, then remove it or give --trust-remote-code" % path
    assert str(error.value) == wanted
    with pytest.raises(UserError) as error:
        Reference(str(model), "float32")
    assert str(error.value) == "--model %s: %s is code that transformers would run; read it, then remove it" % (model, path)
    assert not (tmp_path / "ran").exists()
