"""How a hub is doing, as one snapshot from a few requests: what `sheratan-hub top` shows. Rates come from counters."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import msgspec
from prometheus_client.parser import text_string_to_metric_families

from sheratan_hub.answers import Node, NodePage
from sheratan_hub.client import HubClient, HubRefused, HubUnreachable
from sheratan_hub.clock import Clock, rfc3339
from sheratan_hub.transport import Plane

PRIORITIES = ("CRITICAL", "HIGH", "NORMAL", "LOW")
STATUSES = ("pending", "running", "completed", "failed", "cancelled", "quarantined")
STATES = ("ONLINE", "STALE", "DEAD")

RATES = {
    "submitted": "job.submitted",
    "leased": "job.leased",
    "completed": "job.completed",
    "failed": "job.failed",
    "retried": "job.retry",
    "lost": "job.lost",
}
"""What is shown a second, and the event that is counted for it."""

STARTED = ("process_start_time_seconds", "")
"""Another one means that the counters began anew."""

NODES_ASKED, ALERTS_ASKED = 100, 5

NONSENSE = (ValueError, LookupError, TypeError, AttributeError, msgspec.DecodeError)
"""What comes of answers that no hub gives: those of a proxy, or half an answer."""

Samples = Mapping[tuple[str, str], float]
"""A metric's value by its name and its one label's value (or none)."""


class Snapshot(msgspec.Struct, frozen=True, kw_only=True):
    """How the hub was at `ts`. What it did not tell is None; `away` is why it told nothing and all else is older."""

    ts: str
    version: str | None = None
    away: str | None = None
    health: dict[str, str | None] = {}
    """Of each plane: `ok`, or the checks that fail; None if it tells its own machine only."""
    nodes: dict[str, int] = {}
    jobs: dict[str, int] = {}
    ready: dict[str, int | None] = {}
    """Jobs that could be leased now, by priority."""
    oldest_seconds: dict[str, float | None] = {}
    """How long the oldest of them waits."""
    rates: dict[str, float | None] = {}
    """A second, since the snapshot before; None without one, or when the hub was started anew in between."""
    commands_per_second: float | None = None
    commands_waiting: int | None = None
    connections: int | None = None
    long_polls: int | None = None
    node_list: list[Node] | None = None
    """The first hundred, those that need a look first; None if the token may not see them."""
    alerts: list[dict[str, Any]] | None = None
    """The last few, the newest last."""


class Sampler:
    """Takes snapshots of one hub. Raises `HubUnreachable` and `HubRefused` as its client does."""

    def __init__(self, hub: HubClient, clock: Clock) -> None:
        self._hub, self._clock = hub, clock
        self._before: tuple[int, Samples] | None = None

    async def sample(self) -> Snapshot:
        """How it is now."""
        try:
            return await self._sample()
        except NONSENSE as error:
            raise HubUnreachable(f"what answers there does not answer as a hub: {error}") from None

    async def _sample(self) -> Snapshot:
        control, data, well, data_well, nodes, alerts = await asyncio.gather(
            self._hub.text("control", "/metrics"),
            self._hub.text("data", "/metrics"),
            self._health("control"),
            self._health("data"),
            self._nodes(),
            self._alerts(),
        )
        now, samples = self._clock.now(), {**read_samples(control), **read_samples(data)}
        before, self._before = self._before, (now, samples)
        per_second = PerSecond(now, samples, before)
        return Snapshot(
            ts=rfc3339(now),
            version=well.get("version"),
            health={"control": _verdict(well), "data": _verdict(data_well) if data_well else None},
            nodes={state: int(samples.get(("sheratan_nodes", state), 0)) for state in STATES},
            jobs={status: int(samples.get(("sheratan_jobs", status), 0)) for status in STATUSES},
            ready={name: _whole(samples.get(("sheratan_ready_jobs", name))) for name in PRIORITIES},
            oldest_seconds={name: samples.get(("sheratan_oldest_wait_seconds", name)) for name in PRIORITIES},
            rates={name: per_second.of("sheratan_events_total", event) for name, event in RATES.items()},
            commands_per_second=per_second.of("sheratan_commands_total", ""),
            commands_waiting=_whole(samples.get(("sheratan_commands_waiting", ""))),
            connections=sum(_whole(samples.get(("sheratan_connections", plane))) or 0 for plane in ("control", "data")),
            long_polls=_whole(samples.get(("sheratan_long_polls", ""))),
            node_list=nodes,
            alerts=alerts,
        )

    async def _health(self, plane: Plane) -> dict[str, Any]:
        """What /health tells; nothing if it is told to the hub's own machine only."""
        try:
            found: dict[str, Any] = await self._hub.call(plane, "GET", "/health")
        except HubRefused as no:
            if no.code != "loopback_only":
                raise
            return {}
        return found

    async def _nodes(self) -> list[Node] | None:
        found = await self._allowed("control", f"/api/hosts?limit={NODES_ASKED}")
        if found is None:
            return None
        return sorted(msgspec.convert(found, NodePage).nodes, key=_concern)

    async def _alerts(self) -> list[dict[str, Any]] | None:
        found = await self._allowed("control", f"/api/alerts?last={ALERTS_ASKED}")
        return None if found is None else list(found["alerts"])

    async def _allowed(self, plane: Plane, path: str) -> Any:
        """The answer, None where this token's role has not the right."""
        try:
            return await self._hub.call(plane, "GET", path)
        except HubRefused as no:
            if no.code != "forbidden_role":
                raise
            return None


class PerSecond:
    """Rates between two times (ms) at which counters were read."""

    def __init__(self, now: int, samples: Samples, before: tuple[int, Samples] | None) -> None:
        self._samples, self._before = samples, before
        self._seconds = (now - before[0]) / 1000 if before is not None else 0

    def of(self, name: str, label: str) -> float | None:
        """How much a counter grew in a second; one that is not there has counted nothing yet."""
        if self._before is None or self._seconds <= 0 or self._samples.get(STARTED) != self._before[1].get(STARTED):
            return None
        grown = self._samples.get((name, label), 0) - self._before[1].get((name, label), 0)
        return None if grown < 0 else round(grown / self._seconds, 1)


def read_samples(text: str) -> Samples:
    """The samples of a Prometheus text that have no label, or one. Those of a plane are told by it."""
    found: dict[tuple[str, str], float] = {}
    for family in text_string_to_metric_families(text):
        if family.name.startswith("sheratan_") or family.name == STARTED[0]:
            for sample in family.samples:
                if len(sample.labels) <= 1:
                    found[sample.name, next(iter(sample.labels.values()), "")] = sample.value
    return found


def _verdict(health: Mapping[str, Any]) -> str:
    failing = [name for name, good in dict(health.get("checks") or {}).items() if not good]
    return f"not {', '.join(failing)}" if failing else str(health.get("status"))


def _concern(node: Node) -> tuple[int, str]:
    """Those that need a look come first."""
    well = node.status == "ONLINE" and node.health in (None, "GREEN") and not node.draining
    return (3 if well else {"STALE": 0, "DEAD": 2}.get(node.status, 1)), node.node_id


def _whole(value: float | None) -> int | None:
    return None if value is None else int(value)
