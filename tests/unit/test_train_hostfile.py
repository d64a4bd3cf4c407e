"""Hostfiles: what is read, and every refusal."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline_train import hostfile
from pipeline_train.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


def test_comments_and_blank_lines_are_skipped(tmp_path):
    path = tmp_path / "hosts"
    path.write_text("# two boxes\n\nnode1 slots=8\n10.0.0.2   slots = 4  # the old one\n")
    assert hostfile.read(path) == [("node1", 8, "%s:3" % path), ("10.0.0.2", 4, "%s:4" % path)]


@pytest.mark.parametrize("text, message", [
    ("node1", 'hosts:1: expected "name slots=N", such as "node1 slots=8"; found \'node1\''),
    ("a slots=1\nnode1 slots=x", "hosts:2: expected"),
    ("node1 slots=0", "hosts:1: expected"),
    ("-oProxyCommand=x slots=1", "hosts:1: expected"),
    ("node1 slots=2 node2 slots=2", "hosts:1: expected"),
    ("a slots=1\na slots=2", "hosts:2: a is named twice"),
    ("# nothing\n", "hosts: names no machine; write lines such as"),
])  # fmt: skip
def test_what_cannot_be_read_is_named_with_its_line(tmp_path, text, message):
    (tmp_path / "hosts").write_text(text)
    with pytest.raises(UserError) as error:
        hostfile.read(tmp_path / "hosts")
    assert message in str(error.value)


def test_a_missing_hostfile(tmp_path):
    with pytest.raises(UserError, match="hosts: cannot be read: No such file"):
        hostfile.read(tmp_path / "hosts")


@pytest.mark.parametrize("slots, world, gpus, message", [
    (8, 4, 4, "h:1: box has slots=8, but 4 GPUs. Lower the slots."),
    (2, 4, 8, "h:1: 2 slots, but parallel: pipe x data needs 4 processes. Raise the slots or lower the run."),
    (2, 3, 0, "h:1: 2 slots, but parallel"),
])  # fmt: skip
def test_slots_must_fit_the_machine_and_the_run(slots, world, gpus, message):
    with pytest.raises(UserError) as error:
        hostfile.check(hostfile.Host("box", slots, "h:1"), world, gpus)
    assert str(error.value).startswith(message)


def test_slots_that_fit():
    hostfile.check(hostfile.Host("box", 4, "h:1"), 4, 8)
    hostfile.check(hostfile.Host("box", 4, "h:1"), 2, 0)


def test_train_checks_the_hostfile_before_anything_else(tmp_path):
    """As a user types it: one line, exit 2."""
    (tmp_path / "hosts").write_text("box slots=1\n")
    run = {"run": {"out": str(tmp_path / "out")}, "model": {"path": "m"}, "data": {"train": "t"}, "parallel": {"pipe": 2}}
    (tmp_path / "run.yaml").write_text(json.dumps(run))
    code = "import sys; sys.path.insert(0, %r); import pipedock; sys.exit(pipedock.main())" % str(ROOT)
    command = [sys.executable, "-c", code, "train", "--config", str(tmp_path / "run.yaml"), "--hostfile", str(tmp_path / "hosts")]
    done = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ, DS_ACCELERATOR="cpu"))
    assert done.returncode == 2 and not (tmp_path / "out").exists()
    line = "pipedock train: %s:1: 1 slots, but parallel: pipe x data needs 2 processes. Raise the slots or lower the run."
    assert done.stderr.splitlines()[-1] == line % (tmp_path / "hosts")
