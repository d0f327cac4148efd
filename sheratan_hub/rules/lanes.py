"""Which lanes a pull looks into: capability first, then level with ageing, then the source whose turn it is (rule 6).

A lane is every waiting job nobody can tell apart except by age; its name is the JSON array
`[level, kind, source, [needs...]]`. `Lanes` is the hub's directory of those that are not empty.

Longer than 300 lines because all of the directory's indexes change together.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator
from functools import lru_cache
from itertools import islice
from typing import NamedTuple

import msgspec
import orjson
from sortedcontainers import SortedList

LEVELS = 4
"""CRITICAL, HIGH, NORMAL, LOW. Ageing lifts the last two, up to HIGH."""

PLACES = 1024
"""Places in line that a millisecond has: a row's `order` is its time in ms times this, and a count."""

CHARGED_MAX = 16
"""So many lanes of a source go back in line with one turn: a bound on what a turn costs."""

OFFERS_MAX = 256
"""For so many different offers it is remembered which shapes suit them."""


class Lane(NamedTuple):
    """A lane's name, read: level 0 (CRITICAL) to 3 (LOW), kind, source, needed capabilities (sorted)."""

    level: int
    kind: str
    source: str
    needs: tuple[str, ...]


class Offer(NamedTuple):
    """What a pull can take: its capabilities, and the kinds it asks for (empty: any)."""

    capabilities: frozenset[str]
    kinds: frozenset[str]


@lru_cache(4096)
def lane_name(level: int, kind: str, source: str, needs: tuple[str, ...]) -> str:
    """The lane of such a job."""
    return orjson.dumps((level, kind, source, needs)).decode()


@lru_cache(4096)
def read_lane(name: str) -> Lane:
    """The inverse of `lane_name`."""
    return _decode(name)


def suits(kind: str, needs: Collection[str], offer: Offer) -> bool:
    """Whether jobs of this kind and these needs may go to this offer: the one predicate of leasing."""
    return (not offer.kinds or kind in offer.kinds) and offer.capabilities.issuperset(needs)


