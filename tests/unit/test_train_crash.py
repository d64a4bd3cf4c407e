"""The process that writes checkpoints is killed at random points of its work, with and without the machine's power: never an
unreadable newest checkpoint, never a lost complete one. PIPEDOCK_ALL_POINTS=1 takes every point (ci/resume.sh)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SEED = 20
NUMBER = 0 if os.environ.get("PIPEDOCK_ALL_POINTS") == "1" else 50


@pytest.mark.parametrize("power, behind, rotten", [(0, 1, 0), (1, 0, 1)] + ([(0, 0, 1), (1, 1, 0)] if NUMBER == 0 else []))
def test_killed_at_any_point_the_newest_checkpoint_is_whole_and_none_is_lost(tmp_path, power, behind, rotten):
    script = str(Path(__file__).with_name("crash_points.py"))
    command = [sys.executable, script, str(tmp_path), str(power), str(behind), str(rotten), str(NUMBER), str(SEED)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=dict(os.environ, OMP_NUM_THREADS="1"))
    assert done.returncode == 0, done.stderr[-2000:]
    answer = json.loads(done.stdout)
    assert answer["points"] > 100 and len(answer["found"]) == (NUMBER or answer["points"])
    ends = set()
    for point, found in answer["found"].items():
        where = "point %s of %d, seed %d: %s" % (point, answer["points"], SEED, found)
        assert "error" not in found, where
        complete = max([4 if rotten else 6] + found["reported"])  # 2, 4 and 6 were there
        assert found["found"] >= complete and found["values"] == [found["found"]], where
        assert set(found["rotten"]) <= {"step_000006"} and not (found["rotten"] and complete > 4), where
        assert found["latest"] and len(found["whole"]) >= 2 and found["found"] == max(found["whole"]), where
        assert not any(name.startswith((".tmp", ".old")) for name in found["kept"]), where
        ends.add(found["found"])
    assert ends == ({4, 6, 8} if rotten else {6, 8})  # it died before, between and after
