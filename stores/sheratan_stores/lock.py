"""The lock of an embedded store: one process at a time, named in the file, gone when the process is.

The lock is a `flock` on a file held open for life, never the mere existence of a file: nothing is left to
clean up after `kill -9`. The file's JSON says who holds it, for people and for the refusal's text.
"""

from __future__ import annotations

import fcntl
import os
import socket
from pathlib import Path

import msgspec

from sheratan_hub.clock import Clock, rfc3339
from sheratan_hub.storage import StoreRefused


class Holder(msgspec.Struct):
    """Who holds a lock: process id, host name, and since when (RFC 3339)."""

    pid: int
    host: str
    started: str


class FileLock:
    """Holds `path` for this process from `take` to `release`."""

    def __init__(self, path: Path, clock: Clock) -> None:
        self._path = path
        self._clock = clock
        self._file: int | None = None

    def take(self) -> None:
        """Take the lock without waiting. Raises `StoreRefused` naming the holder."""
        try:
            self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            HELD.add(self._file)
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._write(self._file)
        except BlockingIOError:
            self.release()
            raise StoreRefused(f"{self._path} is held by {describe(self._path)}") from None
        except OSError as error:
            self.release()
            raise StoreRefused(f"{self._path} cannot be locked: {error.strerror}") from error

    def release(self) -> None:
        """Let go. Safe to call when the lock is not held."""
        if self._file is not None:
            HELD.discard(self._file)
            os.close(self._file)
            self._file = None

    def _write(self, file: int) -> None:
        holder = Holder(os.getpid(), socket.gethostname(), rfc3339(self._clock.now()))
        text = msgspec.json.encode(holder) + b"\n"
        # Over the old text, and cut only then: on a full disk that needs no room.
        os.pwrite(file, text, 0)
        os.ftruncate(file, len(text))


def holder_of(path: Path) -> Holder | None:
    """Who wrote the lock file at `path` last; None if it does not say. That process may have died since."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=Holder)
    except (OSError, ValueError):
        return None


def describe(path: Path) -> str:
    """The holder of a lock file in words."""
    holder = holder_of(path)
    if holder is None:
        return "another process"
    return f"process {holder.pid} on {holder.host} since {holder.started}"


def held_by(path: Path) -> str:
    """Who holds the lock at `path` now, in words; "" if nobody does. Looks for a moment, and changes nothing."""
    try:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return ""
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return describe(path)
    except OSError:
        return ""
    finally:
        os.close(file)
    return ""


HELD: set[int] = set()
"""The lock files this process has open."""


def _let_go_in_child() -> None:
    for file in HELD:
        os.close(file)
    HELD.clear()


# A forked child shares its parent's lock: without this, a worker that outlives a killed hub would keep it.
os.register_at_fork(after_in_child=_let_go_in_child)