def level_at(level: int, since: int, now: int, age_ms: int) -> int:
    """The level that counts for a job waiting since then: one higher each `age_ms` (0: never), not into CRITICAL."""
    if level <= 1 or not age_ms or now <= since:
        return level
    return max(1, level - (now - since) // age_ms)


Shape = tuple[str, tuple[str, ...]]
"""What decides who can take a lane's jobs: their kind, and the capabilities they need."""

Queue = SortedList[tuple[int, int, str]]
"""Lanes of one shape and level that counts: (the source's tag, order of the first row, name)."""


class Place:
    """A lane of the directory: where it stands. `level` is the one that counts by now.

    `sure`: its first row has the order `head`; else that is, or was, an earlier one's.
    """

    __slots__ = ("head", "lane", "level", "sure", "tag")

    def __init__(self, lane: Lane) -> None:
        self.lane = lane
        self.head = self.level = self.tag = 0
        self.sure = True


class Lanes:
    """The directory of lanes that may hold a job, with the order of each one's head.

    It may name a lane that has just been emptied (who finds it empty chooses again), never the reverse.

    Sources take turns: each lane carries its source's tag, the smallest goes first, and a turn gives the source the
    largest tag in all lanes that the same pull could have taken. Who comes back after idling gets a tag of now.
    Lanes rise as their heads age, each once a level, when somebody chooses after that time: nothing is scanned.
    """

    def __init__(self, heads: dict[str, int] | None = None, age_ms: int = 60_000) -> None:
        self._age_ms = age_ms
        self._now = 0
        self._turn = 0
        self._lanes: dict[str, Place] = {}
        self._sources: dict[str, dict[str, None]] = {}
        self._benched: set[str] = set()
        self._benched_shapes: dict[Shape, int] = {}
        self._taken_in: set[str] = set()
        self._doubtful: list[str] = []
        self._shapes: dict[Shape, tuple[Queue, ...]] = {}
        self._suiting: OrderedDict[Offer, dict[Shape, tuple[Queue, ...]]] = OrderedDict()
        self._ages: tuple[SortedList[tuple[int, str]], ...] = tuple(SortedList() for _ in range(LEVELS))
        for name, head in (heads or {}).items():
            self.set(name, head)

    def __len__(self) -> int:
        return len(self._lanes)

    def __iter__(self) -> Iterator[str]:
        return iter(self._lanes)

    def __contains__(self, name: str) -> bool:
        return name in self._lanes

    @property
    def benched(self) -> Collection[str]:
        """The sources that are left out for now: they have used up their concurrency."""
        return self._benched

    def set(self, name: str, head: int | None, *, sure: bool = True) -> None:
        """The lane's first row has this order now, or (not `sure`) comes after this; None: it is empty."""
        lane = self._lanes.get(name)
        if head is None:
            if lane is not None:
                self._forget(name, lane)
            return
        if lane is None:
            lane = self._lanes[name] = Place(read_lane(name))
            own = self._sources.setdefault(lane.lane.source, {})
            if own:
                self._doubtful += [other for other in islice(own, CHARGED_MAX) if not self._lanes[other].sure]
            lane.tag = max((self._lanes[other].tag for other in islice(own, CHARGED_MAX)), default=2 * self._turn)
            own[name] = None
            if lane.lane.source in self._benched:
                self._bench_shape(lane, 1)
        elif lane.head == head:
            lane.sure = sure
            return
        elif lane.lane.source not in self._benched:
            self._leave(name, lane)
        lane.head, lane.sure = head, sure
        if lane.lane.source not in self._benched:
            self._enter(name, lane)

    def _forget(self, name: str, lane: Place) -> None:
        source = lane.lane.source
        del self._lanes[name], self._sources[source][name]
        if not self._sources[source]:
            del self._sources[source]
        if source not in self._benched:
            self._leave(name, lane)
        else:
            self._bench_shape(lane, -1)

    def _bench_shape(self, lane: Place, n: int) -> None:
        shape = lane.lane.kind, lane.lane.needs
        self._benched_shapes[shape] = self._benched_shapes.get(shape, 0) + n
        if not self._benched_shapes[shape]:
            del self._benched_shapes[shape]

    def has_benched(self, offer: Offer) -> bool:
        """Whether a source that is left out has a job for this offer."""
        return any(suits(*shape, offer) for shape in self._benched_shapes)

    def has_others(self, name: str) -> bool:
        """Whether the lane's source has other lanes, too: then it matters how old the first row is that is left."""
        lane = self._lanes.get(name)
        return lane is not None and len(self._sources[lane.lane.source]) > 1

    def doubtful(self) -> list[str]:
        """Lanes whose source has got another, and whose first row's order is to be read, as it matters now."""
        doubtful, self._doubtful = self._doubtful, []
        return [name for name in doubtful if name in self._lanes]

    def head(self, name: str) -> int:
        """The order of the lane's first row, 0 if it is not known."""
        lane = self._lanes.get(name)
        return lane.head if lane is not None else 0

    def _enter(self, name: str, lane: Place) -> None:
        kind, needs = shape = lane.lane.kind, lane.lane.needs
        lane.level = level_at(lane.lane.level, lane.head // PLACES, self._now, self._age_ms)
        queues = self._shapes.get(shape)
        if queues is None:
            queues = self._shapes[shape] = tuple(SortedList() for _ in range(LEVELS))
            for offer, shapes in self._suiting.items():
                if suits(kind, needs, offer):
                    shapes[shape] = queues
        queues[lane.level].add((lane.tag, lane.head, name))
        self._ages[lane.lane.level].add((lane.head, name))

    def _leave(self, name: str, lane: Place) -> None:
        shape = lane.lane.kind, lane.lane.needs
        queues = self._shapes[shape]
        queues[lane.level].remove((lane.tag, lane.head, name))
        self._ages[lane.lane.level].remove((lane.head, name))
        if not any(queues):
            del self._shapes[shape]
            for shapes in self._suiting.values():
                shapes.pop(shape, None)

    def joined_by(self, name: str, order: int) -> None:
        """A row of this order has come into the lane."""
        lane = self._lanes.get(name)
        if lane is None or order < lane.head:
            self.set(name, order)

    def serve(self, offer: Offer, names: Iterable[str]) -> None:
        """Jobs were taken from these lanes in this order by a pull with this offer: their sources had their turn."""
        if len(self._sources) < 2:
            return
        last: dict[str, str] = {}
        for name in names:
            source = read_lane(name).source
            last.pop(source, None)
            last[source] = name
        for source, name in last.items():
            self._turn += 1
            for own in (name, *islice(self._sources.get(source, ()), CHARGED_MAX)):
                self._charge(own, offer)

    def _charge(self, name: str, offer: Offer) -> None:
        lane, tag = self._lanes.get(name), 2 * self._turn + 1
        if lane is None or lane.tag == tag or not suits(lane.lane.kind, lane.lane.needs, offer):
            return
        if lane.lane.source not in self._benched:
            queue = self._shapes[lane.lane.kind, lane.lane.needs][lane.level]
            queue.remove((lane.tag, lane.head, name))
            queue.add((tag, lane.head, name))
        lane.tag = tag

    def bench(self, source: str) -> None:
        """Leave this source's lanes out until `unbench`: it is throttled (rule 10)."""
        if source not in self._benched:
            for name in self._sources.get(source, ()):
                self._leave(name, self._lanes[name])
                self._bench_shape(self._lanes[name], 1)
            self._benched.add(source)

    def unbench(self, source: str) -> None:
        """Take this source's lanes in again, as if they had just come."""
        if source not in self._benched:
            return
        self._benched.discard(source)
        self._taken_in.add(source)
        for name in self._sources.get(source, ()):
            lane = self._lanes[name]
            lane.tag = max(lane.tag, 2 * self._turn)
            self._bench_shape(lane, -1)
            self._enter(name, lane)

    def taken_in(self) -> frozenset[str]:
        """The sources that were taken in since the last call."""
        sources = frozenset(self._taken_in)
        self._taken_in.clear()
        return sources

    def of_source(self, source: str) -> list[str]:
        """The source's lanes."""
        return list(self._sources.get(source, ()))

    def choose(
        self,
        offer: Offer,
        limit: int,
        used_up: Collection[str] = (),
        now: int = 0,
        closed: Callable[[str], object] | None = None,
    ) -> list[str]:
        """The first `limit` lanes for this offer in the order they are to be served, without those used up.

        Kinds for which `closed` is true are left out.
        """
        out: list[str] = []
        for level in self._by_level(offer, used_up, now, closed):
            out += islice(level, limit - len(out))
            if len(out) >= limit:
                break
        return out

    def turn(
        self,
        offer: Offer,
        limit: int,
        used_up: Collection[str] = (),
        now: int = 0,
        closed: Callable[[str], object] | None = None,
    ) -> list[str]:
        """As `choose`, but only lanes of the first level that has any: their sources take turns.

        A source's own lanes come oldest first, whatever their tags; they may be more than `limit`, but not for one.
        """
        if limit == 1 and closed is None and (first := self._first(offer, now)) is not None and first not in used_up:
            return [first]
        for level in self._by_level(offer, used_up, now, closed):
            if found := list(islice(level, limit)):
                return self._oldest_first(found, offer, limit, used_up, closed)
        return []

    def _oldest_first(
        self,
        found: list[str],
        offer: Offer,
        limit: int,
        used_up: Collection[str],
        closed: Callable[[str], object] | None,
    ) -> list[str]:
        """The chosen lanes by source, in the order of their turn, with those of the same level that stand behind."""
        level, out = self._lanes[found[0]].level, list[str]()
        for source in dict.fromkeys(self._lanes[name].lane.source for name in found):
            if len(self._sources[source]) == 1:
                out += self._sources[source]
                continue
            own = {name for name in found if self._lanes[name].lane.source == source}
            for name in islice(self._sources[source], CHARGED_MAX):
                lane = self._lanes[name]
                kind = lane.lane.kind
                fits = lane.level == level and suits(kind, lane.lane.needs, offer)
                if fits and name not in used_up and (closed is None or not closed(kind)):
                    own.add(name)
            out += sorted(own, key=self._place_of)
        return out[:1] if limit == 1 else out

    def _place_of(self, name: str) -> tuple[int, str]:
        return self._lanes[name].head, name

    def _first(self, offer: Offer, now: int) -> str | None:
        """The very first lane, where one shape only suits: the plain case, and the quick way."""
        self._rise(now)
        shapes = self._shapes_for(offer)
        if len(shapes) == 1:
            for queues in shapes.values():
                for queue in queues:
                    if queue:
                        return queue[0][2]
        return None

    def _by_level(
        self, offer: Offer, used_up: Collection[str], now: int, closed: Callable[[str], object] | None
    ) -> Iterator[Iterator[str]]:
        self._rise(now)
        shapes = self._shapes_for(offer)
        suiting = [queues for (kind, _), queues in shapes.items() if closed is None or not closed(kind)]
        for level in range(LEVELS):
            queues = [queue for all_levels in suiting if (queue := all_levels[level])]
            if queues:
                merged: Iterable[tuple[int, int, str]] = queues[0] if len(queues) == 1 else _merged(queues)
                yield (name for _, _, name in merged if name not in used_up)

    def _shapes_for(self, offer: Offer) -> dict[Shape, tuple[Queue, ...]]:
        shapes = self._suiting.get(offer)
        if shapes is None:
            shapes = {shape: queues for shape, queues in self._shapes.items() if suits(*shape, offer)}
            self._suiting[offer] = shapes
            if len(self._suiting) > OFFERS_MAX:
                self._suiting.popitem(last=False)
        return shapes

    def _rise(self, now: int) -> None:
        """Lift the lanes whose heads have grown old enough since the last look."""
        before = self._now
        if now <= before:
            return
        self._now = now
        if not self._age_ms:
            return
        for level in range(2, LEVELS):
            ages = self._ages[level]
            for step in range(1, level):
                until = (now - step * self._age_ms + 1) * PLACES
                if ages and ages[0][0] < until:
                    since = (before - step * self._age_ms + 1) * PLACES
                    for head, name in list(ages.irange((since, ""), (until, ""), (True, False))):
                        self._lift(name, head, level - step)

    def _lift(self, name: str, head: int, level: int) -> None:
        lane = self._lanes[name]
        queues = self._shapes[lane.lane.kind, lane.lane.needs]
        queues[lane.level].remove((lane.tag, head, name))
        queues[level].add((lane.tag, head, name))
        lane.level = level

    def oldest(self, level: int) -> int | None:
        """Since when (ms) the first job of this submitted level waits; None: no lane of it may be chosen."""
        ages = self._ages[level]
        return ages[0][0] // PLACES if ages else None

    def late(self, level: int, before: int) -> int:
        """How many lanes of this submitted level have a first job that waits since before this time (ms)."""
        return self._ages[level].bisect_left((before * PLACES, ""))


def _merged(queues: list[Queue]) -> Iterator[tuple[int, int, str]]:
    """The entries of several queues in order; the first is found without building a heap, as it is often enough."""
    first = min(queue[0] for queue in queues)
    yield first
    yield from islice(heapq.merge(*queues), 1, None)


_decode = msgspec.json.Decoder(Lane).decode
