"""One TCP connection between two launchers: frames in both directions, with signs of life. Standard library only.

A frame is MAGIC, the lengths of what follows, a JSON object and bytes; nothing that comes in is ever executed. Kinds of frames:
hello, welcome, refused  of ``joining``          message, taken   what ``Channel.send`` sends, and that it was taken
beat                     I live                  post             the newest state; an older one is forgotten
end                      last words: {} when all is done, else {"line", "user"}
"""

import contextlib
import json
import socket
import struct
import threading
import time
from collections import deque
from typing import Any, Callable, Deque, Dict, List, Optional, Tuple

MAGIC = b"pdk1"
HEAD = struct.Struct(">4sIQ")  # MAGIC, bytes of JSON, bytes of payload
MOST = 1 << 26  # bytes of JSON, and of payload
BEAT_S = 1.0
SILENT_S = 20.0
WAKING_S = 5.0  # what is lost so soon after this process was suspended was lost by that
FAREWELL_S = 2.0  # for last words to arrive
WINDOW = 4  # messages on their way that the other end has not taken
CHUNK = 1 << 20
Document = Dict[str, Any]


def write_frame(sock: socket.socket, document: Document, payload: bytes = b"") -> None:
    """Raises OSError; ValueError for what is too large."""
    text = json.dumps(document).encode()
    if len(text) > MOST or len(payload) > MOST:
        raise ValueError("a frame of %d bytes is too large, send it in parts of at most %d" % (max(len(text), len(payload)), MOST))
    for data in (HEAD.pack(MAGIC, len(text), len(payload)) + text, payload):
        left = memoryview(data)
        while left:  # not sendall: its time limit is for everything together
            left = left[sock.send(left[:CHUNK]) :]


def read_frame(sock: socket.socket, hear: Callable[[], None] = lambda: None) -> Tuple[Document, bytes]:
    """``hear`` is called whenever bytes have come. Raises EOFError at the end, OSError, ValueError for what is no frame."""
    magic, length, more = HEAD.unpack(_read(sock, HEAD.size, hear))
    if magic != MAGIC or length > MOST or more > MOST:
        raise ValueError("what came is not pipedock's")
    try:
        document = json.loads(_read(sock, length, hear).decode("utf-8"))
    except RecursionError:
        document = None
    if not isinstance(document, dict):
        raise ValueError("what came is not pipedock's")
    return document, _read(sock, more, hear)


def _read(sock: socket.socket, length: int, hear: Callable[[], None]) -> bytes:
    data = bytearray()
    while len(data) < length:
        part = sock.recv(min(CHUNK, length - len(data)))
        if not part:
            raise EOFError
        data += part
        hear()
    return bytes(data)


def part(sock: socket.socket) -> None:
    """Close a connection whose last words have been written, once the other end has closed it too, or after FAREWELL_S: closing at
    once, with a beat of its unread, could take them back."""
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_WR)
        until = time.monotonic() + FAREWELL_S
        while time.monotonic() < until:
            sock.settimeout(FAREWELL_S)
            if not sock.recv(CHUNK):
                break
    sock.close()


def _clock() -> float:
    """Seconds, also of the time that the machine is suspended."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()


class Link:
    """The connection to ``node``, called ``name``; ``changed`` is shared by all links of a channel. ``start`` it once both ends
    know each other; ``on_over`` is then called, from the reading thread, when nothing comes any more."""

    def __init__(self, sock: socket.socket, node: int, name: str, changed: threading.Condition) -> None:
        sock.settimeout(SILENT_S)  # of one recv or send, so any byte that moves is a sign of life
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sock, self.node, self.name, self.changed = sock, node, name, changed
        self.writing, self.room = threading.Lock(), threading.Semaphore(WINDOW)
        self.messages: Deque[Tuple[Document, bytes]] = deque()
        self.posted: Optional[Document] = None
        self.welcome: Optional[Document] = None  # or the refusal
        self.ended: Optional[Document] = None  # the other end's last words
        self.lost: Optional[str] = None  # why nothing comes any more, if not for that
        self.over = False  # nothing comes any more, and ``on_over`` has been told
        self.began = self.heard = time.monotonic()
        self.awake, self.slept, self.slept_s = _clock(), 0.0, 0.0  # when this process last did something; its last long sleep
        self.on_over: Callable[[Link], None] = lambda link: None
        self.quiet = threading.Event()  # ends the beats
        self.threads: List[threading.Thread] = []

    def __str__(self) -> str:
        return "node %d (%s)" % (self.node, self.name)

    @property
    def answered(self) -> bool:
        """Has anything come since this end listens?"""
        return self.heard > self.began

    def start(self) -> None:
        for work in (self._follow, self._beat):
            thread = threading.Thread(target=work, daemon=True)
            thread.start()
            self.threads.append(thread)  # not before: another thread may say ``end`` now, which joins them

    def write(self, kind: str, document: Document, payload: bytes = b"") -> None:
        """Raises OSError."""
        with self.writing:
            write_frame(self.sock, dict(document, kind=kind), payload)

    def end(self, words: Document) -> None:
        """Say the last words and wait a moment until the other end has heard them: closing at once, with a beat of its unread,
        could take them back."""
        with contextlib.suppress(OSError):
            self.write("end", words)
            self._no_more()
        for thread in self.threads[:1]:
            thread.join(FAREWELL_S)
        self.close()

    def close(self) -> None:
        self.quiet.set()
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)  # wakes the reader
        self.sock.close()

    def _no_more(self) -> None:
        self.quiet.set()
        with self.writing:
            self.sock.shutdown(socket.SHUT_WR)

    def _beat(self) -> None:
        while not self.quiet.wait(BEAT_S):
            self._look_at_clock()
            with contextlib.suppress(OSError):  # the reader finds out and says so
                self.write("beat", {})

    def _look_at_clock(self) -> None:
        now = _clock()
        if now - self.awake > max(SILENT_S / 2, 5 * BEAT_S):
            self.slept, self.slept_s = now, now - self.awake
        self.awake = now

    def _follow(self) -> None:
        lost = None
        try:
            while self.ended is None:
                self._take(*read_frame(self.sock, self._hear))
            with contextlib.suppress(OSError):
                self._no_more()
        except socket.timeout:
            lost = "has not answered for %.0f s: it is suspended or overloaded, or the network to it is cut" % SILENT_S
        except (EOFError, ConnectionError):  # a reset: what this end has sent lay unread when it died
            lost = "is gone: its connection was closed, so its pipedock train or its machine has died"
        except (OSError, ValueError) as error:
            lost = "is gone: %s" % (getattr(error, "strerror", None) or error)
        except KeyError:
            lost = "is gone: what came is not pipedock's"
        self._look_at_clock()
        if lost is not None and self.slept_s and self.awake - self.slept < WAKING_S:
            lost = "has gone on without this machine, where pipedock was suspended for %.0f s" % self.slept_s
        self.quiet.set()
        self.lost = lost
        self.on_over(self)
        with self.changed:
            self.over = True
            self.changed.notify_all()

    def _hear(self) -> None:
        self.heard = time.monotonic()

    def _take(self, document: Document, payload: bytes) -> None:
        kind = document.pop("kind", None)
        with self.changed:
            if kind == "message":
                self.messages.append((document["document"], payload))
            elif kind == "post":
                self.posted = document
            elif kind == "taken":
                self.room.release()
            elif kind == "end":
                self.ended = document
            elif kind in ("welcome", "refused"):
                self.welcome = dict(document, kind=kind)
            self.changed.notify_all()
