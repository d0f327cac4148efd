"""What counts are kept in: the last minute by the second, a histogram's buckets, labels of which there are few."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping

from sheratan_hub.clock import Clock

OTHER = "other"
"""The label of all that came after the last one that has a label of its own."""


class Minute:
    """How often each name was counted in the last 60 seconds, to the second."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._slots: list[tuple[int, Counter[str]]] = [(-1, Counter()) for _ in range(60)]

    def add(self, name: str, n: int = 1) -> None:
        """Count `n` more of `name` now."""
        self._slot()[name] += n

    def add_all(self, tally: Mapping[str, int]) -> None:
        """Count all of these now."""
        slot = self._slot()
        for name, n in tally.items():
            slot[name] += n

    def _slot(self) -> Counter[str]:
        second = self._clock.now() // 1000
        at, tally = self._slots[second % 60]
        if at != second:
            tally = Counter()
            self._slots[second % 60] = (second, tally)
        return tally

    def totals(self) -> Counter[str]:
        """All names with their counts of the last minute."""
        since = self._clock.now() // 1000 - 60
        out: Counter[str] = Counter()
        for at, tally in self._slots:
            if at > since:
                out += tally
        return out


class Buckets:
    """A histogram: how many observations were at most each of the `bounds` (ascending), and their sum."""

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def add(self, value: float) -> None:
        """Observe one value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value


class Few:
    """Labels of which there may be many: the first `most` keep their own name, all others are `other`."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._own: set[str] = set()

    def label(self, name: str) -> str:
        """What this name is counted under."""
        if name in self._own:
            return name
        if len(self._own) >= self._most:
            return OTHER
        self._own.add(name)
        return name
