"""What `/metrics` answers: gathers, for one plane, what was counted, timed and looked at, and writes it down.

Nothing is counted here and nothing changes by it. Of the store only kept counters are read, and one row; never a list,
but for the nodes of a fleet no larger than `[metrics] max_node_series`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, Protocol

from sheratan_hub import __version__
from sheratan_hub.audit import Audit
from sheratan_hub.hub import Hub
from sheratan_hub.keyring import Keyring
from sheratan_hub.loops import Loop
from sheratan_hub.metrics.counting import Metrics
from sheratan_hub.metrics.fleet_json import fleet_json, unread
from sheratan_hub.metrics.looking import Looks
from sheratan_hub.metrics.table import (
    ATTESTATIONS,
    FAMILIES,
    HEALTHS,
    JOB_STATUSES,
    NODE_STATES,
    PRIORITIES,
    Family,
    plane_of_event,
)
from sheratan_hub.metrics.tally import Buckets
from sheratan_hub.metrics.timing import Lag, TimedStore
from sheratan_hub.metrics.writing import Labels, as_metric, encoder, of_buckets
from sheratan_hub.rules.command import Refused
from sheratan_hub.rules.nodes import node_of
from sheratan_hub.rules.silence import FLEET, fleet_of

PROMISES_MS = {"HIGH": 60_000, "NORMAL": 300_000}
"""How long a job of this priority waits at most, when there is enough capacity."""

Values = dict[str, dict[Labels, float]]
"""Of each metric, the value of each series, by the values of its labels."""


class Sockets(Protocol):
    """The connections of a plane: how many are open, how many were cut, by why, and the `bounds` they have."""

    cut: Any
    bounds: Any

    def __len__(self) -> int: ...


class Stored(NamedTuple):
    """What a scrape has read of the store: counters, whether the fleet is silent, nodes with series of their own.

    Of a node: whether it is ONLINE, and when it was heard of (seconds since 1970).
    """

    counts: Mapping[str, int]
    silent: bool
    nodes: Mapping[str, tuple[bool, float]]


class Telling:
    """Tells what `metrics` and its sources have, one plane at a time."""

    def __init__(
        self,
        metrics: Metrics,
        hub: Hub,
        timed: TimedStore,
        lag: Lag,
        looks: Looks,
        audit: Audit,
        keyring: Keyring,
        *,
        store: str,
        max_node_series: int = 0,
    ) -> None:
        """`store` is the scheme of the store's URL."""
        self._metrics, self._hub, self._timed, self._lag, self._looks = metrics, hub, timed, lag, looks
        self._audit, self._keyring, self._store, self._most_nodes = audit, keyring, store, max_node_series
        self._sockets: dict[str, Sockets] = {}
        self._loops: list[Loop] = []

    def watch(self, plane: str, sockets: Sockets) -> None:
        """Tell of the connections of a plane."""
        self._sockets[plane] = sockets

    def watch_loops(self, loops: Iterable[Loop]) -> None:
        """Tell of the failures of these background loops."""
        self._loops += loops

    async def json(self, plane: str) -> dict[str, Any]:
        """The fleet's JSON of a plane. Refused with `unavailable` when the store is down."""
        self._metrics.fold()
        return fleet_json(plane, await self._hub.counts(), self._metrics.minute.totals())

    async def text(self, plane: str, accept: str = "") -> tuple[bytes, str]:
        """A plane's metrics in the format that the header Accept names, and its Content-Type.

        When the store is down it is said so, and what only the store knows is left out.
        """
        encode, kind = encoder(accept)
        values = self.values(plane, await self._read())
        families = [as_metric(family, values.get(family.name, {})) for family in of_plane(plane)]
        families += [of_buckets(family, self._buckets(family)) for family in of_plane(plane, histograms=True)]
        return await asyncio.to_thread(encode, families), kind

    async def _read(self) -> Stored | None:
        """What is asked of the store; None if it is down."""
        hub = self._hub
        try:
            counts = await hub.counts() | await hub.counts("claimable:") | await hub.counts("nodes:")
            rows = await hub.fetch([FLEET])
            silent = fleet_of(rows[0] if rows else None).braked(hub.clock.now())
            known = sum(counts.get(f"node:{state}", 0) for state in NODE_STATES)
            page = await hub.page("node", limit=self._most_nodes) if 0 < known <= self._most_nodes else None
        except Refused:
            return None
        nodes = [node_of(row) for row in page.rows] if page else []
        return Stored(counts, silent, {one.id: (hub.state_of(one) == "ONLINE", one.last_seen / 1000) for one in nodes})

    def values(self, plane: str, stored: Stored | None) -> Values:
        """The value of every series of a plane, but for histograms."""
        metrics = self._metrics
        values: Values = {name: dict(counted) for name, counted in metrics.counts.items()}
        values["sheratan_events_total"] = {
            (name,): n
            for name, n in metrics.events.items()
            if plane_of_event(name) == plane and not name.startswith("refused.")
        }
        values["sheratan_build_info"] = {(__version__, self._store): 1}
        for name in ("sheratan_http_requests_total", "sheratan_refusals_total"):
            values[name] = {labels: n for labels, n in values[name].items() if labels[0] == plane}
        values.update(self._of_sockets(plane))
        if plane == "control":
            values.update(self._of_hub(stored is not None))
            values.update(self._of_store())
            values.update(self._of_tokens())
            values.update(self._of_audit())
            values.update(_of_nodes(stored) if stored is not None else {})
        else:
            values.update(self._of_waiting())
            values.update(_of_jobs(stored.counts) if stored is not None else {})
        return values

    def _of_sockets(self, plane: str) -> Values:
        sockets = self._sockets.get(plane)
        known = {labels: n for labels, n in self._metrics.counts[CUT].items() if labels[0] == plane}
        if sockets is None:
            return {CUT: dict(known)}
        return {
            "sheratan_connections": {(plane,): len(sockets)},
            "sheratan_connections_limit": {(plane,): sockets.bounds.most},
            CUT: {**known, **{(plane, str(why)): n for why, n in sockets.cut.items()}},
        }

    def _of_hub(self, readable: bool) -> Values:
        committer = self._hub.committer
        return {
            "sheratan_policy_version": one(self._hub.judge.version),
            "sheratan_commands_waiting": one(committer.waiting),
            "sheratan_commands_waiting_limit": one(self._hub.max_waiting),
            "sheratan_commit_failures_total": {(reason,): n for reason, n in self._timed.failures.items()},
            "sheratan_loop_errors_total": {(loop.name,): loop.errors for loop in self._loops},
            "sheratan_store_up": one(readable and not committer.failing),
        }

    def _of_store(self) -> Values:
        disk = self._looks.disk
        if disk is None:
            return {}
        return {
            "sheratan_store_size_bytes": one(disk.size),
            "sheratan_store_wal_bytes": one(disk.wal),
            "sheratan_store_disk_free_bytes": one(disk.free),
            "sheratan_store_disk_size_bytes": one(disk.total),
        }

    def _of_tokens(self) -> Values:
        ring = self._keyring.ring
        turning = ring is not None and ring.next is not None
        values = {
            "sheratan_token_rotation_active": one(turning),
            "sheratan_token_rotation_stragglers": one(self._looks.stragglers if turning else 0),
        }
        if ring is not None and turning and ring.until:
            left = max(0, ring.until - self._hub.clock.now()) / 1000
            values["sheratan_token_rotation_remaining_seconds"] = one(left)
        return values

    def _of_audit(self) -> Values:
        file = self._audit.file
        return {
            "sheratan_audit_lines_total": one(file.head.seq),
            "sheratan_audit_write_failures_total": one(file.failures),
            "sheratan_audit_lost_lines_total": one(file.lost),
            "sheratan_audit_queue_lines": one(file.waiting),
            "sheratan_audit_writable": one(file.trouble is None),
            "sheratan_alerts_total": {(rule,): n for rule, n in list(self._looks.alerts.raised.items())},
        }

    def _of_waiting(self) -> Values:
        """Who waits, and for how long: read off the heads of the lanes (design rule 6)."""
        hub, now = self._hub, self._hub.clock.now()
        lanes, limits = hub.committer.lanes, hub.limits
        since = {name: lanes.oldest(level) for level, name in enumerate(PRIORITIES)}
        return {
            "sheratan_queue_depth_limit": one(limits.max_depth),
            "sheratan_leases_limit": one(limits.max_inflight),
            "sheratan_oldest_wait_seconds": {
                (name,): 0 if at is None else max(0, now - at) / 1000 for name, at in since.items()
            },
            "sheratan_promises_missed": {
                (name,): lanes.late(PRIORITIES.index(name), now - ms) for name, ms in PROMISES_MS.items()
            },
            "sheratan_waiting_pulls": one(hub.waiting.pulls),
            "sheratan_long_polls": one(len(hub.waiting)),
            "sheratan_throttled_sources": one(len(hub.throttled)),
            "sheratan_pauses": one(len(hub.pauses())),
            "sheratan_dead_letters_over_limit": one(hub.keeping.over),
        }

    def _buckets(self, family: Family) -> dict[Labels, Buckets]:
        """The histogram's series."""
        metrics = self._metrics
        match family.name:
            case "sheratan_commit_batch_commands":
                return {(): metrics.batches}
            case "sheratan_commit_seconds":
                return {(): self._timed.commits}
            case "sheratan_sync_seconds":
                return {(): self._timed.syncs}
            case "sheratan_event_loop_lag_seconds":
                return {(): self._lag.seen}
            case "sheratan_job_wait_seconds":
                return {(kind,): took.wait for kind, took in metrics.took.items()}
            case "sheratan_job_run_seconds":
                return {(kind,): took.run for kind, took in metrics.took.items()}
            case "sheratan_job_end_to_end_seconds":
                return {(kind,): took.end_to_end for kind, took in metrics.took.items()}
        raise KeyError(family.name)


