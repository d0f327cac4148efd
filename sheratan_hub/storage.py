"""The seam between the hub and its stores: rows, selections, changes, and what a store promises.

A store knows rows, not jobs. It loads rows by key, selects *ready* and *due* rows, saves changes all or
nothing, and keeps counters and the ledger in the same transaction. Everything else is a rule.
`stores/STORES.md` says how to write one; `sheratan_stores.conformance` proves it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractAsyncContextManager
from functools import cache, partial
from importlib.metadata import EntryPoint, entry_points
from typing import Any, ClassVar, NamedTuple, Protocol

import msgspec

API = 1
"""Version of this seam. A store whose `api` differs is refused by `open_store`."""

LABELS = 5
"""How many label slots a row has. The hub's use of them: status, kind, source, mission, node."""


class Key(NamedTuple):
    """What names a row: its kind (`"job"`, `"node"` ...) and its id inside that kind."""

    kind: str
    id: str


_key: Callable[[tuple[str, str]], Key] = partial(tuple.__new__, Key)
"""`Key(kind, id)` at a third of its cost: every row of every batch is named a few times."""


class Row(msgspec.Struct, frozen=True, gc=False, array_like=True):
    """One stored thing. `doc` is opaque to the store; all other fields are the store's only indexes.

    `lane` is set exactly while the row may be claimed; rows of one lane are claimed by `order`, then `id`.
    `agenda` names why somebody must look at the row again, and `due_at` (ms) by when; they are set together.
    """

    kind: str
    id: str
    doc: bytes
    labels: tuple[str | None, str | None, str | None, str | None, str | None] = (None,) * 5
    lane: str | None = None
    order: int = 0
    agenda: str | None = None
    due_at: int = 0

    @property
    def key(self) -> Key:
        """The row's name."""
        return _key((self.kind, self.id))


class Ready(NamedTuple):
    """Selects the claimable rows of one lane, ordered by (`order`, `id`)."""

    lane: str


class Due(NamedTuple):
    """Selects the rows of one agenda with `due_at <= before` (ms), ordered by (`due_at`, `id`)."""

    agenda: str
    before: int


class Wants(msgspec.Struct):
    """What a transaction must see. Selections map to a limit: at most so many rows each."""

    keys: set[Key] = msgspec.field(default_factory=set)
    look: set[Key] = msgspec.field(default_factory=set)
    ready: dict[Ready, int] = msgspec.field(default_factory=dict)
    due: dict[Due, int] = msgspec.field(default_factory=dict)
    counts: set[str] = msgspec.field(default_factory=set)

    def __bool__(self) -> bool:
        """Whether anything is wanted."""
        return bool(self.keys or self.look or self.ready or self.due or self.counts)


class Loaded(msgspec.Struct):
    """What `load` found. A key that does not exist is absent from `rows`; a facet never counted is 0."""

    rows: dict[Key, Row] = msgspec.field(default_factory=dict)
    ready: dict[Ready, list[Row]] = msgspec.field(default_factory=dict)
    due: dict[Due, list[Row]] = msgspec.field(default_factory=dict)
    counts: dict[str, int] = msgspec.field(default_factory=dict)


class Changes(msgspec.Struct):
    """What a transaction writes.

    `new` rows must not exist, `put` rows were loaded in this transaction, `gone` rows are removed.
    `counts` are deltas by facet. `ledger` holds one line of bytes an event (no newline inside), in order.
    """

    new: list[Row] = msgspec.field(default_factory=list)
    put: list[Row] = msgspec.field(default_factory=list)
    gone: list[Key] = msgspec.field(default_factory=list)
    counts: dict[str, int] = msgspec.field(default_factory=dict)
    ledger: list[bytes] = msgspec.field(default_factory=list)

    def __bool__(self) -> bool:
        """Whether there is anything to write."""
        return bool(self.new or self.put or self.gone or self.counts or self.ledger)


class Page(NamedTuple):
    """A piece of a list. `next` is the id to continue after, None at the end; `rows` may be empty before it."""

    rows: list[Row]
    next: str | None


class LedgerLine(NamedTuple):
    """One event as it was written: its number, counted from 1 without gaps, and its bytes."""

    seq: int
    line: bytes


class Conflict(Exception):
    """Another transaction was first (a `new` key exists, a lock could not be had). Nothing was written."""


class StoreDown(Exception):
    """The store cannot do it. Nothing of this transaction is reported as done.

    After a failed sync a store refuses everything with this error until it is opened again.
    """


class StoreFull(StoreDown):
    """There is no room, or the disk is read-only. The write was cut back; it works again once there is room."""


class StoreRefused(Exception):
    """The store cannot be opened as it is: held by another process, damaged, foreign, of a newer format.

    The text is one sentence with the place in it, fit for an operator.
    """


