"""What is looked at behind everything else, so that a scrape waits for no disk: the store's files, the watcher's
alerts, nodes that still use the old token.
"""

from __future__ import annotations

import asyncio
import os
import stat
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from sheratan_hub.audit_lines import parsed
from sheratan_hub.hub import Hub
from sheratan_hub.keyring import Keyring
from sheratan_hub.loops import Loop
from sheratan_hub.metrics.tally import Few
from sheratan_hub.storage import Store
from sheratan_hub.token_uses import last_uses, users_of

DISK_MS = 10_000
STRAGGLERS_MS = 30_000
"""How often is looked at files, and at all nodes while a rotation is under way."""

CHUNK_BYTES = 1 << 20
RULES_MOST = 50


class Disk(NamedTuple):
    """What a store takes on its disk, bytes: all of its files, what is written ahead, the disk's free room and size."""

    size: int
    wal: int
    free: int
    total: int


class Alerts:
    """Counts the lines of alerts.jsonl that come from now on, by their rule, whoever writes them."""

    def __init__(self, path: Path, rules: Iterable[str]) -> None:
        self._path, self._few = path, Few(RULES_MOST)
        self.raised: Counter[str] = Counter({self._few.label(rule): 0 for rule in rules})
        self._inode, self._offset = self._stamp()

    def _stamp(self, path: Path | None = None) -> tuple[int, int]:
        with suppress(OSError):
            found = (path or self._path).stat()
            return found.st_ino, found.st_size
        return 0, 0

    def look(self) -> None:
        """Read on. A file that was cut is read anew from its start; of one that was rotated the rest comes first."""
        inode, size = self._stamp()
        if inode != self._inode or size < self._offset:
            before = self._path.with_name(f"{self._path.name}.1")
            if self._inode and self._stamp(before)[0] == self._inode:
                self._read(before)
            self._inode, self._offset = inode, 0
        self._read(self._path)

    def _read(self, path: Path) -> None:
        with suppress(OSError), path.open("rb") as file:
            file.seek(self._offset)
            while b"\n" in (text := file.read(CHUNK_BYTES)):
                whole = text[: text.rfind(b"\n") + 1]
                self._offset += len(whole)
                self._take(whole)
                file.seek(self._offset)

    def _take(self, lines: bytes) -> None:
        for record in map(parsed, lines.split(b"\n")):
            if record is not None:
                self.raised[self._few.label(str(record.get("rule")))] += 1


class Looks:
    """The last that was seen. `disk` is None for a store without files; `stragglers` counts nodes on the old token."""

    def __init__(self, hub: Hub, store: Store, keyring: Keyring, alerts: Path, rules: Iterable[str]) -> None:
        self._hub, self._store, self._keyring = hub, store, keyring
        self.disk: Disk | None = None
        self.stragglers = 0
        self.alerts = Alerts(alerts, rules)

    @property
    def loops(self) -> list[Loop]:
        """What must run while the hub does."""
        clock = self._hub.clock
        return [
            Loop("look", self.look, clock, DISK_MS),
            Loop("stragglers", self.look_for_stragglers, clock, STRAGGLERS_MS),
        ]

    async def look(self) -> int | None:
        """Look at the store's files and at the alerts."""
        self.disk = await asyncio.to_thread(disk_of, self._store)
        await asyncio.to_thread(self.alerts.look)
        return None

    async def look_for_stragglers(self) -> int | None:
        """Count the nodes that would be locked out if the rotation ended now. Without one nothing is read."""
        ring = self._keyring.ring
        if ring is None or ring.next is None:
            self.stragglers = 0
        else:
            self.stragglers = len(users_of(ring.active.id, await last_uses(self._hub, self._keyring)))
        return None


def disk_of(store: Store) -> Disk | None:
    """What the store's `folder`, or the file at its `path` with those that belong to it, take; None if it has none."""
    folder, path = getattr(store, "folder", None), getattr(store, "path", None)
    if isinstance(folder, Path):
        home, prefix = folder, ""
    elif isinstance(path, Path):
        home, prefix = path.parent, path.name
    else:
        return None
    try:
        disk = os.statvfs(home)
    except OSError:
        return None
    size = wal = 0
    for name, found in _files(home, prefix):
        size += found
        ahead = name.endswith("-wal") if prefix else name.startswith("log-")
        wal += found if ahead else 0
    return Disk(size, wal, disk.f_bavail * disk.f_frsize, disk.f_blocks * disk.f_frsize)


def _files(folder: Path, prefix: str) -> Iterator[tuple[str, int]]:
    """(name, bytes) of the folder's files whose names begin so; what goes meanwhile is left out."""
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            with suppress(OSError):
                found = entry.stat(follow_symlinks=False)
                if stat.S_ISREG(found.st_mode) and entry.name.startswith(prefix):
                    yield entry.name, found.st_size