CUT = "sheratan_connections_cut_total"


def one(value: float) -> dict[Labels, float]:
    """The value of a metric without labels."""
    return {(): value}


def _of_nodes(stored: Stored) -> Values:
    counts = stored.counts
    return {
        "sheratan_nodes": {(state,): counts.get(f"node:{state}", 0) for state in NODE_STATES},
        "sheratan_node_health": {(health,): counts.get(f"nodes:{health}", 0) for health in HEALTHS},
        "sheratan_nodes_draining": one(counts.get("nodes:draining", 0)),
        "sheratan_node_attestations": {(status,): counts.get(f"attestation:{status}", 0) for status in ATTESTATIONS},
        "sheratan_node_up": {(node_id,): up for node_id, (up, _) in stored.nodes.items()},
        "sheratan_node_last_heartbeat_timestamp_seconds": {(node_id,): at for node_id, (_, at) in stored.nodes.items()},
        "sheratan_fleet_silent": one(stored.silent),
    }


def _of_jobs(counts: Mapping[str, int]) -> Values:
    return {
        "sheratan_jobs": {(status,): counts.get(f"job:{status}", 0) for status in JOB_STATUSES},
        "sheratan_ready_jobs": {(name,): counts.get(f"claimable:{level}", 0) for level, name in enumerate(PRIORITIES)},
        "sheratan_leases": one(counts.get("job:running", 0)),
        "sheratan_pending_processing": one(unread(counts)),
        "sheratan_idempotency_keys": one(counts.get("key", 0)),
    }


def of_plane(plane: str, *, histograms: bool = False) -> list[Family]:
    """The families that a plane serves, all but histograms or these."""
    mine = (family for family in FAMILIES if family.plane in (plane, "both"))
    return [family for family in mine if (family.type == "histogram") == histograms]
