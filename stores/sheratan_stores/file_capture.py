"""The files of a file store, opened together: what is open stays readable when a compaction removes it meanwhile."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sheratan_hub.clock import Clock
from sheratan_hub.storage import StoreRefused
from sheratan_stores import file_folder
from sheratan_stores.file_folder import CLOSED
from sheratan_stores.file_records import is_torn, read_all

TRIES = 100
"""So often they are opened anew when some went meanwhile."""

WRITES, WRITE_MS = 40, 25
"""So often, and after so long, it is looked whether a record was only being written while it was read."""


class Captured:
    """A store's files, open: the newest snapshot, the log from there on, the events, by name."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: dict[str, int] = {}

    def open(self) -> None:
        """Open them. Raises FileNotFoundError when some went meanwhile; call `close` and try again."""
        names = sorted(os.listdir(self.folder))
        snapshots = [name for name in names if _numbered(name, "snapshot-", 12)]
        first = int(snapshots[-1][-12:]) if snapshots else 1
        logs = [name for name in names if _numbered(name, "log-", 12) and int(name[-12:]) >= first]
        events = [name for name in names if _numbered(name, "events-", 20)]
        closed = [CLOSED] if CLOSED in names else []
        for name in (*snapshots[-1:], *logs, *events, *closed):
            self.files[name] = os.open(self.folder / name, os.O_RDONLY | os.O_CLOEXEC)

    def named(self, prefix: str) -> list[str]:
        """The files whose name begins so, in order."""
        return sorted(name for name in self.files if name.startswith(prefix))

    def read(self, name: str) -> bytes:
        """What a file holds now. Raises OSError."""
        file = self.files[name]
        return os.pread(file, os.fstat(file).st_size, 0)

    def close(self) -> None:
        """Close them all."""
        while self.files:
            os.close(self.files.popitem()[1])


def _numbered(name: str, prefix: str, digits: int) -> bool:
    return len(name) == len(prefix) + digits and name.startswith(prefix) and name[-digits:].isdigit()


@contextmanager
def captured(folder: Path) -> Iterator[Captured]:
    """The files of a store, open. Raises `StoreRefused`."""
    if not file_folder.look(folder):
        raise StoreRefused(f"there is no store in {folder}")
    files = Captured(folder)
    try:
        for _ in range(TRIES):
            try:
                files.open()
            except FileNotFoundError:
                files.close()
                continue
            break
        else:
            raise StoreRefused(f"{folder} changes too fast to be read; try again")
        yield files
    except OSError as error:
        raise StoreRefused(f"{error.filename or folder} cannot be read: {error.strerror}") from error
    finally:
        files.close()


async def growing_in(files: Captured, clock: Clock) -> dict[str, bytes]:
    """The files of a log that somebody may be writing to: its last one, or the one before, if that was made already.

    The last is read first: it holds nothing that comes after the end of what is read of the one before.
    """
    return {name: await _grown(files, name, clock) for name in reversed(files.named("log-")[-2:])}


async def _grown(files: Captured, name: str, clock: Clock) -> bytes:
    """What a file holds up to the end of a record.

    It is not read in an instant: behind a record that was not there yet later ones may be. They are left out if that
    record is there when it is looked again; else it is damaged, which is for who reads it to say.
    """
    before = 0
    for _ in range(WRITES):
        data = await asyncio.to_thread(files.read, name)
        end = await asyncio.to_thread(_end, data, name)
        if is_torn(data, name, end, len(data)):
            break
        if 0 < before < end:
            return data[:end].ljust(len(data), b"\0")
        before = end
        await clock.sleep(WRITE_MS)
    return data


def _end(data: bytes, name: str) -> int:
    end = 0
    for record in read_all(data, name):
        end = record.end
    return end
