"""A page of memory that a launcher shares with its ranks: signs of life one way, wishes the other. Standard library only.

    header            stop, saves                   int64 each: "save and stop" (0 or 1), how often a save has been wished
    one row per rank  beats, ticks, steps, doing    int64 x 3 and 40 bytes of text
                      error                         400 bytes of text: why it failed, also where no file can be written

``beats`` come from a thread of their own: a process that is frozen has none. ``ticks`` come from the thread that trains, with
what it is ``doing``: one that waits for ever has none. Rows are written by their rank only; a torn text does no harm.
"""

import mmap
import os
import struct
import tempfile
import threading
from typing import NamedTuple, Tuple

HEADER = struct.Struct("qq")
ROW = struct.Struct("qqq40s400s")
ERROR = ROW.size - 400  # where it begins
INT = struct.Struct("q")
BEAT_S = 0.5
SHARED = "PIPEDOCK_PULSE"  # file descriptor of the page
FAILED = "failed"  # what a rank is doing that has left its error and waits for the launcher to end everything


class Sign(NamedTuple):
    """What a rank has shown of itself; see the module."""

    beats: int
    ticks: int
    steps: int
    doing: str
    error: str = ""


class Board:
    """The page, for the launcher."""

    def __init__(self, fd: int, world: int) -> None:
        self.fd, self.world = fd, world
        self.page = mmap.mmap(fd, HEADER.size + world * ROW.size)

    @classmethod
    def make(cls, world: int) -> "Board":
        """A new one, all zero. Its ``fd`` is for the ranks; ``close`` it."""
        fd, name = tempfile.mkstemp(prefix="pipedock-")
        os.unlink(name)
        os.ftruncate(fd, HEADER.size + world * ROW.size)
        return cls(fd, world)

    def close(self) -> None:
        self.page.close()
        os.close(self.fd)

    def wishes(self) -> Tuple[int, int]:
        """(stop, saves)."""
        return HEADER.unpack_from(self.page, 0)

    def wish_stop(self) -> None:
        INT.pack_into(self.page, 0, 1)

    def wish_save(self) -> None:
        INT.pack_into(self.page, INT.size, self.wishes()[1] + 1)

    def sign(self, rank: int) -> Sign:
        beats, ticks, steps, *texts = ROW.unpack_from(self.page, HEADER.size + rank * ROW.size)
        doing, error = (text.rstrip(b"\0").decode("utf-8", "replace") for text in texts)
        return Sign(beats, ticks, steps, doing, error)

    def put(self, rank: int, sign: Sign) -> None:
        """What a rank of another machine has shown there."""
        texts = (text.encode("utf-8", "replace") for text in (sign.doing, sign.error))
        ROW.pack_into(self.page, HEADER.size + rank * ROW.size, sign.beats, sign.ticks, sign.steps, *texts)


class Pulse:
    """The page, for one rank."""

    def __init__(self, board: Board, rank: int) -> None:
        self.board, self.place = board, HEADER.size + rank * ROW.size
        self.ticks = self.steps = self.beats = 0

    @classmethod
    def inherited(cls) -> "Pulse":
        """The launcher's, or one that nobody reads when there is no launcher."""
        rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        board = Board(int(os.environ[SHARED]), world) if SHARED in os.environ else Board.make(world)
        return cls(board, rank)

    def tick(self, doing: str) -> None:
        """The training thread goes on, with this."""
        self.ticks += 1
        struct.pack_into("qq40s", self.board.page, self.place + INT.size, self.ticks, self.steps, doing.encode()[:40])

    def still(self) -> None:
        """Another thread has got on with what the training thread waits for, or has left to it."""
        self.ticks += 1
        INT.pack_into(self.board.page, self.place + INT.size, self.ticks)

    def fail(self, error: str) -> None:
        """This rank has failed and waits for the launcher to end everything."""
        struct.pack_into("400s", self.board.page, self.place + ERROR, error.encode("utf-8", "replace")[:400])
        self.tick(FAILED)

    def step_done(self, number: int) -> None:
        self.steps = number
        self.tick("step %d done" % number)

    def start_beating(self) -> None:
        def beat() -> None:
            while True:
                self.beats += 1
                INT.pack_into(self.board.page, self.place, self.beats)
                pause.wait(BEAT_S)

        pause = threading.Event()
        threading.Thread(target=beat, name="pulse", daemon=True).start()

    def wishes(self) -> Tuple[int, int]:
        """(stop, saves) as this rank sees them now."""
        return self.board.wishes()
