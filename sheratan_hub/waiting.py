"""Long polls: who waits for which work, or for the end of which job, and who is woken by what was committed.

Each waiting pull is a bid: a job goes to the node with the most free capacity among those that can take it, to the
one that waits longest among equals (design rule 11).

Longer than 300 lines because who waits in which way has to be seen together: no wake may be lost between them.
"""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import msgspec
from sortedcontainers import SortedList

from sheratan_hub.items import Item, Outcome
from sheratan_hub.rules.lanes import Offer, Shape, read_lane, suits
from sheratan_hub.rules.nodes import node_of
from sheratan_hub.rules.policies import node_ask
from sheratan_hub.rules.policy import Ask
from sheratan_hub.rules.view import leases_by_node
from sheratan_hub.storage import Changes, Row

Good = Callable[[], bool] | None
"""Whether the token of one who waits is still in force; None: there is none."""


class Waiter:
    """One waiting pull: what it can take, and an event that is set when it should look again.

    `woken` holds the lanes it was woken for and has not used; `saturated`, that it waits for a lease to end; `full`,
    that it waits for one of its own node; `freed`, that it was woken because one has ended. `item` is its pull while
    it sleeps; `served`, once that is decided in the batch that makes a job for it, will hold the outcome (cancelled:
    it must look itself). `dismissed`: the same pull has come again, so that nobody reads this one's answer any more,
    or its token has ended: `good` tells whether that is still in force.
    `free` is what it bids, `ended` counts the ends of its node's leases, `place` is where it stands in line.
    `follows`: it offers what its node's heartbeats say. `bars` tells of a lane whether the policy keeps its jobs from
    it, as long as its node is what was `asked` about.
    """

    __slots__ = (
        *("ended", "event", "free", "freed", "full", "item", "limit", "node", "offer"),
        *("asked", "bars", "dismissed", "follows", "good", "place", "saturated", "served", "woken"),
    )

    def __init__(self, offer: Offer, limit: int, node: str, place: int) -> None:
        self.offer = offer
        self.limit = limit
        self.node = node
        self.event = asyncio.Event()
        self.woken: list[str] = []
        self.follows = False
        self.saturated = False
        self.full = False
        self.freed = False
        self.item: Item | None = None
        self.served: asyncio.Future[list[Outcome]] | None = None
        self.dismissed = False
        self.good: Good = None
        self.free = limit
        self.ended = 0
        self.bars: Callable[[str], bool] | None = None
        self.asked: Ask | None = None
        self.place: Place = (-limit, place, self)

    def serve(self, limit: int) -> Item:
        """Its pull, for so many jobs, to be decided now; only while it sleeps."""
        item, self.item = self.item, None
        assert item is not None  # noqa: S101
        if limit < self.limit:
            item.commands = [msgspec.structs.replace(item.commands[-1], limit=limit)]  # type: ignore[type-var]
        item.future = self.served = asyncio.get_running_loop().create_future()
        item.begun = True
        item.future.add_done_callback(lambda _: self.event.set())
        return item

    def looked(self, found: int, reason: str | None, wakes: int) -> list[str]:
        """It has looked. Its first `wakes` wakes are used up by what it found, or all if there was no job for it.

        The lanes of these are returned: somebody else may find one there, unless nobody may lease from them now.
        Wakes that it could not use (the limit is reached, its node is stale) go to others when it leaves.
        """
        nothing = reason in ("no_job", "paused", "throttled")
        used = wakes if nothing else min(found, wakes)
        if reason == "node_full":
            used = len(self.woken)  # it looks by itself once a lease of its node has ended
        lanes = self.woken[:used] if reason in ("no_job", "node_full") else []
        del self.woken[:used]
        self.saturated, self.full = reason == "inflight_limit", reason == "node_full"
        if found or self.saturated:
            self.freed = False
        return lanes

    def rouse(self) -> None:
        """It is about to look again, so wakes count for it: what was known of its node's room is old."""
        self.event.clear()
        self.full = False

    def could_take(self, shape: Shape) -> bool:
        """Whether it can take a job of this shape, and its answer would be read."""
        return not self.dismissed and suits(*shape, self.offer)

    def dismiss(self) -> None:
        """Send it home without a job."""
        self.dismissed = True
        self.event.set()


Place = tuple[int, int, Waiter]
"""Where a waiter stands: most free capacity first (negated), then first come."""


class JobWaiter:
    """One who waits for a job's end: an event that is set then, and the row as it was committed."""

    __slots__ = ("event", "good", "row")

    def __init__(self, good: Good) -> None:
        self.event = asyncio.Event()
        self.good = good
        self.row: Row | None = None


Mark = tuple[int, int, int]
"""How many leases had ended when a pull began to look: in all, of sources, of its node."""


