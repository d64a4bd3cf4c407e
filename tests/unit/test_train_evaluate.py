"""``train`` on a finished run of which only the last evaluation is left: nothing is exported twice."""

import json
from types import SimpleNamespace

import pytest

pytest.importorskip("torch")
import pipedock  # noqa: E402
from pipeline_train import config  # noqa: E402
from verbs import exporting  # noqa: E402


@pytest.mark.parametrize("evaluate, proved, exports", [(True, True, 0), (True, False, 1), (False, True, 1)])
def test_an_export_that_is_proved_stays(tmp_path, monkeypatch, capfd, evaluate, proved, exports):
    """Trained to its end, it is written by the ranks; else from the checkpoint, if at all."""
    source, finishes, exported = tmp_path / "run.yaml", [], []
    source.write_text(json.dumps({
        "run": {"out": str(tmp_path / "out")}, "model": {"path": "m", "dtype": "fp32"}, "data": {"train": "t", "eval": "e"},
        "parallel": {"pipe": 1}, "export": {"dir": str(tmp_path / "export")},
    }))  # fmt: skip
    prepared = SimpleNamespace(config=config.load(source), out=tmp_path / "out", gpus=0, total=4, resume=tmp_path / "out",
                               done=4 if evaluate else 0, dims=None, evaluate=evaluate)  # fmt: skip
    (prepared.out / "resolved").mkdir(parents=True)

    def launch(prepared, show, team, addresses, finish):
        finishes.append(finish)
        return {"steps": 4, "loss_first": None, "loss_last": None, "tokens": 0, "seconds": 1.0, "peak_gib": [], "checkpoint": "c"}

    monkeypatch.setattr("pipeline_train.prepare.prepare", lambda *how: prepared)
    monkeypatch.setattr("pipeline_train.launch.launch", launch)
    monkeypatch.setattr("pipeline_train.selftest_run.once", lambda *how: None)
    monkeypatch.setattr("export.verify.proved", lambda *how: proved)
    monkeypatch.setattr("export.verify.verify", lambda *how, **more: None)
    monkeypatch.setattr("export.to_hf.to_hf", lambda *how, **more: exported.append(how) or {"notes": []})
    monkeypatch.setattr(exporting, "check_model", lambda *how: None)
    assert pipedock.main(["train", "--config", str(source), "--resume", "auto", "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["export"] == str(tmp_path / "export")
    assert finishes == [None if evaluate else "export.from_ranks:write"] and len(exported) == exports
