"""The hub of a crash run: when it is killed, how it starts again, what is read from it while all others are still."""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from math import inf
from random import Random
from time import monotonic
from typing import NamedTuple

from tools.crash_clients import Fleet, listens, read, read_jobs
from tools.crash_history import Life, Reading
from tools.demo import Processes, Site, start_hub

START_SECONDS = 20
STOP_SECONDS = 15
RUSH_SECONDS = 0.05


class Kill(NamedTuple):
    """When a hub is killed: so many seconds after its process was begun, or (`ready`) after it could be talked to.

    `trap`: then at the very moment at which it has acknowledged something, when that must not be lost any more.
    """

    ready: bool
    seconds: float
    trap: bool = False


class HubGone(Exception):
    """The hub ended by itself, or never became ready."""


def plan(random: Random, kills: int) -> Iterator[Kill]:
    """When to kill: under load, as soon as it listens, in the middle of its start-up; some in quick succession."""
    yield Kill(True, 0.8, trap=True)
    left = kills - 1
    while left > 0:
        dice = random.random()
        if dice < 0.12:
            burst = min(left, random.randint(2, 3))
            yield from (Kill(False, random.uniform(0.0, 0.3)) for _ in range(burst))
            left -= burst
            continue
        left -= 1
        if dice < 0.3:
            yield Kill(False, random.uniform(0.1, 0.9))
        elif dice < 0.45:
            yield Kill(True, random.uniform(0.0, 0.08))
        else:
            yield Kill(True, min(1.5, random.expovariate(1 / 0.5)), trap=random.random() < 0.6)


class Hub:
    """The hub's process of the moment, and what is done to it."""

    def __init__(self, site: Site, processes: Processes, fleet: Fleet) -> None:
        self.site, self.processes, self.fleet = site, processes, fleet
        self.lives = fleet.history.lives
        self.process: subprocess.Popen[bytes]

    async def start(self, *, alone: bool = False) -> None:
        """Begin a process on the same store and ports; clients may talk to it at once unless it is left alone."""
        self.lives.append(Life(monotonic()))
        self.process = start_hub(self.site, self.processes)
        if not alone:
            self.fleet.open.set()

    async def ready(self) -> None:
        """Wait until it can be talked to."""
        life = self.lives[-1]
        while life.ready is None:
            if self.process.poll() is not None:
                raise HubGone(f"hub {len(self.lives)} ended by itself with {self.process.returncode}")
            if monotonic() > life.began + START_SECONDS:
                raise HubGone(f"hub {len(self.lives)} is not ready after {START_SECONDS} s")
            if await listens(self.fleet):
                life.ready = monotonic()
            else:
                await asyncio.sleep(0.01)

    async def live(self, kill: Kill) -> None:
        """Let it live until it is to be killed."""
        if kill.ready:
            await self.ready()
        await asyncio.sleep(max(0.0, kill.seconds - RUSH_SECONDS))
        self.fleet.rush.set()
        await asyncio.sleep(min(kill.seconds, RUSH_SECONDS))
        if kill.trap:
            sprung = asyncio.Event()
            self.fleet.trap = partial(self.kill, sprung)
            with suppress(TimeoutError):
                await asyncio.wait_for(sprung.wait(), 1)
            self.fleet.trap = None

    def kill(self, sprung: asyncio.Event | None = None) -> None:
        """Kill it. `sprung`: a trap was set, and this is it."""
        self.fleet.trap = None
        self.lives[-1].killed_at = monotonic()
        if self.process.poll() is not None:
            raise HubGone(f"hub {len(self.lives)} ended by itself with {self.process.returncode}")
        self.process.kill()
        self.fleet.open.clear()
        self.fleet.rush.clear()
        if sprung is not None:
            sprung.set()

    async def restart(self, *, alone: bool = False) -> None:
        """Kill it if it still lives, and begin another once it is dead."""
        if self.lives[-1].killed_at == inf:
            self.kill()
        await asyncio.to_thread(self.process.wait)
        self.lives[-1].dead = monotonic()
        await self.start(alone=alone)

    async def stop(self) -> None:
        """Ask it to end, which it must do well."""
        self.process.terminate()
        try:
            status = await asyncio.to_thread(self.process.wait, STOP_SECONDS)
        except subprocess.TimeoutExpired as error:
            raise HubGone(f"it has not stopped after {STOP_SECONDS} s") from error
        if status != 0:
            raise HubGone(f"it ended with {status} when it was asked to stop")

    async def read(self, *, drained: bool) -> None:
        """Read jobs and metrics while no client talks to it. What the hub does by itself must not fall between."""
        await self.ready()
        for _ in range(50):
            before = await read(self.fleet, "/metrics?format=json")
            jobs = await read_jobs(self.fleet)
            metrics = await read(self.fleet, "/metrics?format=json")
            if all(before[name] == metrics[name] for name in ("queue_depth", "inflight_jobs", "dlq_size")):
                break
        self.fleet.history.readings.append(Reading(monotonic(), jobs, metrics, drained))
