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

SECRETS = 64
"""So many secrets are drawn from the system at once. A process that forks must not use its clock on both sides."""


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
        self._ids = Ids()
        self._secrets: list[str] = []

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
        return self._ids.next(self.now(), random.getrandbits(80))

    def secret(self) -> str:
        """See `Clock.secret`. Drawn from the system many at a time: a call there lets other threads in between."""
        if not self._secrets:
            drawn = secrets.token_hex(16 * SECRETS)
            self._secrets = [drawn[at : at + 32] for at in range(0, len(drawn), 32)]
        return self._secrets.pop()

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
        self._ids = Ids()

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
            if self._wake(self._sleepers[0][0]):
                await settle()
        self._now = end
        await settle()

    def _wake(self, due: int) -> int:
        """Wake all whose time this is; how many still slept."""
        woken = 0
        while self._sleepers and self._sleepers[0][0] <= due:
            waiter = heapq.heappop(self._sleepers)[2]
            if not waiter.done():
                self._now = max(self._now, due)
                waiter.set_result(None)
                woken += 1
        return woken

    def job_id(self) -> str:
        """See `Clock.job_id`."""
        return self._ids.next(self._now, self._random.getrandbits(80))

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


class Ids:
    """Makes UUIDv7 texts, each above the one before (RFC 9562, section 6.2, methods 1 and 2).

    The first of a millisecond has 73 random bits; those that follow in it, or while the clock stands still or goes
    back, count its last 48 bits on by random steps. A count that runs over moves on to the next millisecond.
    """

    def __init__(self) -> None:
        self._ms = -1
        self._low = 0
        self._start = ""

    def next(self, now_ms: int, noise: int) -> str:
        """The next id at `now_ms`; `noise` are 80 random bits."""
        if now_ms > self._ms:
            self._begin(now_ms, noise)
        else:
            self._low += 1 + (noise & 0xFFFF_FFFF)
            if self._low >> 48:
                self._begin(self._ms + 1, noise)
        return f"{self._start}{self._low:012x}"

    def _begin(self, ms: int, noise: int) -> None:
        self._ms, self._low = ms, noise & 0x7FFF_FFFF_FFFF
        stamp = f"{ms:012x}"
        high, variant = noise >> 48 & 0xFFF, 0x8000 | noise >> 60 & 0x3FFF
        self._start = f"{stamp[:8]}-{stamp[8:]}-7{high:03x}-{variant:04x}-"


def rfc3339(ms: int) -> str:
    """Milliseconds since 1970 as RFC 3339 UTC with `Z` and three decimals."""
    moment = datetime.fromtimestamp(ms // 1000, UTC)
    return f"{moment:%Y-%m-%dT%H:%M:%S}.{ms % 1000:03d}Z"


def monotonic_us() -> int:
    """The machine's monotonic clock in microseconds, as service managers read it."""
    return time.monotonic_ns() // 1000


def stopwatch() -> float:
    """Seconds of a clock that never goes back, to measure how long something took. Nothing is decided by it."""
    return time.perf_counter()
