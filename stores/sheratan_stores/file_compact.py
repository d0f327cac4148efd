"""The file store's compaction: a snapshot that stands for the log before a segment, then that log goes.

The rows are taken from memory a thousand at a time, between other work, and written on a thread. Killed at any
step it has lost nothing: a draft is no snapshot, and what a snapshot stands for is removed only after it is on disk.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from sheratan_stores.file_log import number_of
from sheratan_stores.file_snapshot import Totals, Writer
from sheratan_stores.state import State

T = TypeVar("T")

ROWS = 1000
"""How many rows are taken at once: about 0.2 ms."""


async def compact(folder: Path, state: State, totals: Totals, sync_ledger: Callable[[], Awaitable[None]]) -> int:
    """Write the snapshot and remove what it stands for; its bytes. Raises OSError, having removed nothing.

    `totals` are those of the moment in which the segment `totals.snapshot` was begun. `sync_ledger` brings to
    disk what the ledger has from the log that goes.
    """
    writer = Writer(folder, totals)
    try:
        await in_thread(writer.begin)
        for kind in list(state.rows):
            rows, last = state.packed_after(kind, None, ROWS)
            while rows:
                await in_thread(writer.add, rows)
                rows, last = state.packed_after(kind, last, ROWS)
        await sync_ledger()
        size = await in_thread(writer.finish)
    finally:
        await in_thread(writer.close)
    await in_thread(remove_before, folder, totals.snapshot)
    return size


def remove_before(folder: Path, first: int) -> None:
    """Remove the segments and snapshots that a snapshot stands for."""
    for path in (*folder.glob(f"log-{'[0-9]' * 12}"), *folder.glob(f"snapshot-{'[0-9]' * 12}")):
        if number_of(path) < first:
            path.unlink(missing_ok=True)


def remove_drafts(folder: Path) -> None:
    """Remove what a killed process had begun to write. Only for who holds the lock and writes nothing yet."""
    for path in folder.glob("*.tmp"):
        path.unlink(missing_ok=True)


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
