"""The file store's compaction: a snapshot that stands for the log before a segment, then that log goes.

The rows are taken from memory a thousand at a time, between other work, and written on a thread. Killed at any
step it has lost nothing: a draft is no snapshot, and what a snapshot stands for is removed only after it is on disk.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path

from sheratan_stores.file_disk import in_thread
from sheratan_stores.file_segments import number_of
from sheratan_stores.file_snapshot import Totals, Writer
from sheratan_stores.state import State

ROWS, ROWS_BYTES = 1000, 1 << 20
"""How many rows are taken at once, and of how many bytes (then one more): about 0.2 ms."""

DRAFTS = ("log-*.tmp", "snapshot-*.tmp", "*.json.tmp")


async def compact(folder: Path, state: State, totals: Totals, sync: Callable[[], Awaitable[None]]) -> int:
    """Write the snapshot and remove what it stands for; its bytes. Raises OSError, or what `sync` raises.

    `totals` are those of the moment in which the segment `totals.snapshot` was begun. `sync` brings to disk the
    ledger's lines from the log that goes, and the log that the rows are as new as: a snapshot must not show half of
    a transaction whose other half, the counters, was lost with the log's end.
    """
    writer = Writer(folder, totals)
    try:
        await in_thread(writer.begin)
        for kind in list(state.rows):
            rows, last = state.packed_after(kind, None, ROWS, ROWS_BYTES)
            while rows:
                await in_thread(writer.add, rows)
                rows, last = state.packed_after(kind, last, ROWS, ROWS_BYTES)
        await sync()
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
    for draft in DRAFTS:
        for path in folder.glob(draft):
            path.unlink(missing_ok=True)
