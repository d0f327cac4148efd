"""Long polls: who waits for which work, or for the end of which job, and who is woken by what was committed."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from sheratan_hub.rules.lanes import Offer, read_lane, suits
from sheratan_hub.storage import Row


class Waiter:
    """One waiting pull: what it can take, and an event that is set when it should look again.

    `woken` holds the lanes it was woken for since its last look; `saturated`, that it waits for a lease to end.
    """

    __slots__ = ("event", "limit", "offer", "saturated", "woken")

    def __init__(self, offer: Offer, limit: int) -> None:
        self.offer = offer
        self.limit = limit
        self.event = asyncio.Event()
        self.woken: list[str] = []
        self.saturated = False

    def looked(self, found: int, saturated: bool, wakes: int) -> None:
        """It has looked: the first `wakes` wakes are used up, unless it could not take what it was woken for."""
        del self.woken[: wakes if found == 0 and not saturated else min(found, wakes)]
        self.saturated = saturated
        if not self.woken:
            self.event.clear()


class Waiting:
    """All waiting pulls, first come first woken: as many as there are jobs for, and the jobs' own waiters."""

    def __init__(self) -> None:
        self._pulls: OrderedDict[Waiter, None] = OrderedDict()
        self._jobs: dict[str, set[asyncio.Event]] = {}
        self._closed = False

    def __len__(self) -> int:
        return len(self._pulls) + sum(map(len, self._jobs.values()))

    @property
    def closed(self) -> bool:
        """Whether everybody was sent home."""
        return self._closed

    @contextmanager
    def pull(self, offer: Offer, limit: int) -> Iterator[Waiter]:
        """Stand in line from before the first look until the last; a wake that came to nothing is passed on."""
        waiter = Waiter(offer, limit)
        if self._closed:
            waiter.event.set()
        try:
            self._pulls[waiter] = None
            yield waiter
        finally:
            del self._pulls[waiter]
            for lane in waiter.woken:
                self.wake(lane)

    @contextmanager
    def job(self, job_id: str) -> Iterator[asyncio.Event]:
        """An event that is set when the job has finished."""
        event = asyncio.Event()
        if self._closed:
            event.set()
        self._jobs.setdefault(job_id, set()).add(event)
        try:
            yield event
        finally:
            waiters = self._jobs[job_id]
            waiters.discard(event)
            if not waiters:
                del self._jobs[job_id]

    def committed(self, rows: Iterable[Row]) -> None:
        """Wake whom these rows concern: a claimable job wakes a pull that can take it, a finished one its own."""
        for row in rows:
            if row.lane is not None:
                self.wake(row.lane)
            if row.kind == "job" and row.labels[0] != "running":
                self._ended(row)

    def _ended(self, row: Row) -> None:
        for waiter in self._pulls:
            if waiter.saturated:
                waiter.saturated = False
                waiter.event.set()
                break
        if row.labels[0] != "pending":
            for event in self._jobs.get(row.id, ()):
                event.set()

    def wake(self, lane: str) -> None:
        """Wake the first waiting pull that can take a job of this lane and has not been woken for enough yet."""
        if not self._pulls:
            return
        name = read_lane(lane)
        for waiter in self._pulls:
            if len(waiter.woken) < waiter.limit and suits(name.kind, name.needs, waiter.offer):
                waiter.woken.append(lane)
                waiter.event.set()
                return

    def close(self) -> None:
        """Send everybody home: every waiter looks once more and answers."""
        self._closed = True
        for waiter in self._pulls:
            waiter.event.set()
        for waiters in self._jobs.values():
            for event in waiters:
                event.set()
