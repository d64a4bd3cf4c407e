"""A program in a pseudo terminal, and the screen it leaves: a terminal emulator (pyte) is fed everything that it writes."""

import os
import pty
import select
import signal
import struct
import subprocess
import termios
import time
from fcntl import ioctl

DECIDE = ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "LINES", "TTY_COMPATIBLE", "TTY_INTERACTIVE")  # rich asks them


class Ended:
    """``code``; ``written``: the bytes; ``screen``: the lines at the end; ``cursor``: whether it is shown."""

    def __init__(self, code, written, columns, rows):
        import pyte

        screen = pyte.Screen(columns, rows)
        pyte.ByteStream(screen).feed(written)
        self.code, self.written = code, written
        self.screen = [line.rstrip() for line in screen.display if line.strip()]
        self.cursor = not screen.cursor.hidden


SIGNALS = (b"\x03", b"\x04")


def run(command, columns=100, rows=30, interrupt_at=None, typed=(), timeout=60, **env):
    """Run it to its end; Ctrl-C is typed when ``interrupt_at`` (bytes) has been written. ``typed``: pairs of bytes, the second is
    typed when the first has been written behind the one before."""
    ours, theirs = pty.openpty()
    ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    settings = dict({k: v for k, v in os.environ.items() if k not in DECIDE}, TERM="xterm-256color", **env)
    process = subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=theirs, env=settings, start_new_session=True,
        preexec_fn=lambda: ioctl(0, termios.TIOCSCTTY, 0),
    )  # fmt: skip
    os.close(theirs)
    written, deadline = b"", time.monotonic() + timeout
    todo, seen = ([(interrupt_at, b"\x03")] if interrupt_at is not None else []) + list(typed), 0
    try:
        while True:
            assert time.monotonic() < deadline, "it goes on; not yet typed: %r; written: %r" % (todo, written)
            if not select.select([ours], [], [], 0.1)[0]:
                continue
            try:
                data = os.read(ours, 65536)
            except OSError:  # Linux: the other end is closed
                break
            written += data
            while todo and todo[0][0] in written[seen:]:
                marker, keys = todo.pop(0)
                seen = written.index(marker, seen) + len(marker)
                if keys in SIGNALS and typed:
                    time.sleep(0.5)  # a person's: Python's readline sees a signal only while it waits for a key
                os.write(ours, keys)
        return Ended(process.wait(max(1.0, deadline - time.monotonic())), written, columns, rows)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        os.close(ours)
