"""The seam's second half: what a store may offer beside its work, to be looked at, copied and mended as a whole.

A store that runs a hub needs none of it; `tools_of` says in a sentence what is missing. All of it is asked of a store
that was constructed and **not** opened, except `sizes` and `reading`, which may be asked of an open one too. Reading
never locks out who writes, and changes no file.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any, NamedTuple, Protocol, cast

import msgspec

from sheratan_hub.storage import Key, Row, Store, StoreRefused

PIECE, PIECE_BYTES = 1000, 4 << 20
"""So many rows, or batches of events, are read at once at most, and of so many bytes (then one more)."""


class Sizes(msgspec.Struct, frozen=True):
    """Bytes on disk: all that belongs to the store, its log (SQLite: the WAL) in it, and what its disk has free."""

    store_bytes: int
    log_bytes: int
    free_bytes: int


class Batch(NamedTuple):
    """The ledger lines of one transaction: the number of the first, when they were saved (ms), and their bytes."""

    first: int
    at: int
    lines: Sequence[bytes]


class About(msgspec.Struct, frozen=True):
    """What a store says of itself: where it lies, its format's number, and who has it open, in words ("" nobody)."""

    place: str
    format: int
    held_by: str = ""


class Finding(NamedTuple):
    """Something that a store finds in its own files: what, where, and a sentence. `harmless`: it is only told."""

    code: str
    place: str
    text: str
    harmless: bool = False


class Reading(Protocol):
    """All that was committed at one moment, whatever is changed since. Raises `StoreRefused` where it is damaged."""

    about: About
    seq: int
    """The number that the next event will get."""

    async def kinds(self) -> list[str]:
        """The kinds of rows there are, sorted."""
        ...

    async def rows(self, kind: str, after: str | None = None, limit: int = PIECE) -> list[Row]:
        """The rows of a kind behind the id `after`, by id; fewer than `limit` after `PIECE_BYTES`, none at the end."""
        ...

    async def fetch(self, keys: Iterable[Key]) -> list[Row]:
        """The rows of these keys that exist, in no order."""
        ...

    async def counts(self) -> dict[str, int]:
        """All counters that are not 0."""
        ...

    async def batches(self, after: int = 0, limit: int = PIECE) -> list[Batch]:
        """The ledger's batches behind line `after`, in order; none at the end. What was pruned is not among them."""
        ...

    async def findings(self) -> list[Finding]:
        """What is wrong, or worth telling, about the files themselves. May read all of them."""
        ...


class Filling(Protocol):
    """A store that is being made. Nobody sees it before `finish`; left without that, nothing is left of it."""

    async def rows(self, rows: Sequence[Row]) -> None:
        """Add rows, each key once, in any order."""
        ...

    async def batches(self, batches: Sequence[Batch]) -> None:
        """Add batches of events, in order and without gaps."""
        ...

    async def finish(self, seq: int, counts: dict[str, int]) -> None:
        """Say which number the next event gets and what is counted; sync everything, and give the store its name."""
        ...


class Salvage(NamedTuple):
    """What could be read of a damaged store, and a sentence for everything that could not."""

    reading: Reading
    lost: list[str]


class Tools(Protocol):
    """The members that a store class may have beside those of `Store`."""

    def reading(self) -> AbstractAsyncContextManager[Reading]:
        """Look at everything, beside who writes. Raises `StoreRefused`, also where there is no store."""
        ...

    def filling(self) -> AbstractAsyncContextManager[Filling]:
        """Make this store out of what is given. Raises `StoreRefused` if there is anything where it would be."""
        ...

    def salvaging(self, scratch: Path) -> AbstractAsyncContextManager[Salvage]:
        """Read as much as can be read of a damaged store that nobody has open; `scratch` is a folder to work in."""
        ...

    async def copy_to(self, folder: Path) -> str:
        """Copy what is committed, beside who writes, as a store of the same kind in an empty folder; its URL.

        Everything is synced, readable for its owner alone. Raises `StoreRefused`, `StoreDown`.
        """
        ...

    async def compact(self) -> None:
        """Give back the room that nothing needs any more. Raises `StoreRefused`, also while somebody has it open."""
        ...

    async def sizes(self) -> Sizes:
        """How large it is. Costs some system calls; raises OSError."""
        ...


MEMBERS = ("reading", "filling", "salvaging", "copy_to", "compact", "sizes")


def tools_of(store: Store, *needed: str) -> Tools:
    """The store as what it can beside its work. Raises `StoreRefused` if it lacks one of the members needed."""
    lacking = [name for name in needed or MEMBERS if not callable(getattr(store, name, None))]
    if lacking:
        raise StoreRefused(
            f'{type(store).__name__} does not offer this: it lacks {", ".join(lacking)} (stores/STORES.md, "Tools")'
        )
    return cast(Tools, store)


async def sizes_of(store: Store) -> Sizes | None:
    """How large a store is, None if it does not say. Cheap enough for a look every few seconds; raises OSError."""
    member: Any = getattr(store, "sizes", None)
    return await member() if callable(member) else None


async def all_rows(reading: Reading, kind: str) -> AsyncIterator[list[Row]]:
    """All rows of a kind, piece by piece."""
    after: str | None = None
    while rows := await reading.rows(kind, after):
        yield rows
        after = rows[-1].id


async def all_batches(reading: Reading) -> AsyncIterator[list[Batch]]:
    """The whole ledger, piece by piece."""
    after = 0
    while batches := await reading.batches(after):
        yield batches
        after = batches[-1].first + len(batches[-1].lines) - 1
