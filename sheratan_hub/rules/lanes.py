"""Which lanes a pull looks into: capability first, then level, then the oldest head.

A lane is every waiting job nobody can tell apart except by age; its name is the JSON array
`[level, kind, source, [needs...]]`. `Lanes` is the hub's directory of those that are not empty.
"""

from __future__ import annotations

import heapq
from collections.abc import Collection, Iterable, Iterator
from functools import lru_cache
from itertools import islice
from typing import NamedTuple

import msgspec
import orjson
from sortedcontainers import SortedList


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


class Lanes:
    """The directory of lanes that may hold a job, with the order of each one's head.

    It may name a lane that has just been emptied (who finds it empty chooses again), never the reverse.
    """

    def __init__(self, heads: dict[str, int] | None = None) -> None:
        self._heads: dict[str, int] = {}
        self._shapes: dict[tuple[str, tuple[str, ...]], SortedList[tuple[int, int, str]]] = {}
        for name, head in (heads or {}).items():
            self.set(name, head)

    def __len__(self) -> int:
        return len(self._heads)

    def __contains__(self, name: str) -> bool:
        return name in self._heads

    def set(self, name: str, head: int | None) -> None:
        """The lane's first row has this order now; None: it is empty."""
        lane = read_lane(name)
        shape = (lane.kind, lane.needs)
        before = self._heads.pop(name, None)
        if before is not None:
            self._shapes[shape].remove((lane.level, before, name))
        if head is not None:
            self._heads[name] = head
            self._shapes.setdefault(shape, SortedList()).add((lane.level, head, name))
        elif shape in self._shapes and not self._shapes[shape]:
            del self._shapes[shape]

    def joined_by(self, name: str, order: int) -> None:
        """A row of this order has come into the lane."""
        head = self._heads.get(name)
        if head is None or order < head:
            self.set(name, order)

    def choose(self, offer: Offer, limit: int, used_up: Collection[str] = ()) -> list[str]:
        """The first `limit` lanes for this offer in the order they are to be served, without those used up."""
        return list(islice(self._in_order(offer, used_up), limit))

    def _in_order(self, offer: Offer, used_up: Collection[str]) -> Iterator[str]:
        suiting = [lanes for (kind, needs), lanes in self._shapes.items() if suits(kind, needs, offer)]
        merged: Iterable[tuple[int, int, str]] = suiting[0] if len(suiting) == 1 else heapq.merge(*suiting)
        return (name for _, _, name in merged if name not in used_up)


_decode = msgspec.json.Decoder(Lane).decode
