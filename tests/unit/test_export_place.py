"""Where an export may go, judged before anything is computed."""

import os
import shutil
from collections import namedtuple

import pytest

from export import aside
from pipeline_train.errors import UserError


def refused(output, **options):
    with pytest.raises(UserError) as caught:
        aside.check_free(str(output), **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_place_that_takes_no_files(tmp_path, monkeypatch):
    aside.check_free(str(tmp_path / "deep" / "out"))
    asked = []
    monkeypatch.setattr(aside.os, "access", lambda path, mode: asked.append((path, mode)))
    message = "out: cannot be made: no permission to write in %s" % tmp_path
    assert message in refused(tmp_path / "deep" / "out") and message in refused(tmp_path / "out")
    assert asked == [(str(tmp_path), os.W_OK | os.X_OK)] * 2 and os.listdir(str(tmp_path)) == []


def test_an_output_folder_that_cannot_be_listed(tmp_path, monkeypatch):
    def iterdir(self):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(aside.Path, "iterdir", iterdir)
    assert refused(tmp_path) == "%s: cannot be read: Permission denied" % tmp_path


def test_an_output_apart_from_the_inputs(tmp_path):
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    aside.write_marker(run, {})  # even where --overwrite would replace it
    (tmp_path / "link").symlink_to(run)
    others = {"overwrite": True, "apart_from": [str(tmp_path / "data.jsonl"), str(run)]}
    for output in (run, tmp_path / "link", run / "checkpoints" / ".."):
        assert refused(output, **others) == "%s: is %s itself; name a folder of its own for the export" % (output, run)
    for output in (run / "export", tmp_path / "link" / "export"):
        assert refused(output, **others) == "%s: lies inside %s; name a folder of its own for the export" % (output, run)
    assert "%s: holds %s; name" % (tmp_path, tmp_path / "data.jsonl") in refused(tmp_path, **others)
    aside.check_free(str(tmp_path / "run-export"), **others)
    aside.check_free(str(tmp_path / "export"), apart_from=["some/hub-name"])


def test_a_full_disk_is_told_in_the_unit_that_shows_it(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: namedtuple("usage", "free")(3 * 2**19))
    with pytest.raises(UserError, match="needs 5.00 MiB, only 1.50 MiB are free there"):
        with aside.output_folder(str(tmp_path / "out"), 5 * 2**20):
            raise AssertionError("must not get here")
    assert os.listdir(str(tmp_path)) == []
