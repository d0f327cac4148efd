"""What watching a hub costs: `python -m tools.operating_bench [--store file] [--jobs 1000000] [--nodes 10000]`.

First what metrics add to a durable submit: their part by itself, in CPU time, as a share of the CPU time that a hub
spends on one (64 connections). Then a hub with so many jobs queued and so many nodes: how long a scrape of each plane
takes, how long a bundle (it rests between its slices), and how much slower submits are while one is made, in windows
that alternate with windows without. The cores are shared by hub and load.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from sheratan_hub.clock import SystemClock
from sheratan_hub.items import Committed, Happened, Origin
from sheratan_hub.metrics import Metrics
from sheratan_hub.rules.command import Event
from sheratan_hub.storage import Changes
from tools.governance_bench import BATCH, CONNECTIONS, Served, Wire, microseconds, request, served, submits

BULK = 1000
SCRAPES = 20
WINDOWS = 5
WINDOW_SECONDS = 3.0


def part_of_metrics() -> float:
    """CPU microseconds that metrics take for one submit: its request, its token, its share of a batch of 64."""
    metrics = Metrics(SystemClock())
    origin = Origin("data", "127.0.0.1", "/api/jobs", None, "/api/jobs")
    events = [Event(1, "job.submitted", "client", f"j{n}", meta={"kind": "work"}) for n in range(BATCH)]
    batch = Committed([Happened([event], origin) for event in events], Changes(), BATCH)

    def request_told() -> None:
        metrics.accepted("active")
        metrics.answered("data", "/api/jobs", 201)

    return microseconds(lambda: metrics.committed(batch)) / BATCH + microseconds(request_told)


async def fill(hub: Served, jobs: int, nodes: int) -> None:
    """Queue the jobs, and make the nodes ONLINE."""
    entry = {"kind": "work", "params": {"text": "x" * 180}}
    data = request(hub.token, "/api/jobs", {"jobs": [entry] * BULK})
    await each(hub.data, [data] * (jobs // BULK), 4)
    await beat(hub, nodes)


async def beat(hub: Served, nodes: int) -> None:
    """A heartbeat of each node, so that none is STALE when the looks begin."""
    beats = [
        request(hub.token, "/api/hosts/heartbeat", {"node_id": f"node-{n:05}", "capabilities": ["cpu"]})
        for n in range(nodes)
    ]
    await each(hub.control, beats, CONNECTIONS)


async def each(port: int, requests: list[bytes], connections: int) -> None:
    """Send all of them, over so many connections."""

    async def go(place: int) -> None:
        wire = await Wire(port).open()
        for data in requests[place::connections]:
            await wire.ask(data)

    await asyncio.gather(*(go(place) for place in range(connections)))


def get(hub: Served, path: str) -> bytes:
    """A request without a body."""
    head = f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {hub.token}\r\n\r\n"
    return head.encode()


async def timed(wire: Wire, data: bytes, times: int) -> tuple[float, int]:
    """(the median in milliseconds, the bytes of an answer)"""
    took, size = [], 0
    for _ in range(times):
        began = time.monotonic()
        size = len(await wire.ask(data))
        took.append((time.monotonic() - began) * 1000)
    return statistics.median(took), size


async def scrapes(hub: Served) -> None:
    """Print how long scrapes of both planes take."""
    for plane, port in (("control", hub.control), ("data", hub.data)):
        wire = await Wire(port).open()
        for path in ("/metrics", "/metrics?format=json"):
            ms, size = await timed(wire, get(hub, path), SCRAPES)
            print(f"  scrape of {plane} {path:22} {ms:7.1f} ms  {size} bytes")


async def bundles(hub: Served) -> None:
    """Print how long a bundle takes, and the rate of submits while bundles are made against without."""
    wire = await Wire(hub.control).open()
    ms, size = await timed(wire, get(hub, "/api/bundle"), 3)
    print(f"  a bundle                         {ms:7.1f} ms  {size} bytes")
    rates: dict[bool, list[float]] = {True: [], False: []}
    for window in range(2 * WINDOWS):
        making = asyncio.create_task(wire.ask(get(hub, "/api/bundle"))) if window % 2 else None
        count, _ = await submits(hub, min(WINDOW_SECONDS, ms / 1000 - 1.5))
        rates[making is not None].append(count)
        if making is not None:
            await making
    ratios = [one / other for one, other in zip(rates[True], rates[False], strict=True)]
    print(f"  submits while a bundle is made   {statistics.median(ratios):7.2f} of their rate without")


async def watched(hub: Served, jobs: int, nodes: int) -> None:
    """All that is asked of a full hub."""
    await fill(hub, jobs, nodes)
    await beat(hub, nodes)
    await scrapes(hub)
    await bundles(hub)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--store", choices=["sqlite", "file", "memory"], default="sqlite")
    parser.add_argument("--jobs", type=int, default=1_000_000)
    parser.add_argument("--nodes", type=int, default=10_000)
    given = parser.parse_args()
    cost = part_of_metrics()
    with served(given.store) as hub:
        count, cpu = asyncio.run(submits(hub, 10))
    whole = cpu / count * 1e6
    print(f"a durable submit on {given.store}: {whole:.1f} CPU µs of the hub ({count} of them)")
    print(f"  metrics, at most 8 % wanted      {cost:7.2f} µs  {100 * cost / whole:.1f} %")
    with served(given.store) as hub:
        print(f"{given.jobs} jobs, {given.nodes} nodes, on {given.store}")
        asyncio.run(watched(hub, given.jobs, given.nodes))


if __name__ == "__main__":
    main()
