"""What is timed: the store's transactions, by a watch around the store; and how late the event loop is."""

from __future__ import annotations

import asyncio
from contextlib import AbstractAsyncContextManager
from types import TracebackType
from typing import Any, cast

from sheratan_hub.clock import stopwatch
from sheratan_hub.metrics.tally import Buckets
from sheratan_hub.storage import Changes, Conflict, Loaded, Store, StoreDown, StoreFull, Tx, Wants

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
LAGS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
"""Upper bounds of the buckets, seconds."""

LOOK_SECONDS = 0.25


class TimedStore:
    """A watch beside a store's transactions: use `store` in the store's place. All else goes to the store."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.commits, self.syncs = Buckets(SECONDS), Buckets(SECONDS)
        self.failures = {"down": 0, "full": 0, "conflict": 0, "bug": 0}

    @property
    def store(self) -> Store:
        """The store as it is to be used, so that it is timed."""
        return cast(Store, self)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def begin(self) -> AbstractAsyncContextManager[Tx]:
        """See `Store.begin`."""
        return TimedTx(self, self._store.begin())

    def failed(self, error: BaseException) -> None:
        """Count a transaction that ended with this."""
        if isinstance(error, StoreFull):
            self.failures["full"] += 1
        elif isinstance(error, StoreDown):
            self.failures["down"] += 1
        elif isinstance(error, Conflict):
            self.failures["conflict"] += 1
        elif isinstance(error, Exception):
            self.failures["bug"] += 1


class TimedTx:
    """One transaction of a `TimedStore`, timed once it is over, if it has saved anything."""

    def __init__(self, timed: TimedStore, inner: AbstractAsyncContextManager[Tx]) -> None:
        self._timed, self._inner = timed, inner
        self._began = stopwatch()
        self._saved = False

    async def __aenter__(self) -> Tx:
        try:
            self._tx = await self._inner.__aenter__()
        except Exception as error:
            self._timed.failed(error)
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        done = await self._inner.__aexit__(kind, error, trace)
        if error is not None:
            self._timed.failed(error)
        elif self._saved:
            self._timed.commits.add(stopwatch() - self._began)
        return done

    async def load(self, wants: Wants) -> Loaded:
        """See `Tx.load`."""
        return await self._tx.load(wants)

    async def save(self, changes: Changes, *, durable: bool = True) -> int:
        """See `Tx.save`."""
        began = stopwatch()
        first = await self._tx.save(changes, durable=durable)
        self._saved = True
        if durable:
            self._timed.syncs.add(stopwatch() - began)
        return first


class Lag:
    """How late the event loop calls what is due. By the loop's own time, as a socket would have it."""

    def __init__(self) -> None:
        self.seen = Buckets(LAGS)
        self._handle: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Look from now on, in the running loop."""
        loop = asyncio.get_running_loop()
        self._handle = loop.call_later(LOOK_SECONDS, self._look, loop, stopwatch() + LOOK_SECONDS)

    def stop(self) -> None:
        """Look no more. Safe to call twice."""
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None

    def _look(self, loop: asyncio.AbstractEventLoop, due: float) -> None:
        now = stopwatch()
        self.seen.add(max(0.0, now - due))
        self._handle = loop.call_later(LOOK_SECONDS, self._look, loop, now + LOOK_SECONDS)
