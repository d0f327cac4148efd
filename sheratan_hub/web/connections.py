"""The connections of one listener: how many there may be, and which have been silent, dripping or stuck for too long.

aiohttp has no such deadline. Nothing is done here for a request: one look a second notes in what state each connection
is and since when. A connection whose request is being answered, a long poll above all, is never cut.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Literal, Protocol

import msgspec

LOOK_MS = 1000
PROGRESS_BYTES = 8192
"""So much a client must take of its answer in the time it has."""

Why = Literal["header", "idle", "send", "full", "address"]
"""Why a connection was cut: its request's head did not come, nobody asked again, its answer is not taken; too many."""


class Bounds(msgspec.Struct, frozen=True):
    """Times in ms; `most` connections in all and `per_address`, 0: without limit."""

    header_ms: int = 10_000
    send_ms: int = 10_000
    idle_ms: int = 75_000
    most: int = 0
    per_address: int = 0


class Connection(Protocol):
    """What is asked of a connection."""

    @property
    def wire(self) -> asyncio.Transport:
        """Its transport."""
        ...

    @property
    def busy(self) -> bool:
        """Whether a request of it is being answered."""
        ...

    @property
    def asked(self) -> int:
        """How many requests have come."""
        ...

    @property
    def begun(self) -> bool:
        """Whether a part of the next request's head has come."""
        ...


class Seen(msgspec.Struct):
    """In what state a connection was seen, since when (ms), and how many bytes of answers it had yet to take."""

    address: str | None
    state: tuple[int, bool, bool] = (-1, False, False)
    since: int = 0
    unsent: int = 0


class Connections:
    """Those of one listener. `cut` counts, by why."""

    def __init__(self, bounds: Bounds) -> None:
        self.bounds = bounds
        self.cut: Counter[Why] = Counter()
        self._seen: dict[Connection, Seen] = {}
        self._silent: dict[str | None, dict[Connection, None]] = {}
        self._of: Counter[str] = Counter()
        self._new: dict[Connection, None] = {}

    def __len__(self) -> int:
        return len(self._seen)

    def came(self, one: Connection, address: str | None) -> None:
        """A connection was made; `address` is None where it does not count. One too many costs one.

        The oldest that has never asked anything goes first, so that silent ones cannot keep others out.
        """
        self._seen[one] = Seen(address)
        self._new[one] = None
        if address is not None:
            self._of[address] += 1
            self._silent.setdefault(address, {})[one] = None
            if 0 < self.bounds.per_address < self._of[address]:
                self._drop(next(iter(self._silent[address])), "address")
                return
        if 0 < self.bounds.most < len(self._seen):
            self._drop(next(iter(self._new)), "full")

    def asks(self, one: Connection) -> None:
        """Its first request has come."""
        self._new.pop(one, None)
        seen = self._seen.get(one)
        if seen is not None and seen.address is not None:
            self._silent.get(seen.address, {}).pop(one, None)

    def gone(self, one: Connection) -> None:
        """It is closed."""
        self.asks(one)
        seen = self._seen.pop(one, None)
        if seen is None or seen.address is None:
            return
        self._of[seen.address] -= 1
        if not self._of[seen.address]:
            del self._of[seen.address]
            self._silent.pop(seen.address, None)

    def look(self, now: int) -> None:
        """Cut those whose time is over."""
        late = [(one, why) for one, seen in self._seen.items() if (why := self._why(one, seen, now)) is not None]
        for one, why in late:
            self._drop(one, why)

    def _drop(self, one: Connection, why: Why) -> None:
        self.cut[why] += 1
        self.gone(one)
        one.wire.abort()

    def _why(self, one: Connection, seen: Seen, now: int) -> Why | None:
        unsent = one.wire.get_write_buffer_size()
        state = (one.asked, one.busy, one.begun)
        if unsent:
            if not seen.unsent or unsent + PROGRESS_BYTES <= seen.unsent or (state != seen.state and one.busy):
                seen.unsent, seen.since, seen.state = unsent, now, state
            return "send" if now - seen.since >= self.bounds.send_ms else None
        if state != seen.state or seen.unsent:
            seen.unsent, seen.since, seen.state = 0, now, state
            return None
        if one.busy:
            return None
        waits_for_head = one.begun or not one.asked
        most = self.bounds.header_ms if waits_for_head else self.bounds.idle_ms
        if now - seen.since < most:
            return None
        return "header" if waits_for_head else "idle"
