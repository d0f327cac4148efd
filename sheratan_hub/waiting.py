"""Long polls: who waits for which work, or for the end of which job, and who is woken by what was committed."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

from sheratan_hub.items import Item, Outcome
from sheratan_hub.rules.lanes import Offer, read_lane, suits
from sheratan_hub.storage import Row


class Waiter:
    """One waiting pull: what it can take, and an event that is set when it should look again.

    `woken` holds the lanes it was woken for and has not used; `saturated`, that it waits for a lease to end;
    `freed`, that it was woken because one has ended. `item` is its pull while it sleeps; `served`, once that is
    decided in the batch that makes a job for it, will hold the outcome (cancelled: it must look itself).
    `replaced`: the same pull has come again, so that nobody reads this one's answer any more.
    """

    __slots__ = ("event", "freed", "item", "limit", "offer", "replaced", "saturated", "served", "woken")

    def __init__(self, offer: Offer, limit: int) -> None:
        self.offer = offer
        self.limit = limit
        self.event = asyncio.Event()
        self.woken: list[str] = []
        self.saturated = False
        self.freed = False
        self.item: Item | None = None
        self.served: asyncio.Future[list[Outcome]] | None = None
        self.replaced = False

    def serve(self) -> Item:
        """Its pull, to be decided now; only while it sleeps."""
        item, self.item = self.item, None
        assert item is not None  # noqa: S101
        item.future = self.served = asyncio.get_running_loop().create_future()
        item.begun = True
        item.future.add_done_callback(lambda _: self.event.set())
        return item

    def looked(self, found: int, reason: str | None, wakes: int) -> list[str]:
        """It has looked. Its first `wakes` wakes are used up by what it found, or all if there was no job for it.

        The lanes of these are returned: somebody else may find one there. Wakes that it could not use (the limit
        is reached, its node is stale) go to others when it leaves.
        """
        used = wakes if reason == "no_job" else min(found, wakes)
        lanes = self.woken[:used] if reason == "no_job" else []
        del self.woken[:used]
        self.saturated = reason == "inflight_limit"
        if found or self.saturated:
            self.freed = False
        return lanes


class JobWaiter:
    """One who waits for a job's end: an event that is set then, and the row as it was committed."""

    __slots__ = ("event", "row")

    def __init__(self) -> None:
        self.event = asyncio.Event()
        self.row: Row | None = None


class Waiting:
    """All waiting pulls, first come first woken: as many as there are jobs for, and the jobs' own waiters."""

    def __init__(self) -> None:
        self._pulls: OrderedDict[Waiter, None] = OrderedDict()
        self._jobs: dict[str, set[JobWaiter]] = {}
        self._named: dict[tuple[str, str], Waiter] = {}
        self._closed = False
        self.frees = 0
        """How many leases have ended."""

    def __len__(self) -> int:
        return len(self._pulls) + sum(map(len, self._jobs.values()))

    @property
    def pulls(self) -> int:
        """How many pulls wait."""
        return len(self._pulls)

    @property
    def closed(self) -> bool:
        """Whether everybody was sent home."""
        return self._closed

    @contextmanager
    def pull(self, offer: Offer, limit: int, name: tuple[str, str] | None = None) -> Iterator[Waiter]:
        """Stand in line from before the first look until the last; a wake that came to nothing is passed on.

        Of two with one `name` (node and pull_id) the older is sent home: its client has asked again.
        """
        waiter = Waiter(offer, limit)
        if self._closed:
            waiter.event.set()
        if name is not None:
            if (older := self._named.get(name)) is not None:
                older.replaced = True
                older.event.set()
            self._named[name] = waiter
        try:
            self._pulls[waiter] = None
            yield waiter
        finally:
            del self._pulls[waiter]
            if name is not None and self._named[name] is waiter:
                del self._named[name]
            for lane in waiter.woken:
                self.wake(lane)
            if waiter.freed:
                self._free_one()

    @contextmanager
    def job(self, job_id: str) -> Iterator[JobWaiter]:
        """Wait for the job's end."""
        waiter = JobWaiter()
        if self._closed:
            waiter.event.set()
        self._jobs.setdefault(job_id, set()).add(waiter)
        try:
            yield waiter
        finally:
            waiters = self._jobs[job_id]
            waiters.discard(waiter)
            if not waiters:
                del self._jobs[job_id]

    def committed(self, new: Iterable[Row], put: Iterable[Row]) -> None:
        """Wake whom these rows concern: a claimable job a pull that can take it, an ended lease one that waits for
        it, a finished job its own waiters."""
        nobody: set[Shape] = set()
        for row in new:
            self._claimable(row, nobody)
        for row in put:
            self._claimable(row, nobody)
            if row.kind == "job" and row.labels[0] != "running":
                self._free_one()
                if row.labels[0] not in ("pending", "quarantined"):
                    for waiter in self._jobs.get(row.id, ()):
                        waiter.row = row
                        waiter.event.set()

    def _claimable(self, row: Row, nobody: set[Shape]) -> None:
        if row.lane is None or not self._pulls:
            return
        shape = shape_of(row.lane)
        if shape not in nobody and not self.wake(row.lane):
            nobody.add(shape)

    def pass_on(self, waiter: Waiter) -> None:
        """It was woken because a lease has ended, but has no job to take: let another look."""
        waiter.freed = False
        self._free_one()

    def _free_one(self) -> None:
        self.frees += 1
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
            if len(waiter.woken) < waiter.limit and not waiter.replaced and suits(name.kind, name.needs, waiter.offer):
                waiter.woken.append(lane)
                waiter.event.set()
                return True
        return False

    def takers(self, lanes: Mapping[str, int]) -> list[Waiter]:
        """The sleeping pulls that can take what is in these lanes, first come first: enough for the jobs there are."""
        left: dict[Shape, int] = {}
        for lane, n in lanes.items():
            left[shape_of(lane)] = left.get(shape_of(lane), 0) + n
        takers = []
        for waiter in self._pulls:
            if not left:
                break
            if waiter.item is None or waiter.saturated or waiter.replaced:
                continue
            room = waiter.limit
            for kind, needs in [shape for shape in left if suits(*shape, waiter.offer)]:
                taken = min(room, left[kind, needs])
                room -= taken
                left[kind, needs] -= taken
                if not left[kind, needs]:
                    del left[kind, needs]
            if room < waiter.limit:
                takers.append(waiter)
        return takers

    def close(self) -> None:
        """Send everybody home: every waiter looks once more and answers."""
        self._closed = True
        for waiter in self._pulls:
            waiter.event.set()
        for waiters in self._jobs.values():
            for one in waiters:
                one.event.set()


Shape = tuple[str, tuple[str, ...]]
"""What decides who can take the jobs of a lane: their kind, and the capabilities they need."""


def shape_of(lane: str) -> Shape:
    """The shape of a lane's jobs."""
    name = read_lane(lane)
    return name.kind, name.needs
