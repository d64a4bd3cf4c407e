"""The model card tells where an export comes from, and the proof's figures once there are any."""

import json
import xml.etree.ElementTree as ET

import pytest
import yaml

from export import card
from export.to_hf import to_hf
from export.verify import verify
from pipeline_train import proof as proofs
from tests.models import make_hf, tiny_config
from tests.roundtrip.folders import change_weights, failing, make_checkpoint


def front(folder):
    _, block, rest = (folder / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    return yaml.safe_load(block), rest


@pytest.fixture
def run(tmp_path):
    """A run as train leaves it, of a base model with a licence."""
    base, run = tmp_path / "hub" / "models--someone--tiny" / "snapshots" / "abc", tmp_path / "run"
    make_hf(base, tiny_config("llama"))
    (base / "README.md").write_text("---\nlicense: bigscience-bloom-rail-1.0\nlicense_link: LICENSE\nlanguage: en\n---\n# Tiny\n")
    (base / "LICENSE").write_text("Be kind.")
    make_checkpoint(run / "checkpoints" / "step_000007", tiny_config("llama"), run_dtype="bf16")
    (run / "resolved").mkdir()
    (run / "data").mkdir()
    settings = {"run": {"name": "mine", "out": "run"}, "model": {"path": str(base)}, "optim": {"lr": 0.001}}
    (run / "resolved" / "run.yaml").write_text(yaml.safe_dump(settings))
    (run / "data" / "train.json").write_text(
        json.dumps({"records": 12, "tokens": 345, "learnt_tokens": 67, "hash": "f00d", "warnings": []})
    )
    rows = [{"kind": "start", "step": 0}] + [{"kind": "step", "step": n, "loss": 4.0 - n / 4} for n in range(1, 6)]
    rows += [{"kind": "start", "step": 3}] + [{"kind": "step", "step": n, "loss": 9.0 - n} for n in range(4, 8)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"kind": "st')
    return run


def test_the_card_of_a_run(run, tmp_path):
    to_hf(str(run), str(tmp_path / "x"), target="tgi-3")
    about, text = front(tmp_path / "x")
    assert about == {
        "library_name": "transformers", "base_model": "someone/tiny", "license": "bigscience-bloom-rail-1.0",
        "license_link": "LICENSE",
    }  # fmt: skip
    assert (tmp_path / "x" / "LICENSE").read_text() == "Be kind."
    assert (
        "# mine\n" in text
        and "Written by pipedock for `tgi-3`, bf16." in text
        and "Fine-tuned from `someone/tiny`: step 7." in text
    )
    assert "Data: records 12, tokens 345, learnt_tokens 67, hash f00d." in text and "lr: 0.001" in text
    assert "Loss 3.7500 at step 1, 2.0000 at step 7." in text and "![loss](loss.svg)" in text
    assert card.losses(run / "metrics.jsonl") == [(1, 3.75), (2, 3.5), (3, 3.25), (4, 5.0), (5, 4.0), (6, 3.0), (7, 2.0)]
    places = ET.parse(str(tmp_path / "x" / "loss.svg")).getroot().find("{http://www.w3.org/2000/svg}polyline").get("points").split()
    assert len(places) == 7 and places[0].startswith("40.0,") and places[-1] == "600.0,200.0" and places[3].endswith(",40.0")
    assert "- torch " in text and "Not proved yet" in text


def test_the_proof_goes_into_the_card_and_stays_valid(run, tmp_path):
    to_hf(str(run), str(tmp_path / "x"))
    proof = verify(str(run), str(tmp_path / "x"))
    text = (tmp_path / "x" / "README.md").read_text()
    assert "Not proved yet" not in text and text.count(card.BEGIN) == text.count(card.END) == 1
    assert "%d tensors bit-equal" % proof["tensors"]["compared"] in text and "in bf16 the same likeliest token" in text
    assert "LICENSE" in proof["files"] and not {"README.md", "loss.svg"} & set(proof["files"])
    (tmp_path / "x" / "README.md").write_text(text + "More words of the user.")
    assert proofs.objection(tmp_path / "x") is None
    change_weights(tmp_path / "x", lambda s: s["model.norm.weight"].mul_(2))
    failing(run, tmp_path / "x")
    text = (tmp_path / "x" / "README.md").read_text()
    assert "**Does not hold**: 1 tensor(s) differ in their bits: model.norm.weight" in text
    assert text.endswith("More words of the user.")


def test_a_card_without_a_run_or_a_base(tmp_path):
    make_checkpoint(tmp_path / "c", tiny_config("bloom"))
    to_hf(str(tmp_path / "c"), str(tmp_path / "x"))
    about, text = front(tmp_path / "x")
    assert about == {"library_name": "transformers"} and "# x\n" in text and "names no licence here" in text
    assert "## Training" not in text and not (tmp_path / "x" / "loss.svg").exists()
    (tmp_path / "x" / "README.md").unlink()
    assert verify(str(tmp_path / "c"), str(tmp_path / "x"))["holds"] and not (tmp_path / "x" / "README.md").exists()


def test_weights_of_an_export_are_known_without_their_page(tmp_path):
    """The mark is in every shard's header; whoever writes the weights anew makes a model of his own."""
    from transformers import AutoModelForCausalLM

    make_checkpoint(tmp_path / "c", tiny_config("llama"))
    to_hf(str(tmp_path / "c"), str(tmp_path / "x"), shard_size="100KB")
    (tmp_path / "x" / "pipedock-export.json").unlink()
    assert "is an export of pipedock without a proof" in proofs.objection(tmp_path / "x")
    AutoModelForCausalLM.from_pretrained(str(tmp_path / "x")).save_pretrained(str(tmp_path / "own"))
    assert proofs.objection(tmp_path / "own") is None
    for path in (tmp_path / "x").glob("*.safetensors"):
        assert proofs._marked(path)


@pytest.mark.parametrize("spoilt", ["resolved/run.yaml", "data/train.json", "metrics.jsonl"])
@pytest.mark.parametrize("content", [b"\xff\xfe", b"[1, 2]", b"{", b"", b'"text"\n'], ids=["bytes", "list", "cut", "empty", "text"])
def test_what_a_card_is_made_of_may_be_damaged(spoilt, content, run, tmp_path):
    (run / spoilt).write_bytes(content)
    to_hf(str(run), str(tmp_path / "x"))
    assert "step 7." in front(tmp_path / "x")[1]


def test_flat_and_short_curves(tmp_path):
    assert 'points="40.0,200.0 600.0,200.0"' in card.curve([(1, 2.0), (2, 2.0)])
    assert card.losses(tmp_path / "none") == []
    (tmp_path / "m").write_text('{"kind": "step", "step": 1, "loss": NaN}\n{"kind": "step", "step": 2, "loss": 1.0}\n')
    assert card.losses(tmp_path / "m") == [(2, 1.0)]
