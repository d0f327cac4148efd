"""alerts.jsonl: one alert a line, written by one watcher at a time; its lock is what keeps a second one away."""

from __future__ import annotations

import fcntl
import os
from contextlib import suppress
from pathlib import Path

from sheratan_hub.audit_lines import parsed
from sheratan_hub.audit_read import whole_bytes
from sheratan_hub.log import shift


class AlertsFile:
    """The file at `path`, from `open` to `close`; opened anew when it was moved away.

    An alert that would take it above `max_bytes` (0: never) begins a new one; `keep_files` earlier ones are kept.
    """

    def __init__(self, path: Path, max_bytes: int = 0, keep_files: int = 1) -> None:
        self._path = path
        self.max_bytes, self.keep_files = max_bytes, keep_files
        self._file = -1

    def open(self) -> None:
        """Take the lock; what a kill has cut is taken away. Raises `BlockingIOError` if another process has it."""
        self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._file = self._locked()
        os.fchmod(self._file, 0o600)
        os.ftruncate(self._file, whole_bytes(self._path))

    def _locked(self) -> int:
        opened = os.open(self._path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(opened)
            raise
        return opened

    @property
    def is_open(self) -> bool:
        """Whether it holds the lock."""
        return self._file >= 0

    @property
    def size(self) -> int:
        """The bytes that are in it."""
        return os.fstat(self._file).st_size

    @property
    def inode(self) -> int:
        """Which file it is."""
        return os.fstat(self._file).st_ino

    def since(self, offset: int, inode: int = 0) -> dict[str, int]:
        """The ids of the alerts from there on, each with the number of the line that made it.

        `inode` is the file in which that place was, 0 if that is not known; a new one may have been begun since.
        """
        same = inode in (0, self.inode) and offset <= self.size
        begin = offset if same else 0
        lines = [] if same else self._before(offset)
        lines += os.pread(self._file, self.size - begin, begin).split(b"\n")
        found = [record for line in lines if (record := parsed(line)) is not None]
        return {str(record.get("id")): int(record.get("to_seq") or 0) for record in found}

    def _before(self, offset: int) -> list[bytes]:
        """What stands from there on in the file before this one, in case that place was in it."""
        with suppress(OSError), self._path.with_name(f"{self._path.name}.1").open("rb") as file:
            file.seek(offset)
            return file.read().split(b"\n")
        return []

    def append(self, line: bytes) -> None:
        """Write one line, whole or not at all. Raises `OSError`."""
        if self.max_bytes and self.size and self.size + len(line) > self.max_bytes and not self._is_gone():
            with suppress(OSError):  # then it grows on
                shift(self._path, self.keep_files)
        if self._is_gone():
            moved, self._file = self._file, self._locked()
            os.close(moved)
        before = self.size
        if os.write(self._file, line) != len(line):
            os.ftruncate(self._file, before)
            raise OSError(f"an alert found no room in {self._path}")

    def _is_gone(self) -> bool:
        with suppress(FileNotFoundError):
            return os.stat(self._path).st_ino != os.fstat(self._file).st_ino
        return True

    def close(self) -> None:
        """Let go of the lock. Safe to call twice."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
