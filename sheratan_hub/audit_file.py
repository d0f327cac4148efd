"""Appends to the audit log: seals lines into the chain, rotates by size, goes on after a crash and after a full disk.

Lines that cannot be written wait in memory, and go first once it works again: the chain has no hole.
"""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from sheratan_hub.audit_lines import (
    NO_LINES,
    Head,
    chain_files,
    cut_detail,
    first_seq,
    head_of,
    is_cut,
    rotated_name,
    sealed,
)
from sheratan_hub.audit_verify import last_head

log = logging.getLogger("sheratan.audit")

OWED_MAX = 10_000
"""So many lines wait in memory while the file cannot be written; of the rest only the number is kept."""

FREE_BYTES = 1 << 20
"""With less room than this on its disk the log counts as not writable: what one batch tells of must fit."""


class AuditFile:
    """One writer's end of the log. Raises `OSError` when it cannot be opened; later only `trouble` tells.

    A file above `max_bytes` (0: never) is rotated; `keep_files` (0: all) rotated ones are kept.
    """

    def __init__(self, path: Path, *, max_bytes: int = 0, keep_files: int = 0) -> None:
        self.path, self._max_bytes, self._keep = path, max_bytes, keep_files
        self.trouble: str | None = None
        """Why the last try to write failed, None if it did not."""
        self.foreign = 0
        """How often somebody else was seen to have changed or exchanged the file."""
        self.failures = self.lost = 0
        """Tries to write that failed, and lines that found no room in memory, since it was opened."""
        self.head = NO_LINES
        self._owed: list[dict[str, Any]] = []
        self._dropped = 0
        self._failing = False
        self._retired: list[int] = []
        self._file = -1
        self._open()
        self.head = self._found or self._end_of_rotated()

    def _open(self) -> None:
        """Open the file as it is: where it ends, what a crash has left behind its last whole line."""
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        opened = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)
        if self._file >= 0:
            os.close(self._file)
        self._file = opened
        self._regular = stat.S_ISREG(os.fstat(opened).st_mode)
        self._found, self._rest, self._gap = _end_of(self.path) if self._regular else (None, b"", b"")
        self._first = first_seq(self.path) if self._regular else None
        self._left = self._stamp()

    def _end_of_rotated(self) -> Head:
        """Where the chain ends if the file itself is new: a crash may have come between two files."""
        files = [file for file in chain_files(self.path) if file != self.path]
        return next((head for file in reversed(files) if (head := last_head(file)) is not None), NO_LINES)

    def adopt(self, max_bytes: int, keep_files: int) -> None:
        """Rotate at another size, keep another number of files, from now on."""
        self._max_bytes, self._keep = max_bytes, keep_files
        self.look()

    def add(self, record: Mapping[str, Any]) -> None:
        """Take a line (without `seq`, `prev_hash` and `hash`) to be written by the next `write`."""
        if len(self._owed) >= OWED_MAX:
            self._dropped += 1
            self.lost += 1
            return
        self._owed.append(dict(record))

    def write(self) -> None:
        """Write what was taken, all of it or nothing. What cannot be written now stays, and `trouble` says why."""
        if not self._owed or self._file < 0:
            return
        try:
            if self._failing or self._stamp() != self._left:
                self._again()
            self._append()
        except OSError as error:
            self._failed(error)
            return
        self._recovered()
        self._owed.clear()
        self._dropped = 0

    def _recovered(self) -> None:
        if self._failing:
            log.warning("the audit log %s can be written again", self.path)
        self._failing, self.trouble = False, None

    def _append(self) -> None:
        data, head = self._sealed()
        if self._max_bytes and self._first and self._left[1] + len(data) > self._max_bytes and not self._gap:
            self._rotate()
        if os.write(self._file, data) != len(data):
            with suppress(OSError):
                os.ftruncate(self._file, self._left[1])
            raise OSError(f"only a part of what was to be written to {self.path} found room")
        self._first = self._first or self.head.seq + 1
        self.head, self._rest, self._gap, self._left = head, b"", b"", self._stamp()

    def _sealed(self) -> tuple[bytes, Head]:
        """The lines to write, sealed, and the head after them. The first accounts for what a crash has cut."""
        lines, head = [], self.head
        for place, record in enumerate(self._owed):
            if place == 0 and (self._rest or self._dropped):
                record = {**record, "detail": {**self._accounts(), **record["detail"]}}
            line, digest = sealed({"seq": head.seq + 1, **record}, head.hash)
            head = Head(head.seq + 1, digest, record.get("ts"))
            lines.append(line)
        return self._gap + b"".join(lines), head

    def _accounts(self) -> dict[str, Any]:
        """What is told of a crash's leavings, unless they are none: then verifying names them as broken."""
        rest = self._rest.removesuffix(b"\n")
        cut = rest and all(is_cut(piece, self.head.seq + 1) for piece in rest.split(b"\n"))
        told = {"cut": cut_detail(rest)} if cut else {}
        return {**told, **({"lost": self._dropped} if self._dropped else {})}

    def _again(self) -> None:
        """Open the file anew: it failed, or somebody has changed it or moved it away. The chain goes on from memory."""
        self.foreign += 1
        self._open()
        if self._found != self.head:
            self._rest = b""  # no leavings of ours

    def _failed(self, error: OSError) -> None:
        if not self._failing:
            log.warning("the audit log %s cannot be written: %s", self.path, error)
        self.failures += 1
        self._failing, self.trouble = True, error.strerror or str(error)

    def _rotate(self) -> None:
        """Move the full file aside and begin a new one. If that fails the full one grows on."""
        target = rotated_name(self.path, self._first or 1)
        try:
            if target.exists():
                raise FileExistsError(f"{target} is there already")
            os.rename(self.path, target)
            try:
                opened = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_EXCL, 0o600)
            except OSError:
                os.rename(target, self.path)
                raise
        except OSError as error:
            log.warning("the audit log %s cannot be rotated: %s", self.path, error)
            return
        self._retired.append(self._file)
        self._file, self._first = opened, None
        self._left = self._stamp()

    def check(self) -> str | None:
        """Why nothing could be written now, None if it can be: looks at the file and its disk, writes what waits."""
        self.write()
        if self._failing and self._owed:
            return self.trouble
        try:
            if self._failing or self._is_gone():
                self._again()
            disk = os.fstatvfs(self._file)
        except OSError as error:
            self._failed(error)
            return self.trouble
        self._recovered()
        free = disk.f_bavail if os.geteuid() else disk.f_bfree
        if disk.f_flag & os.ST_RDONLY:
            self.trouble = "its disk is read-only"
        elif disk.f_blocks and free * disk.f_frsize < FREE_BYTES:
            self.trouble = "its disk is full"
        else:
            self.trouble = None
        return self.trouble

    def look(self) -> None:
        """Notice whether somebody else has changed the file."""
        try:
            if self._file >= 0 and (self._is_gone() or self._stamp() != self._left):
                self._again()
        except OSError as error:
            self._failed(error)

    def _is_gone(self) -> bool:
        """Whether the file was moved away or another put in its place."""
        try:
            return os.stat(self.path).st_ino != self._left[0]
        except FileNotFoundError:
            return True

    def _stamp(self) -> tuple[int, int, int]:
        """What changes when somebody else writes: inode, size, time of the last change."""
        found = os.fstat(self._file)
        return (found.st_ino, found.st_size if self._regular else 0, found.st_ctime_ns if self._regular else 0)

    @property
    def left(self) -> tuple[int, int, int]:
        """The file's inode, size and time of change as this writer has left it."""
        return self._left

    @property
    def waiting(self) -> int:
        """How many lines wait in memory to be written."""
        return len(self._owed)

    @property
    def untidy(self) -> bool:
        """Whether a file was rotated since the last `tidy`."""
        return bool(self._retired)

    def tidy(self) -> None:
        """Sync files that were rotated and remove those not kept. May take long; may run in a thread."""
        with suppress(IndexError):
            while True:
                retired = self._retired.pop(0)
                with suppress(OSError):
                    os.fsync(retired)
                os.close(retired)
        if self._keep:
            for file in chain_files(self.path)[: -1 - self._keep]:
                with suppress(OSError):
                    file.unlink()

    def close(self) -> None:
        """Write what waits, sync, close. Safe to call twice."""
        if self._file < 0:
            return
        self.write()
        if self._owed:
            log.error("%d lines of the audit log %s were never written", len(self._owed) + self._dropped, self.path)
        self.tidy()
        with suppress(OSError):
            os.fsync(self._file)
        os.close(self._file)
        self._file = -1


def _end_of(path: Path) -> tuple[Head | None, bytes, bytes]:
    """The last whole line's head, what stands behind that line, and the newline that is missing at the end, if any."""
    end, size = path.stat().st_size, 65_536
    with path.open("rb") as file:
        while True:
            file.seek(max(0, end - size))
            text = file.read(end)
            head, after = _last_whole(text)
            if head is not None or size >= end:
                return head, text[after:], b"" if text.endswith(b"\n") or not text else b"\n"
            size *= 8


def _last_whole(text: bytes) -> tuple[Head | None, int]:
    """The head of the last whole line in the text, and where that line ends."""
    stop = len(text)
    while stop > 0:
        begin = text.rfind(b"\n", 0, stop - 1) + 1
        head = head_of(text[begin:stop])
        if head is not None:
            return head, stop
        stop = begin
    return None, 0
