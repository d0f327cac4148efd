"""Reads the audit log from outside, by inode and offset, and raises alerts. It only reads: the hub never notices.

Where it is, what it has counted and what is still to be posted stand in one small file that is replaced whole. Killed,
it reads some lines again, and leaves out the alerts that are in alerts.jsonl already.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec

from sheratan_hub.alerts import CHAIN, Alert, Judge, State
from sheratan_hub.alerts_file import AlertsFile
from sheratan_hub.audit_lines import (
    ALERTS_NAME,
    FILE_NAME,
    START_HASH,
    Identity,
    first_seq,
    head_of,
    identity,
    listed,
    parsed,
    seq_of,
)
from sheratan_hub.audit_verify import last_head
from sheratan_hub.clock import Clock, rfc3339
from sheratan_hub.config import AlertSettings

STATE_NAME = "watcher_state.json"
CHUNK_BYTES = 65_536
SAVE_MS = 1000
POSTS_MAX = 1000
KNOWN_BYTES = 1 << 20
"""Without its own state it looks through so much of alerts.jsonl for what it has raised before."""


class Post(msgspec.Struct):
    """An alert that is still to be posted: how often that was tried, when to try again (ms)."""

    alert: Alert
    tries: int = 0
    at: int = 0


class Saved(msgspec.Struct):
    """The state file."""

    inode: int = 0
    offset: int = 0
    first_seq: int | None = None
    seq: int = 0
    hash: str = START_HASH
    began: str = ""
    not_before: str = ""
    alerts_bytes: int = 0
    alerts_inode: int = 0
    counted: State = {}
    now: int = 0
    posts: list[Post] = []


class Watcher:
    """Follows the log in `folder`. `open`, then `step` again and again, then `close`. `say` is told each alert."""

    def __init__(
        self,
        folder: Path,
        settings: AlertSettings,
        clock: Clock,
        say: Callable[[str], None],
        *,
        posting: bool = False,
    ) -> None:
        self._path = folder / FILE_NAME
        self._alerts = AlertsFile(folder / ALERTS_NAME, settings.max_bytes, settings.keep_files)
        self._state_path = folder / STATE_NAME
        self._settings, self._clock, self._say, self._posting = settings, clock, say, posting
        self._file = -1
        self._at = Saved()
        self._judge = Judge({})
        self._known: dict[str, int] = {}
        self._unwritten: list[Alert] = []
        self._rewound = False
        self._unsaved = False
        self._saved_at = 0

    @property
    def posts(self) -> list[Post]:
        """What is to be posted, oldest first. Call `save` after a change."""
        return self._at.posts

    def open(self) -> None:
        """Take the lock and go on where the last one stopped. Raises `BlockingIOError` if another one watches."""
        self._alerts.open()
        self._at = self._load()
        self._judge = Judge(self._settings.in_force(), self._at.counted, self._at.now)
        self._known = self._alerts.since(self._at.alerts_bytes, self._at.alerts_inode)
        self._file = -1

    def adopt(self, settings: AlertSettings, *, posting: bool) -> None:
        """Go by other settings from now on; what was counted stays counted."""
        self._settings, self._posting = settings, posting
        self._alerts.max_bytes, self._alerts.keep_files = settings.max_bytes, settings.keep_files
        self._judge = Judge(settings.in_force(), self._judge.state, self._judge.now)

    @property
    def is_open(self) -> bool:
        """Whether it holds the lock."""
        return self._alerts.is_open

    def _load(self) -> Saved:
        try:
            return msgspec.json.decode(self._state_path.read_bytes(), type=Saved)
        except (FileNotFoundError, msgspec.DecodeError, UnicodeDecodeError):
            since = rfc3339(self._clock.now() - self._settings.look_back_seconds * 1000)
            known = self._alerts.size - KNOWN_BYTES
            return Saved(not_before=since, alerts_bytes=max(0, known))

    def step(self) -> bool:
        """Read a bounded piece, raise what it makes; whether there is more at once. Raises `OSError`."""
        self._write_alerts()
        more = self._read() if self._file >= 0 or self._find() else False
        if self._unsaved and (not more or self._clock.now() - self._saved_at >= SAVE_MS):
            self.save()
        return more

    def _find(self) -> bool:
        """Open the file to go on with: the one it was in, else the first with lines that were not read yet."""
        inode, offset = self._at.inode, self._at.offset
        for file in self._path.parent.glob(f"{self._path.stem}*"):
            with suppress(OSError):
                found = file.stat()
                if inode and found.st_ino == inode and found.st_size >= offset and self._is_same(file):
                    return self._open(file, offset, (found.st_dev, found.st_ino)) and self._file >= 0
        files, current = listed(self._path)
        begun = [(seq, file) for file in files if (seq := first_seq(file))]
        if not self._at.seq:
            file = self._oldest_wanted(files)
        elif begun and begun[-1][0] > self._at.seq:
            file = next((file for seq, file in reversed(begun) if seq <= self._at.seq + 1), begun[0][1])
        else:
            file = self._path
        return file.is_file() and self._open(file, 0, current if file == self._path else None) and self._file >= 0

    def _oldest_wanted(self, files: list[Path]) -> Path:
        """Where the very first start begins: the oldest file that ends after the time from which lines count."""
        wanted = self._path
        for file in reversed(files[:-1]):
            head = last_head(file)
            if head is None or (head.ts or "") < self._at.not_before:
                break
            wanted = file
        return wanted

    def _is_same(self, file: Path) -> bool:
        return self._at.first_seq is None or first_seq(file) == self._at.first_seq

    def _open(self, file: Path, offset: int, expected: Identity = None) -> bool:
        """Go on with this file if it is still the one that was expected; whether to read, or look again."""
        opened = os.open(file, os.O_RDONLY)
        if expected is not None and identity(opened) != expected:
            os.close(opened)
            return True
        if self._file >= 0:
            os.close(self._file)
        self._file = opened
        self._at.inode, self._at.offset = os.fstat(opened).st_ino, offset
        self._at.first_seq = first_seq(file)
        self._rewound = False
        return True

    def _read(self) -> bool:
        offset = self._at.offset
        if os.fstat(self._file).st_size < offset or (offset and os.pread(self._file, 1, offset - 1) != b"\n"):
            self._rewind()
        rotated = self._rotated()
        text = os.pread(self._file, CHUNK_BYTES, self._at.offset)
        whole = text[: text.rfind(b"\n") + 1]
        if not whole and len(text) == CHUNK_BYTES:
            whole = text  # no line is so long
        if not whole:
            return rotated and self._next()
        lines = whole.split(b"\n")
        first = next((seq for line in lines if (seq := seq_of(line)) is not None), None)
        if self._at.seq and first is not None and first > self._at.seq + 1 and self._at.offset and not self._rewound:
            self._rewind()
            return True
        if self._at.offset == 0:
            self._at.first_seq = first
        for line in lines:
            self._take(line)
        self._at.offset += len(whole)
        self._unsaved = True
        return len(text) == CHUNK_BYTES or rotated

    def _rewind(self) -> None:
        """The file was cut or written anew: read it from its start. What was read before is known by its number."""
        self._at.offset, self._rewound, self._unsaved = 0, True, True

    def _rotated(self) -> bool:
        """Whether the log goes on in another file. Asked before reading, so that nothing is left unread in this one."""
        found = identity(self._path)
        return found is not None and found[1] != self._at.inode  # None: it is between two files

    def _next(self) -> bool:
        """Go on with the next file, if it is there already."""
        self._unsaved = True
        with suppress(FileNotFoundError):
            files, current = listed(self._path)
            others = [file for file in files if file.stat().st_ino != self._at.inode]
            file = next((file for file in others if (first_seq(file) or 0) > self._at.seq), self._path)
            return self._open(file, 0, current if file == self._path else None)
        return False

    def _take(self, line: bytes) -> None:
        record = parsed(line)
        seq = record.get("seq") if record is not None else None
        if record is None or not isinstance(seq, int):
            return  # cut by a crash, or no line at all: then the next one does not follow
        if seq == 1 and record.get("hash") not in ("", self._at.began):
            self._begins(record)
        if seq <= self._at.seq:
            return
        wrong = self._wrong(line, record, seq)
        self._at.seq, self._at.hash = seq, str(record.get("hash"))
        if str(record.get("ts")) < self._at.not_before:
            return
        if wrong:
            self._judged({**record, "event": CHAIN, "reason": wrong, "count": 1, "remote_addr": None, "node_id": None})
        self._judged(record)

    def _begins(self, record: dict[str, Any]) -> None:
        """The first line of a chain: perhaps of another one than before."""
        anew = bool(self._at.began) or (self._at.seq > 0 and not self._rotated())
        self._at.began = str(record.get("hash"))
        if anew:
            text = f"the log begins anew; it had come to line {self._at.seq}"
            self._at.seq, self._at.hash = 0, START_HASH
            self._judged({**record, "event": CHAIN, "reason": text, "count": 1, "remote_addr": None, "node_id": None})

    def _wrong(self, line: bytes, record: dict[str, Any], seq: int) -> str | None:
        """How the line does not fit to the one before; a watcher that begins in the middle takes its first on trust."""
        if head_of(line) is None:
            return f"line {seq} was changed: its text does not match its hash"
        if self._at.seq and seq != self._at.seq + 1:
            return f"lines {self._at.seq + 1} to {seq - 1} are missing"
        if self._at.seq and record.get("prev_hash") != self._at.hash:
            return f"line {seq} does not follow from the line before"
        return None

    def _judged(self, record: dict[str, Any]) -> None:
        for alert in self._judge.take(record):
            self._unwritten.append(alert)
        self._write_alerts()

    def _write_alerts(self) -> None:
        """Write down, say and queue what was raised. What cannot be written is tried again by the next step."""
        while self._unwritten:
            alert = self._unwritten[0]
            if alert.id not in self._known:
                self._alerts.append(msgspec.json.encode(alert) + b"\n")
                self._known[alert.id] = alert.to_seq
                self._say(f"{alert.ts} ALERT {alert.rule}: {alert.text}")
            if self._posting:
                del self._at.posts[: len(self._at.posts) - POSTS_MAX + 1]
                self._at.posts.append(Post(alert))
            self._unwritten.pop(0)
            self._unsaved, self._saved_at = True, 0

    def save(self) -> None:
        """Write the state by replacing its file. Raises `OSError`."""
        self._at.counted, self._at.now = self._judge.state, self._judge.now
        if self._at.seq >= max(self._known.values(), default=0):
            self._known = {}  # nothing is left that was raised before and will be made again
            self._at.alerts_bytes, self._at.alerts_inode = self._alerts.size, self._alerts.inode
        new = self._state_path.with_suffix(".new")
        with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
            file.write(msgspec.json.encode(self._at))
        os.replace(new, self._state_path)
        self._unsaved, self._saved_at = False, self._clock.now()

    def close(self) -> None:
        """Save and let go of the lock. Safe to call twice."""
        if not self._alerts.is_open:
            return
        try:
            if not self._unwritten:
                self.save()
        finally:
            self._alerts.close()
            if self._file >= 0:
                os.close(self._file)
            self._file = -1
