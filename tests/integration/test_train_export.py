"""The ``export:`` section of run.yaml: refused before training when it cannot be written, written and proved after."""

import json

import pytest
import yaml

from export import from_ranks
from export.to_hf import to_hf
from pipedock import main
from pipeline_train import metrics
from tests.integration import dying_export
from tests.models import make_hf, tiny_config
from tests.tokenizers import tiny_tokenizer
from verbs.train import kept


def test_train_exports_and_proves(tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    tiny_tokenizer(tmp_path / "model")
    make_hf(tmp_path / "model", tiny_config("bloom", vocab_size=512))
    (tmp_path / "train.jsonl").write_text(json.dumps({"type": "pretrain", "text": "a small text " * 30}) + "\n")
    texts = [{"type": "instruct", "instruct": "a text", "output": "a small text " * n} for n in (1, 9, 2, 3, 7)]
    (tmp_path / "eval.jsonl").write_text("".join(json.dumps(text) + "\n" for text in texts))
    out, export, path = tmp_path / "out", tmp_path / "export", tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({
        "run": {"out": str(out), "self_test": False}, "model": {"path": str(tmp_path / "model")},
        "data": {"train": str(tmp_path / "train.jsonl"), "eval": str(tmp_path / "eval.jsonl"), "seq_len": 64},
        "parallel": {"pipe": 1}, "batch": {"global": 2}, "train": {"max_steps": 2}, "export": {"dir": str(export)},
    }))  # fmt: skip
    command = ["train", "--config", str(path), "--json"]

    export.mkdir()
    (export / "thesis.txt").write_text("mine")
    assert main(command) == 2
    assert "exists and is not empty; name another folder or remove it" in capfd.readouterr().err and not out.exists()
    assert main(command + ["--resume", "auto"]) == 2, "a folder that is no export of ours is never replaced"
    assert "is not an export of pipedock" in capfd.readouterr().err and (export / "thesis.txt").read_text() == "mine"
    (export / "thesis.txt").unlink()
    for place, what in ((out, "is %s itself" % out), (tmp_path / "model" / "x", "lies inside"), (tmp_path, "holds ")):
        assert main(command + ["--set", "export.dir=%s" % place]) == 2
        error = capfd.readouterr().err
        assert what in error and "name a folder of its own for the export" in error and not out.exists()

    killed(command, tmp_path, capfd, monkeypatch)
    assert main(command) == 0
    said = capfd.readouterr()
    document = json.loads(said.out)
    proof = json.loads((export / "proof.json").read_text())
    assert (document["export"], document["steps"], proof["holds"], proof["step"]) == (str(export), 2, True, 2)
    assert document["written_by_ranks"]["bytes"] > 100000 and "GB from 1 ranks in" in said.err
    to_hf(str(out), str(tmp_path / "again" / "export"))
    for path in (tmp_path / "again" / "export").iterdir():
        assert path.name == "README.md" or path.read_bytes() == (export / path.name).read_bytes(), path.name
    assert "Proved equal" in (export / "README.md").read_text()

    same_evaluation(out, export)

    written = (export / "proof.json").stat().st_mtime_ns
    assert main(command + ["--resume", "auto"]) == 0
    assert json.loads(capfd.readouterr().out)["finished"] is True
    assert (export / "proof.json").stat().st_mtime_ns == written, "a proved export of the same step is left alone"

    (export / "model.safetensors").unlink()
    assert main(command + ["--resume", "auto"]) == 0
    assert (export / "model.safetensors").exists(), "an export that lost its weights is written again"

    (export / "proof.json").write_text("{}")
    assert main(command + ["--resume", "auto"]) == 0
    assert json.loads((export / "proof.json").read_text())["holds"] is True, "an export without proof is written again"

    assert kept(out) == "%s: step_000002 is kept; continue with --resume" % out
    assert kept(tmp_path / "nothing").endswith(
        "nothing was saved yet; --resume auto starts again. train.save_every sets how often a run is saved"
    )


def killed(command, tmp_path, capfd, monkeypatch):
    """A rank that dies in the export leaves nothing that looks like one; the next start exports from the checkpoint."""
    command = command + ["--set", "run.out=%s" % (tmp_path / "died"), "--set", "export.dir=%s" % (tmp_path / "of-died")]
    before = sorted(path.name for path in tmp_path.iterdir())
    monkeypatch.setattr(from_ranks, "WRITE", dying_export.CALL)
    assert main(command) == 1
    said = capfd.readouterr()
    assert "rank 0: was killed by SIGKILL" in said.err and "step_000002 is kept; continue with --resume" in said.err
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(before + ["died"]), "something of the export is left"
    monkeypatch.undo()
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert main(command + ["--resume", "auto"]) == 0
    document = json.loads(capfd.readouterr().out)
    assert document["finished"] is True and "written_by_ranks" not in document
    assert json.loads((tmp_path / "of-died" / "proof.json").read_text())["holds"] is True


def same_evaluation(out, export):
    """The evaluated loss is transformers' mean over all learnt tokens of the evaluation data, not a mean of its steps' means."""
    import torch
    from transformers import AutoModelForCausalLM

    from pipeline_train.data.feed import Feed
    from pipeline_train.selftest import loss_of

    pad_id = json.loads((out / "resolved" / "data.json").read_text())["pad_id"]
    feed = Feed.open(out / "data", "eval", seq_len=64, rows_per_step=2, seed=42, pack=True, pad_id=pad_id)
    steps = [feed.at(step) for step in range(feed.steps_per_epoch)]
    model = AutoModelForCausalLM.from_pretrained(str(export)).eval()
    with torch.no_grad():
        losses = [float(loss_of(model, rows)) for rows in steps]
    weights = [rows.learnt_tokens for rows in steps]
    wanted = sum(loss * weight for loss, weight in zip(losses, weights)) / sum(weights)
    line = [line for line in metrics.read(out / "metrics.jsonl") if line["kind"] == "eval"][-1]
    assert line["tokens"] == sum(weights) and line["loss"] == pytest.approx(wanted, rel=1e-5)
    assert len(steps) > 1 and abs(sum(losses) / len(losses) - wanted) > 1e-4 * wanted, "the two means are the same here"