class Tx(Protocol):
    """One transaction. `load` may be called several times, `save` once, as the last step."""

    async def load(self, wants: Wants) -> Loaded:
        """Return what `wants` names, as of this transaction.

        Rows of `keys` and of selections are locked until the transaction ends; `look` only reads. Keys are
        locked in sorted order and wait; selections skip what other transactions hold.
        """
        ...

    async def save(self, changes: Changes, *, durable: bool = True) -> int:
        """Write all of `changes` and commit; return the ledger `seq` of the first line (0 without lines).

        Raises `Conflict` when a `new` key exists: then nothing is left behind. When it returns and `durable`
        is true, the changes survive `kill -9` and power loss; else they may be lost, but only as a suffix.
        """
        ...


class Store(Protocol):
    """Keeps rows, counters and the ledger. Opened once, used by one event loop.

    The class is called with the store's URL and the hub's clock: `SqliteStore("sqlite://var/hub.db", clock)`.
    """

    api: ClassVar[int]
    """The seam's version that this store was written for; see `API`."""
    shared: ClassVar[bool]
    """Whether several hubs may use it at once. If not, a second writer is refused by `open`."""

    async def open(self) -> None:
        """Make it usable: take the lock, create or upgrade the format. Raises `StoreRefused`, `StoreDown`."""
        ...

    async def close(self) -> None:
        """Finish what is under way and let go of the lock. Safe to call twice."""
        ...

    async def now(self) -> int:
        """The one time for this store's transactions, in ms: the hub's clock, or the database's if it is shared."""
        ...

    def begin(self) -> AbstractAsyncContextManager[Tx]:
        """A transaction. Left without `save`, or by an exception, it leaves no trace."""
        ...

    async def fetch(self, keys: Sequence[Key]) -> list[Row]:
        """The committed rows of these keys, in no particular order; absent ones are left out. Nothing is locked."""
        ...

    async def page(
        self,
        kind: str,
        labels: Sequence[str | None] = (),
        after: str | None = None,
        limit: int = 100,
        examine: int = 2000,
        newest: bool = False,
    ) -> Page:
        """Rows of one kind in id order (`newest`: descending) that carry every label given (None: any).

        At most `limit` rows are returned and at most `examine` looked at, so a page may be short or empty
        and still have a `next`. `after` excludes ids up to and including itself.
        """
        ...

    async def counts(self, prefix: str = "") -> dict[str, int]:
        """The counters whose facet starts with `prefix` and that are not 0. Never scans rows."""
        ...

    async def heads(self, prefix: str = "") -> dict[str, int]:
        """Every lane starting with `prefix` that holds a row, with the `order` of its first row."""
        ...

    async def events(self, after: int = 0, limit: int = 1000) -> list[LedgerLine]:
        """Ledger lines with `seq > after`, in order, at most `limit`."""
        ...

    async def prune_events(self, before: int) -> int:
        """Forget whole ledger batches that were saved before this time (ms); return how many lines went.

        Numbers go on: a `seq` is never given twice.
        """
        ...

    async def hint(self, timeout_ms: int) -> None:
        """Return when another process may have changed something, or after `timeout_ms`. May wake too often."""
        ...


def open_store(url: str, clock: Any) -> Store:
    """Find the store for `url` by its scheme among the entry points `sheratan_hub.stores`, and construct it.

    The store is not opened. Raises `StoreRefused` for an unknown scheme or another version of the seam.
    """
    scheme = url.partition("://")[0]
    found = _installed()
    if "://" not in url or scheme not in found:
        known = ", ".join(f"{name}://" for name in sorted(found)) or "none is installed"
        raise StoreRefused(f"{scheme}:// is no store that is installed here; known are {known}")
    make = found[scheme].load()
    if getattr(make, "api", None) != API:
        raise StoreRefused(
            f"the store for {scheme}:// was written for version {getattr(make, 'api', None)} "
            f"of the storage seam, this hub speaks version {API}"
        )
    store: Store = make(url, clock)
    return store


@cache
def _installed() -> dict[str, EntryPoint]:
    """The stores by scheme. Every package that is installed has to be looked at for them, so that is done once."""
    return {point.name: point for point in entry_points(group="sheratan_hub.stores")}


def merge(wants: Iterable[Wants], most: int | None = None) -> Wants:
    """All of these wants as one. Limits of one selection add up to `most`, or to what one of them asks alone."""
    most = SELECT_MAX if most is None else min(most, SELECT_MAX)
    out = Wants()
    for want in wants:
        if want.keys:
            out.keys |= want.keys
        if want.look:
            out.look |= want.look
        if want.counts:
            out.counts |= want.counts
        for ready, limit in want.ready.items():
            out.ready[ready] = max(limit, min(out.ready.get(ready, 0) + limit, most))
        for due, limit in want.due.items():
            out.due[due] = max(limit, min(out.due.get(due, 0) + limit, most))
    out.look -= out.keys
    return out


SELECT_MAX = 10_000
"""The deepest that a selection is loaded for many at once; who finds it used up asks again."""
