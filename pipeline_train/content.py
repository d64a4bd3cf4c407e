"""What files hold, as sha256: read by several threads, remembered while path, size and time of change stay. Standard library only.

Kept in $XDG_CACHE_HOME/pipedock/hashes.json (~/.cache without that variable) as {path: [bytes, time of change in ns, sha256]}.
"""

import hashlib
import json
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional

from . import host
from .errors import UserError

Say = Callable[[str], None]  # takes a line for the user

PIECE = 8 << 20  # bytes read at once, outside of Python's lock
MOST_THREADS = 8
MOST_KEPT = 20000  # files remembered
YOUNG_S = 2.0  # a file that changed so short ago may change again within the same tick of the file system's clock
SAY_S = 10.0  # between two lines of progress


def hashes(paths: List[Path], say: Say) -> Dict[Path, str]:
    """The sha256 of each file's bytes. ``say`` tells how far a long reading is. Raises UserError for one that cannot be read."""
    known, found, rest = _remembered(), {}, []
    for path in paths:
        try:
            status = path.stat()
        except OSError as error:
            raise _unreadable(path, error) from None
        row = known.get(str(path.resolve()))
        if isinstance(row, list) and row[:2] == [status.st_size, status.st_mtime_ns] and len(row) == 3:
            found[path] = str(row[2])
        else:
            rest.append(path)
    if rest:
        fresh = _read_all(rest, say)
        found.update({path: row[2] for path, row in fresh.items()})
        _remember({str(path.resolve()): row for path, row in fresh.items() if time.time() - row[1] / 1e9 > YOUNG_S})
    return found


def _read_all(paths: List[Path], say: Say) -> Dict[Path, List[Any]]:
    progress = _Progress(sum(path.stat().st_size for path in paths), say)
    with ThreadPoolExecutor(min(MOST_THREADS, os.cpu_count() or 1, len(paths))) as pool:
        return dict(zip(paths, pool.map(lambda path: _read(path, progress), paths)))


def _read(path: Path, progress: "_Progress") -> List[Any]:
    """[bytes, time of change, sha256]; the first two as they were before the reading, so that a change during it shows."""
    digest, buffer = hashlib.sha256(), memoryview(bytearray(PIECE))
    try:
        with open(str(path), "rb", buffering=0) as file:
            status = os.fstat(file.fileno())
            for size in iter(lambda: file.readinto(buffer), 0):
                digest.update(buffer[:size])
                progress.add(size)
    except OSError as error:
        raise _unreadable(path, error) from None
    return [status.st_size, status.st_mtime_ns, digest.hexdigest()]


class _Progress:
    def __init__(self, total: int, say: Say) -> None:
        self.total, self.say, self.done, self.lock = total, say, 0, threading.Lock()
        self.began = self.said = time.monotonic()

    def add(self, size: int) -> None:
        with self.lock:
            self.done += size
            now = time.monotonic()
            if now - self.said < SAY_S:
                return
            self.said = now
            rate = self.done / (now - self.began)
            self.say("hashing: %.1f of %.1f GB read, %.2f GB/s, %.0f s left; done once, then remembered"
                     % (self.done / 1e9, self.total / 1e9, rate / 1e9, (self.total - self.done) / rate))  # fmt: skip


def _unreadable(path: Path, error: OSError) -> UserError:
    return UserError("%s: cannot be read: %s" % (path, error.strerror or error))


def _file() -> Optional[Path]:
    folder = host.cache_folder()
    return None if folder is None else folder / "hashes.json"


def _remembered() -> Dict[str, Any]:
    """What cannot be read is not known; it is only read again."""
    path = _file()
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path is not None else {}
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _remember(rows: Dict[str, Any]) -> None:
    """Added to what another process may have written meanwhile; files that have gone are dropped when there are many."""
    path = _file()
    if path is None or not rows:
        return
    known = _remembered()
    known.update(rows)
    if len(known) > MOST_KEPT:
        known = {name: row for name, row in known.items() if os.path.exists(name)}
    aside = path.with_name("%s.%d" % (path.name, os.getpid()))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside.write_text(json.dumps(known), encoding="utf-8", errors="backslashreplace")
        os.replace(str(aside), str(path))
    except OSError:
        return  # a full or read-only home: the files are read again next time
