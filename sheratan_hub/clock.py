"""The only module that knows time, sleep and randomness. Everything else is told.

`SystemClock` is the real one, `VirtualClock` the one of tests and simulations.
"""

from __future__ import annotations

import asyncio
import heapq
import random
import secrets
import time
from collections.abc import Awaitable
from datetime import UTC, datetime
from typing import Protocol


class Clock(Protocol):
    """Time in integer milliseconds, waiting, and random values."""

    def now(self) -> int:
        """Milliseconds since 1970, UTC. Never goes back while the process runs."""
        ...

    async def sleep(self, ms: float) -> None:
        """Return after `ms` milliseconds."""
        ...

    async def wait(self, event: Awaitable[object], ms: float) -> bool:
        """Await `event`, at most `ms` milliseconds; whether it happened. A future given is not cancelled."""
        ...

    def job_id(self) -> str:
        """A new id that sorts after every earlier one of this process: a UUIDv7 (RFC 9562)."""
        ...

    def secret(self) -> str:
        """An unguessable text of 32 hex digits (128 bits)."""
        ...

    def jitter(self) -> float:
        """A random number from 0 up to 1."""
        ...


class SystemClock:
    """The machine's time: wall time at the start plus monotonic time since, so a clock that is set moves nothing."""

    def __init__(self) -> None:
        self._offset_ns = time.time_ns() - time.monotonic_ns()
        self._last_id = 0

    def now(self) -> int:
        """See `Clock.now`."""
        return (self._offset_ns + time.monotonic_ns()) // 1_000_000

    async def sleep(self, ms: float) -> None:
        """See `Clock.sleep`."""
        await asyncio.sleep(ms / 1000)

    async def wait(self, event: Awaitable[object], ms: float) -> bool:
        """See `Clock.wait`."""
        try:
            async with asyncio.timeout(ms / 1000):
                await (asyncio.shield(event) if isinstance(event, asyncio.Future) else event)
        except TimeoutError:
            return False
        return True

    def job_id(self) -> str:
        """See `Clock.job_id`."""
        self._last_id = next_uuid7(self.now(), self._last_id, random.getrandbits(80))
        return uuid_text(self._last_id)

    def secret(self) -> str:
        """See `Clock.secret`."""
        return secrets.token_hex(16)

    def jitter(self) -> float:
        """See `Clock.jitter`."""
        return random.random()


class VirtualClock:
    """Time that stands still until `advance` moves it; ids and secrets count up. For tests and simulations."""

    def __init__(self, start_ms: int = 1_700_000_000_000, seed: int = 1) -> None:
        self._now = start_ms
        self._random = random.Random(seed)
        self._sleepers: list[tuple[int, int, asyncio.Future[None]]] = []
        self._count = 0
        self._last_id = 0

    def now(self) -> int:
        """See `Clock.now`."""
        return self._now

    async def sleep(self, ms: float) -> None:
        """See `Clock.sleep`; ends when `advance` has moved the time that far."""
        self._count += 1
        waiter = asyncio.get_running_loop().create_future()
        heapq.heappush(self._sleepers, (self._now + int(ms), self._count, waiter))
        await waiter

    async def wait(self, event: Awaitable[object], ms: float) -> bool:
        """See `Clock.wait`."""
        future = asyncio.ensure_future(event)
        sleeper = asyncio.ensure_future(self.sleep(ms))
        try:
            await asyncio.wait({future, sleeper}, return_when=asyncio.FIRST_COMPLETED)
            return future.done()
        finally:
            sleeper.cancel()
            if future is not event:
                future.cancel()

    async def advance(self, ms: int) -> None:
        """Move the time on by `ms`, waking every sleeper at its own moment and letting all tasks run."""
        end = self._now + ms
        await settle()
        while self._sleepers and self._sleepers[0][0] <= end:
            due, _, waiter = heapq.heappop(self._sleepers)
            self._now = max(self._now, due)
            if not waiter.done():
                waiter.set_result(None)
            await settle()
        self._now = end
        await settle()

    def job_id(self) -> str:
        """See `Clock.job_id`."""
        self._last_id = next_uuid7(self._now, self._last_id, int.from_bytes(self._random.randbytes(10), "big"))
        return uuid_text(self._last_id)

    def secret(self) -> str:
        """See `Clock.secret`, but the same at every run."""
        return self._random.randbytes(16).hex()

    def jitter(self) -> float:
        """See `Clock.jitter`, but the same at every run."""
        return self._random.random()


async def settle(turns: int = 50) -> None:
    """Let every task that can go on do so, for up to `turns` turns of the event loop."""
    for _ in range(turns):
        await asyncio.sleep(0)


def next_uuid7(now_ms: int, last: int, noise: int) -> int:
    """The UUIDv7 for `now_ms` with 80 bits of `noise`, but always above `last` (RFC 9562, method 1 and 3).

    The 74 random bits hold `noise`; when the clock stands still or went back, `last` counts on by a small step.
    """
    high, low = noise >> 68, noise & ((1 << 62) - 1)
    fresh = (now_ms << 80) | (0x7 << 76) | (high << 64) | (0b10 << 62) | low
    if fresh > last:
        return fresh
    step = 1 + (noise & 0xFFFF_FFFF)
    low = (last & ((1 << 62) - 1)) + step
    if low < 1 << 62:
        return (last >> 62 << 62) | low
    return ((last >> 80) + 1 << 80) | (0x7 << 76) | (0b10 << 62) | step


def uuid_text(value: int) -> str:
    """A 128-bit number in the usual form of a UUID."""
    text = value.to_bytes(16, "big").hex()
    return f"{text[:8]}-{text[8:12]}-{text[12:16]}-{text[16:20]}-{text[20:]}"


def rfc3339(ms: int) -> str:
    """Milliseconds since 1970 as RFC 3339 UTC with `Z` and three decimals."""
    moment = datetime.fromtimestamp(ms // 1000, UTC)
    return f"{moment:%Y-%m-%dT%H:%M:%S}.{ms % 1000:03d}Z"