class Waiting:
    """All waiting pulls: as many are woken as there are jobs for, the best bid first; and the jobs' own waiters."""

    def __init__(self) -> None:
        self._line: SortedList[Place] = SortedList()
        self._thirsty: SortedList[Place] = SortedList()
        self._came = 0
        self._nodes: dict[str, dict[Waiter, None]] = {}
        self._jobs: dict[str, set[JobWaiter]] = {}
        self._named: dict[tuple[str, str], Waiter] = {}
        self._closed = False
        self._frees = self._frees_of_sources = 0
        self.open: Callable[[str], bool] = lambda _: True
        """Whether jobs of a lane can be leased at all now; else nobody is woken for them."""

    def __len__(self) -> int:
        return len(self._line) + sum(map(len, self._jobs.values()))

    @property
    def pulls(self) -> int:
        """How many pulls wait."""
        return len(self._line)

    @property
    def nodes(self) -> Iterable[str]:
        """The nodes whose pulls wait."""
        return self._nodes

    def offers(self, node: str) -> tuple[Offer, ...]:
        """What the node's waiting pulls ask for, each once."""
        return tuple(dict.fromkeys(one.offer for one in self._nodes.get(node, ()) if not one.dismissed))

    @property
    def thirsty(self) -> int:
        """How many pulls wait for a lease to end because of the inflight limit."""
        return len(self._thirsty)

    @property
    def closed(self) -> bool:
        """Whether everybody was sent home."""
        return self._closed

    @contextmanager
    def pull(self, offer: Offer, limit: int, node: str, name: tuple[str, str] | None = None) -> Iterator[Waiter]:
        """Stand in line from before the first look until the last; a wake that came to nothing is passed on.

        Of two with one `name` (node and pull_id) the older is sent home: its client has asked again.
        """
        self._came += 1
        waiter = Waiter(offer, limit, node, self._came)
        if self._closed:
            waiter.event.set()
        if name is not None:
            if (older := self._named.get(name)) is not None:
                older.dismiss()
            self._named[name] = waiter
        try:
            self._line.add(waiter.place)
            self._nodes.setdefault(node, {})[waiter] = None
            yield waiter
        finally:
            self._depart(waiter)
            if name is not None and self._named.get(name) is waiter:
                del self._named[name]
            for lane in waiter.woken:
                self.wake(lane)
            if waiter.freed:
                self._free_one()

    def _depart(self, waiter: Waiter) -> None:
        self._line.remove(waiter.place)
        self._thirsty.discard(waiter.place)
        del waiter.place  # which holds the waiter: left so, only the collector of cycles would find it, and the request
        others = self._nodes[waiter.node]
        del others[waiter]
        if not others:
            del self._nodes[waiter.node]

    @contextmanager
    def job(self, job_id: str, good: Good = None) -> Iterator[JobWaiter]:
        """Wait for the job's end."""
        waiter = JobWaiter(good)
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

    def mark(self, waiter: Waiter) -> Mark:
        """Taken before a look, for `looked`."""
        return self._frees, self._frees_of_sources, waiter.ended

    def looked(self, waiter: Waiter, found: int, reason: str | None, free: int, wakes: int, mark: Mark) -> list[str]:
        """It has looked, and bids what it has `free`; see `Waiter.looked`. What ended while it looked is not missed."""
        lanes = waiter.looked(found, reason, wakes)
        if not found:
            waiter.free = free
        self._place(waiter)
        missed = (
            (waiter.saturated and self._frees != mark[0])
            or (reason == "throttled" and self._frees_of_sources != mark[1])
            or (waiter.full and waiter.ended != mark[2])
        )
        if missed:
            waiter.event.set()
        return lanes

    def _place(self, waiter: Waiter) -> None:
        """Put it where its bid belongs: what it has free, less what it was woken for."""
        bid = len(waiter.woken) - waiter.free
        if bid != waiter.place[0]:
            self._line.remove(waiter.place)
            self._thirsty.discard(waiter.place)
            waiter.place = (bid, waiter.place[1], waiter)
            self._line.add(waiter.place)
        if waiter.saturated and waiter.place not in self._thirsty:
            self._thirsty.add(waiter.place)
        elif not waiter.saturated:
            self._thirsty.discard(waiter.place)

    def committed(self, changes: Changes) -> None:
        """Wake whom these rows concern: a claimable job a pull that can take it, an ended lease one that waits for
        it, a finished job its own waiters, a node its own pulls."""
        nobody: set[Shape] = set()
        for row in changes.new:
            self._claimable(row, nobody)
            if row.kind == "node" and row.id in self._nodes:
                self._heard(row)
        for row in changes.put:
            self._claimable(row, nobody)
            if row.kind == "job" and row.labels[0] != "running":
                self._ended(row)
            elif row.kind == "node" and row.id in self._nodes:
                self._heard(row)
        for key in changes.gone:
            if key.kind == "node" and key.id in self._nodes:
                self._look_again(key.id)
        for node, more in leases_by_node(changes.counts):  # a lease that has ended may be another node's by now
            if more < 0 and node in self._nodes:
                for waiter in self._nodes[node]:
                    waiter.ended += 1
                self._look_again(node)

    def _ended(self, row: Row) -> None:
        self._free_one()
        if row.labels[2] is not None:
            self._frees_of_sources += 1
        if row.labels[0] not in ("pending", "quarantined"):
            for waiting in self._jobs.get(row.id, ()):
                waiting.row = row
                waiting.event.set()

    def _heard(self, row: Row) -> None:
        """A node's row was written: what limits it may have changed, what it can do, or what the policy says of it."""
        self._look_again(row.id)
        concerned = [waiter for waiter in self._nodes[row.id] if waiter.follows or waiter.asked]
        if concerned:
            node = node_of(row)
            capabilities, ask = frozenset(node.capabilities), node_ask("pull", node.id, node)
            for waiter in concerned:
                offers_other = waiter.follows and waiter.offer.capabilities != capabilities
                if offers_other or waiter.asked not in (None, ask):
                    waiter.event.set()

    def _look_again(self, node: str) -> None:
        """A node's room, or what limits it, has changed."""
        for waiter in self._nodes[node]:
            if waiter.full:
                waiter.event.set()

    def _claimable(self, row: Row, nobody: set[Shape]) -> None:
        if row.lane is None or not self._line:
            return
        shape = shape_of(row.lane)
        if shape not in nobody and not self.wake(row.lane):
            nobody.add(shape)

    def pass_on(self, waiter: Waiter) -> None:
        """It was woken because a lease has ended, but has no job to take: let another look."""
        waiter.freed = False
        self._free_one()

    def _free_one(self) -> None:
        self._frees += 1
        if self._thirsty:
            _, _, waiter = self._thirsty.pop(0)
            waiter.saturated, waiter.freed = False, True
            waiter.event.set()

    def wake(self, lane: str) -> bool:
        """Wake the best bid among those that can take a job of this lane and were not woken for enough yet."""
        if not self._line or not self.open(lane):
            return False
        shape = shape_of(lane)
        for _, _, waiter in self._line:
            barred = waiter.bars is not None and waiter.bars(lane)
            if len(waiter.woken) < waiter.limit and not waiter.full and waiter.could_take(shape) and not barred:
                waiter.woken.append(lane)
                waiter.event.set()
                self._place(waiter)
                return True
        return False

    def wake_all(self) -> None:
        """Let everybody look again: what kept them from work has changed."""
        for _, _, waiter in self._line:
            waiter.event.set()

    def review(self) -> None:
        """Tokens have changed: send home whose token is no longer in force."""
        for _, _, waiter in self._line:
            if waiter.good is not None and not waiter.good():
                waiter.dismiss()
        for one in (one for waiters in self._jobs.values() for one in waiters):
            if one.good is not None and not one.good():
                one.event.set()

    def takers(self, lanes: Mapping[str, int]) -> list[tuple[Waiter, int]]:
        """The sleeping pulls that get the jobs in these lanes, and how many each: one by one to the best bid."""
        left: dict[Shape, int] = {}
        for lane, n in lanes.items():
            if self.open(lane):
                left[shape_of(lane)] = left.get(shape_of(lane), 0) + n
        given: dict[Waiter, int] = {}
        for shape, n in left.items():
            self._deal(shape, n, given)
        return list(given.items())

    def _deal(self, shape: Shape, n: int, given: dict[Waiter, int]) -> None:
        """Give `n` more jobs; `given` is what each has so far, which lowers its bid."""
        again = [bid(waiter, had) for waiter, had in given.items() if had < waiter.limit and waiter.could_take(shape)]
        heapq.heapify(again)
        line = (
            place
            for place in self._line
            if (one := place[2]).item is not None and not one.saturated and one not in given and one.could_take(shape)
        )
        first = next(line, None)
        for _ in range(n):
            if first is not None and (not again or first < again[0]):
                waiter, first = first[2], next(line, None)
            elif again:
                waiter = heapq.heappop(again)[2]
            else:
                return
            given[waiter] = given.get(waiter, 0) + 1
            if given[waiter] < waiter.limit:
                heapq.heappush(again, bid(waiter, given[waiter]))

    def close(self) -> None:
        """Send everybody home: every waiter looks once more and answers."""
        self._closed = True
        self.wake_all()
        for waiters in self._jobs.values():
            for one in waiters:
                one.event.set()


def bid(waiter: Waiter, given: int) -> Place:
    """Where it stands once it was given so many jobs more."""
    return waiter.place[0] + given, waiter.place[1], waiter


def shape_of(lane: str) -> Shape:
    """The shape of a lane's jobs."""
    name = read_lane(lane)
    return name.kind, name.needs
