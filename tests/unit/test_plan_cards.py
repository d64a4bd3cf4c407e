"""The GPUs of this machine, as nvidia-smi tells of them."""

import subprocess

import pytest

from pipeline_train.plan import cards
from pipeline_train.plan.cards import Here, card_here, cards_here


def smi(monkeypatch, folder, script):
    """A nvidia-smi in PATH that does this when it is asked for those columns."""
    asked = "--query-gpu=index,uuid,name,memory.total,driver_version"
    (folder / "nvidia-smi").write_text('#!/bin/sh\ntest "$1" = %s || exit 2\n%s\n' % (asked, script))
    (folder / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(folder) + ":/bin:/usr/bin")


def test_the_cards_of_this_machine(monkeypatch, tmp_path):
    smi(monkeypatch, tmp_path, 'echo "0, GPU-a, Tesla T4, 15360, 515.65.01"; echo "1, GPU-b, Quadro X, [N/A], 515.65.01"')
    assert cards_here() == [Here("0", "GPU-a", "t4", "515.65.01"), Here("1", "GPU-b", None, "515.65.01")]
    assert card_here() == "t4"


@pytest.mark.parametrize("script", ["echo 'NVIDIA-SMI has failed, sorry'; exit 9", "echo 'No devices were found'", "exit 0"])
def test_a_driver_that_does_not_answer(monkeypatch, tmp_path, script):
    smi(monkeypatch, tmp_path, script)
    assert cards_here() == [] and card_here() is None


def test_no_driver_and_one_that_hangs(monkeypatch, tmp_path):
    smi(monkeypatch, tmp_path, "exit 0")

    def hangs(*args, **more):
        raise subprocess.TimeoutExpired("nvidia-smi", more["timeout"])

    monkeypatch.setattr(cards.subprocess, "run", hangs)
    assert cards_here() == []
    monkeypatch.setenv("PATH", "/nonexistent")
    assert cards_here() == []
