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
from itertools import cycle, islice
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
"""For so many different sets of capabilities it is remembered which groups suit them."""

TURNS_FORESEEN = 128
"""For so many sources it is foreseen that they will be served in turn."""

GROUPS_KEPT = 64
"""So many groups may stay without a lane; beyond, one that has lost its last is forgotten."""


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

Entry = tuple[int, int, str]
"""A lane in its queue: (the source's tag, order of the first row, name)."""

Queue = SortedList[Entry]
"""Lanes of one level that counts, in the order they are to be served."""

Queues = tuple[Queue, ...]
"""One for each level."""


def _queues() -> Queues:
    return tuple(SortedList() for _ in range(LEVELS))


class Group:
    """All lanes whose jobs need the same capabilities: by kind, and from the second kind on also all in one.

    So a pull that takes any kind looks into one queue, however many kinds there are.
    """

    __slots__ = ("_all", "kinds")

    def __init__(self) -> None:
        self.kinds: dict[str, Queues] = {}
        self._all: Queues | None = None

    def add(self, kind: str, level: int, entry: Entry) -> None:
        """A lane of this kind stands on this level."""
        queues = self.kinds.get(kind)
        if queues is None:
            if self.kinds and self._all is None:
                self._all = _queues()
                for every, own in zip(self._all, *self.kinds.values(), strict=True):
                    every.update(own)
            queues = self.kinds[kind] = _queues()
        queues[level].add(entry)
        if self._all is not None:
            self._all[level].add(entry)

    def remove(self, kind: str, level: int, entry: Entry) -> None:
        """It no longer does."""
        queues = self.kinds[kind]
        queues[level].remove(entry)
        if self._all is not None:
            self._all[level].remove(entry)
        if not any(queues):
            del self.kinds[kind]
            if not self.kinds:
                self._all = None

    def suiting(self, kinds: Collection[str]) -> Iterable[Queues]:
        """The queues of these kinds; of none given, those of all."""
        if not kinds:
            return self.kinds.values() if self._all is None else (self._all,)
        if len(kinds) > len(self.kinds):
            return (queues for kind, queues in self.kinds.items() if kind in kinds)
        return (queues for kind in kinds if (queues := self.kinds.get(kind)) is not None)


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
        self._groups: dict[tuple[str, ...], Group] = {}
        self._suiting: OrderedDict[frozenset[str], dict[tuple[str, ...], Group]] = OrderedDict()
        self._firsts: dict[Offer, str | None] = {}
        """What `_first` has found since a lane moved: the pulls of a batch ask for the same one again and again."""
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

    @property
    def of_one_source(self) -> bool:
        """Whether there is one source at most, so that nobody takes turns."""
        return len(self._sources) < 2

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

    def level(self, name: str) -> int:
        """The level that counts for the lane by now, below all if there is no such lane."""
        lane = self._lanes.get(name)
        return lane.level if lane is not None else LEVELS

    def turns(self, offer: Offer, now: int) -> Iterator[str]:
        """From which lanes pulls with this offer, one after the other, will probably be served one job each."""
        yield from self.turn(offer, 1, (), now)
        firsts: dict[str, str] = {}
        for name in self.turn(offer, TURNS_FORESEEN, (), now):
            firsts.setdefault(read_lane(name).source, name)
        yield from islice(cycle(firsts.values()), 1, None)

    def _enter(self, name: str, lane: Place) -> None:
        self._firsts.clear()
        needs = lane.lane.needs
        lane.level = level_at(lane.lane.level, lane.head // PLACES, self._now, self._age_ms)
        group = self._groups.get(needs)
        if group is None:
            group = self._groups[needs] = Group()
            for capabilities, groups in self._suiting.items():
                if capabilities.issuperset(needs):
                    groups[needs] = group
        group.add(lane.lane.kind, lane.level, (lane.tag, lane.head, name))
        self._ages[lane.lane.level].add((lane.head, name))

    def _leave(self, name: str, lane: Place) -> None:
        self._firsts.clear()
        needs = lane.lane.needs
        group = self._groups[needs]
        group.remove(lane.lane.kind, lane.level, (lane.tag, lane.head, name))
        self._ages[lane.lane.level].remove((lane.head, name))
        if not group.kinds and len(self._groups) > GROUPS_KEPT:
            del self._groups[needs]
            for groups in self._suiting.values():
                groups.pop(needs, None)

    def joined_by(self, name: str, order: int) -> None:
        """A row of this order has come into the lane."""
        lane = self._lanes.get(name)
        if lane is None or order < lane.head:
            self.set(name, order)

    def serve(self, offer: Offer, names: Iterable[str]) -> None:
        """Jobs were taken from these lanes in this order by a pull with this offer: their sources had their turn."""
        if self.of_one_source:
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
            self._move(name, lane, lane.level, tag)
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
        if offer not in self._firsts:
            if len(self._firsts) >= OFFERS_MAX:
                self._firsts.clear()
            self._firsts[offer] = self._found_first(offer)
        return self._firsts[offer]

    def _found_first(self, offer: Offer) -> str | None:
        groups = self._groups_for(offer)
        if len(groups) == 1:
            for group in groups.values():
                if len(group.kinds) == 1:
                    for queues in group.suiting(offer.kinds):
                        return next((queue[0][2] for queue in queues if queue), None)
        return None

    def _by_level(
        self, offer: Offer, used_up: Collection[str], now: int, closed: Callable[[str], object] | None
    ) -> Iterator[Iterator[str]]:
        self._rise(now)
        suiting = list(self._queues_for(offer, closed))
        for level in range(LEVELS):
            queues = [queue for all_levels in suiting if (queue := all_levels[level])]
            if queues:
                merged: Iterable[Entry] = queues[0] if len(queues) == 1 else _merged(queues)
                yield (name for _, _, name in merged if name not in used_up)

    def _queues_for(self, offer: Offer, closed: Callable[[str], object] | None) -> Iterator[Queues]:
        """The queues that hold this offer's lanes and no others: as few as there are, unless kinds are closed."""
        for group in self._groups_for(offer).values():
            if closed is None:
                yield from group.suiting(offer.kinds)
            else:
                kinds = [kind for kind in offer.kinds or group.kinds if not closed(kind)]
                yield from group.suiting(kinds) if kinds else ()

    def _groups_for(self, offer: Offer) -> dict[tuple[str, ...], Group]:
        groups = self._suiting.get(offer.capabilities)
        if groups is None:
            groups = {needs: group for needs, group in self._groups.items() if offer.capabilities.issuperset(needs)}
            self._suiting[offer.capabilities] = groups
            if len(self._suiting) > OFFERS_MAX:
                self._suiting.popitem(last=False)
        return groups

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
                    for _, name in list(ages.irange((since, ""), (until, ""), (True, False))):
                        self._lift(name, level - step)

    def _lift(self, name: str, level: int) -> None:
        lane = self._lanes[name]
        self._move(name, lane, level, lane.tag)
        lane.level = level

    def _move(self, name: str, lane: Place, level: int, tag: int) -> None:
        """To this level, with this tag; the lane itself is told by who calls."""
        self._firsts.clear()
        group, kind = self._groups[lane.lane.needs], lane.lane.kind
        group.add(kind, level, (tag, lane.head, name))
        group.remove(kind, lane.level, (lane.tag, lane.head, name))

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
