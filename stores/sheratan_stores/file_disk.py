"""What the file store does to disks, and on which threads: every write, sync and rename of it passes through here."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Coroutine
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


class SyncFailed(Exception):
    """Nobody knows what is on disk now; a second sync would succeed and prove nothing."""


def write(file: int, data: bytes, at: int) -> None:
    """Write all of `data` at this offset. Raises OSError."""
    rest = memoryview(data)
    while rest:
        done = os.pwrite(file, rest, at)
        rest, at = rest[done:], at + done


def sync(file: int, path: Path) -> None:
    """Wait until what was written to this file is on disk. Raises `SyncFailed`."""
    try:
        os.fdatasync(file)
    except OSError as error:
        raise SyncFailed(f"{path}: {error.strerror}") from error


def sync_folder(folder: Path) -> None:
    """Wait until the names in the folder are on disk. Raises OSError."""
    file = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def draft_of(path: Path) -> Path:
    """The name a file has until it is whole and on disk."""
    return path.with_name(f"{path.name}.tmp")


def replace(path: Path, content: bytes) -> None:
    """Put a file into its place, whole or not at all. The folder is not synced. Raises OSError."""
    draft = draft_of(path)
    try:
        with suppress(FileNotFoundError):
            draft.unlink()
        file = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            write(file, content, 0)
            os.fsync(file)
        finally:
            os.close(file)
        draft.replace(path)
    except OSError:
        with suppress(OSError):
            draft.unlink()
        raise


def make_folder(folder: Path) -> None:
    """Make a folder and those above it that are missing; their names are on disk afterwards. Raises OSError."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    for path in missing:
        sync_folder(path.parent)


async def in_thread(function: Callable[..., T], *args: object) -> T:
    """What `function` returns or raises, run on a thread. If the caller is cancelled, that ends only after it has."""
    return await whole(asyncio.to_thread(function, *args))


async def whole(work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is carried out to its end even if the caller is cancelled meanwhile."""
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        while not task.done():
            with suppress(asyncio.CancelledError):
                await asyncio.wait({task})
        if not task.cancelled():
            task.exception()  # nobody else asks
        raise
