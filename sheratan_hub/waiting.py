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

    `woken` holds the lanes it was woken for and has not used; `saturated`, that it waits for a lease to end;
    `freed`, that it was woken because one has ended.
    """

    __slots__ = ("event", "freed", "limit", "offer", "saturated", "woken")

    def __init__(self, offer: Offer, limit: int) -> None:
        self.offer = offer
        self.limit = limit
        self.event = asyncio.Event()
        self.woken: list[str] = []
        self.saturated = False
        self.freed = False

    def looked(self, found: int, reason: str | None, wakes: int) -> None:
        """It has looked. Its first `wakes` wakes are used up by what it found, or all if there was no job left.

        Wakes that it could not use (the limit is reached, its node is stale) go to others when it leaves.
        """
        del self.woken[: wakes if reason == "no_job" else min(found, wakes)]
        self.saturated = reason == "inflight_limit"
        if found or self.saturated:
            self.freed = False


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
            if waiter.freed:
                self._free_one()

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

    def committed(self, new: Iterable[Row], put: Iterable[Row]) -> None:
        """Wake whom these rows concern: a claimable job a pull that can take it, an ended lease one that waits for
        it, a finished job its own waiters."""
        nobody: set[str] = set()
        for row in new:
            self._claimable(row, nobody)
        for row in put:
            self._claimable(row, nobody)
            if row.kind == "job" and row.labels[0] != "running":
                self._free_one()
                if row.labels[0] != "pending":
                    for event in self._jobs.get(row.id, ()):
                        event.set()

    def _claimable(self, row: Row, nobody: set[str]) -> None:
        if row.lane is not None and row.lane not in nobody and not self.wake(row.lane):
            nobody.add(row.lane)

    def pass_on(self, waiter: Waiter) -> None:
        """It was woken because a lease has ended, but has no job to take: let another look."""
        waiter.freed = False
        self._free_one()

    def _free_one(self) -> None:
        for waiter in self._pulls:
            if waiter.saturated:
                waiter.saturated, waiter.freed = False, True
                waiter.event.set()
                return

    def wake(self, lane: str) -> bool:
        """Wake the first waiting pull that can take a job of this lane and has not been woken for enough yet."""
        if not self._pulls:
            return False
        name = read_lane(lane)
        for waiter in self._pulls:
            if len(waiter.woken) < waiter.limit and suits(name.kind, name.needs, waiter.offer):
                waiter.woken.append(lane)
                waiter.event.set()
                return True
        return False

    def close(self) -> None:
        """Send everybody home: every waiter looks once more and answers."""
        self._closed = True
        for waiter in self._pulls:
            waiter.event.set()
        for waiters in self._jobs.values():
            for event in waiters:
                event.set()
