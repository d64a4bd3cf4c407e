"""The page that launcher and ranks share, and the decisions made from it, with a clock that the tests turn."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline_train import watch
from pipeline_train.pulse import SHARED, Board, Pulse, Sign
from pipeline_train.watch import Watch

ROOT = Path(__file__).resolve().parents[2]


class Scene:
    """Two ranks whose signs the test moves; ``after`` lets time pass, one look a second."""

    def __init__(self, hang_s=40):
        self.time = 0.0
        self.watch = Watch(hang_s, lambda: self.time)
        self.beats, self.ticks, self.steps, self.doing = [1, 1], [1, 1], [5, 5], ["forward pass", "waiting for gradients"]

    def after(self, seconds, beating=(0, 1), ticking=(), look_s=1.0):
        """-> (the first trouble, after how many seconds), or None."""
        begin = self.time
        while self.time < begin + seconds:
            self.time += look_s
            for rank in beating:
                self.beats[rank] += 1
            for rank in ticking:
                self.ticks[rank] += 1
            found = self.watch.look([Sign(*row) for row in zip(self.beats, self.ticks, self.steps, self.doing)])
            if found is not None:
                return found, self.time - begin
        return None


def test_ranks_that_get_on_are_left_alone():
    assert Scene().after(10_000, ticking=(0,)) is None  # rank 1 waits for rank 0 all the time


def test_a_frozen_rank_is_named_though_the_other_one_lives():
    scene = Scene()
    assert scene.after(100, ticking=(0, 1)) is None
    message, seconds = scene.after(100, beating=(0,), ticking=(0,))
    assert message == (
        "rank 1 has stopped answering: no sign of life for 41 s. Last seen: rank 0, after step 5: forward pass; rank 1, after "
        "step 5: waiting for gradients"
    )
    assert 40 < seconds <= 42


def test_ranks_that_all_wait_are_stuck():
    scene = Scene()
    assert scene.after(100, ticking=(0, 1)) is None
    message, seconds = scene.after(100)
    assert message.startswith("no rank has got on for 41 s. Last seen: rank 0, after step 5: forward pass; rank 1, after")
    assert 40 < seconds <= 42


def test_a_slow_machine_is_given_as_long_as_it_has_shown_to_need():
    scene = Scene()
    for _ in range(4):
        assert scene.after(1, ticking=(0,)) is None
        assert scene.after(30) is None  # one micro-batch
    found = scene.after(1000)
    assert found is not None and 5 * 30 < found[1] + 30 <= 5 * 32


@pytest.mark.parametrize("doing", watch.PATIENT)
def test_what_may_take_long_may_take_long(doing):
    scene = Scene()
    scene.after(10, ticking=(0, 1))
    scene.doing[1] = doing
    assert scene.after(watch.PATIENCE_S - 20) is None
    assert scene.after(40)[0].startswith("no rank has got on for 601 s")
    scene = Scene()
    scene.doing[1] = doing
    assert scene.after(100, beating=(0,))[1] <= 43  # a heart beats meanwhile all the same


def test_the_first_step_may_take_long_and_a_start_without_a_sign_ends():
    scene = Scene()
    scene.steps = [0, 0]
    assert scene.after(watch.PATIENCE_S - 1) is None
    scene = Scene()
    scene.beats, scene.ticks, scene.steps, scene.doing = [0, 0], [0, 0], [0, 0], ["", ""]
    message = scene.after(1000, beating=())[0]
    assert message.startswith("rank 0 has stopped answering: no sign of life for 46 s.") and message.endswith("not started")


def test_a_launcher_that_was_not_running_has_seen_nothing():
    """Ctrl-Z and fg: the clock has jumped for everybody."""
    scene = Scene()
    scene.after(10, ticking=(0, 1))
    scene.time += 3600
    assert scene.after(39, beating=()) is None


def test_the_board_carries_signs_one_way_and_wishes_the_other():
    board = Board.make(3)
    code = "import time; from pipeline_train.pulse import Pulse; p = Pulse.inherited(); p.start_beating(); p.tick('starting')\n"
    code += "while not p.wishes()[0]: time.sleep(0.01)\np.step_done(p.wishes()[1] + 40)"
    env = dict(os.environ, RANK="1", WORLD_SIZE="3", PYTHONPATH=str(ROOT))
    env[SHARED] = str(board.fd)
    rank = subprocess.Popen([sys.executable, "-c", code], env=env, pass_fds=[board.fd])
    try:
        deadline = time.monotonic() + 20
        while board.sign(1).beats < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert board.sign(1)[1:] == (1, 0, "starting", "") and board.sign(0) == board.sign(2) == (0, 0, 0, "", "")
        board.wish_save()
        board.wish_save()
        board.wish_stop()
        assert board.wishes() == (1, 2)
        assert rank.wait(timeout=20) == 0
        assert board.sign(1)[1:] == (2, 42, "step 42 done", "")
    finally:
        rank.kill()
    board.close()


def test_a_long_or_foreign_text_fits_its_place():
    pulse = Pulse(Board.make(2), 0)
    pulse.fail("e" * 1000)
    assert pulse.board.sign(0)[1:] == (1, 0, "failed", "e" * 400) and pulse.board.sign(1) == (0, 0, 0, "", "")
    pulse.tick("é" * 60)
    assert pulse.board.sign(0).doing == "é" * 20 and pulse.board.sign(1).doing == ""
