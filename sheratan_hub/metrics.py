"""Counts what is committed, by batch; renders it for Prometheus and as the fleet's JSON."""

from __future__ import annotations

from collections import Counter as Tally
from collections.abc import Mapping
from typing import Any, Protocol

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    GCCollector,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    disable_created_metrics,
)

from sheratan_hub import __version__
from sheratan_hub.clock import Clock
from sheratan_hub.items import Committed
from sheratan_hub.rules.lanes import Lanes

AUTH_REASONS = {
    "refused.missing_token": "missing_token",
    "refused.invalid_token": "invalid_token",
    "refused.forbidden_role": "invalid_token",
    "refused.forbidden_node": "invalid_token",
    "refused.old_token": "old_token",
    "refused.expired_token": "old_token",
}
"""The `reason` that each refusal of a token is audited and counted with."""

AUTH_SLOTS = ("active", "next", "access")

NODE_STATES = ("ONLINE", "STALE", "DEAD")
JOB_STATUSES = ("pending", "running", "completed", "failed", "cancelled", "quarantined")

LATE = frozenset({"job.superseded", "job.judged"})
DIVERGED = {True: "true", False: "false", None: "unknown"}


PRIORITIES = ("CRITICAL", "HIGH", "NORMAL", "LOW")
PROMISES_MS = {"HIGH": 60_000, "NORMAL": 300_000}
"""How long a job of this priority waits at most, when there is enough capacity."""
ATTESTATIONS = ("OK", "DRIFT", "SPOOF_SUSPECT", "MISSING")


class Sockets(Protocol):
    """The connections of a plane: how many are open, and how many were cut since they were last counted, by why."""

    cut: Any

    def __len__(self) -> int: ...


class Minute:
    """How often each name was counted in the last 60 seconds, to the second."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._slots: list[tuple[int, Tally[str]]] = [(-1, Tally()) for _ in range(60)]

    def add(self, name: str, n: int = 1) -> None:
        """Count `n` more of `name` now."""
        second = self._clock.now() // 1000
        at, tally = self._slots[second % 60]
        if at != second:
            tally = Tally()
            self._slots[second % 60] = (second, tally)
        tally[name] += n

    def totals(self) -> Tally[str]:
        """All names with their counts of the last minute."""
        since = self._clock.now() // 1000 - 60
        out: Tally[str] = Tally()
        for at, tally in self._slots:
            if at > since:
                out += tally
        return out


class Metrics:
    """One registry for the process; every metric's name begins with `sheratan_`."""

    def __init__(self, clock: Clock) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = CollectorRegistry()
        self.minute = Minute(clock)
        for collector in (ProcessCollector, PlatformCollector, GCCollector):
            collector(registry=self.registry)
        self._events = self._counter("sheratan_events", "Things that happened, by event.", "event")
        self._refusals = self._counter("sheratan_refusals", "Requests refused, by code.", "code")
        self._requests = self._counter(
            "sheratan_http_requests", "Requests answered, by plane, route and status.", "plane", "route", "status"
        )
        self._accepted = self._counter("sheratan_auth_accepted", "Requests with a valid token, by slot.", "slot")
        self._denied = self._counter("sheratan_auth_failures", "Requests whose token was refused, by reason.", "reason")
        self._accepted_now = dict.fromkeys(AUTH_SLOTS, 0)
        self._by_event: dict[str, Counter] = {}
        self._answered: dict[tuple[str, str, int], Counter] = {}
        self._commands = self._counter("sheratan_commands", "Commands committed.")
        self._superseded = self._counter(
            "sheratan_superseded_results", "Late results kept as evidence, by whether they differ.", "diverged"
        )
        self._batches = Histogram(
            "sheratan_commit_batch_commands",
            "Commands that shared one transaction.",
            buckets=(1, 2, 4, 8, 16, 32, 64, 128, 256, 512),
            registry=self.registry,
        )
        self._jobs = self._gauge("sheratan_jobs", "Jobs in the store, by status.", "status")
        self._nodes = self._gauge("sheratan_nodes", "Nodes, by state.", "state")
        self._attested = self._gauge("sheratan_node_attestations", "Nodes, by what they attest.", "status")
        self._keys = self._gauge("sheratan_idempotency_keys", "Idempotency keys in the store.")
        self._polls = self._gauge("sheratan_long_polls", "Requests that wait for work or for a job's end.")
        self._waiting = self._gauge("sheratan_commands_waiting", "Commands waiting for a transaction.")
        self._dead = self._counter("sheratan_dead_letters", "Jobs that failed for good, by reason.", "reason")
        self._pruned = self._counter("sheratan_pruned_jobs", "Finished jobs forgotten by age, by status.", "status")
        self._over = self._gauge("sheratan_dead_letters_over_limit", "1 while there are more than dlq.max_items.")
        self._unread = self._gauge("sheratan_pending_processing", "Completed jobs whose result nobody has read yet.")
        self._missed = self._gauge(
            "sheratan_promises_missed", "Lanes whose first job waits longer than its priority promises.", "priority"
        )
        self._oldest = self._gauge("sheratan_oldest_wait_seconds", "How long the oldest job waits.", "priority")
        self._open = self._gauge("sheratan_connections", "Open connections, by plane.", "plane")
        self._cut = self._counter("sheratan_connections_cut", "Connections cut by the hub, by why.", "plane", "reason")
        self._watched: dict[str, Sockets] = {}
        build = self._gauge("sheratan_build_info", "The running version.", "version")
        build.labels(__version__).set(1)

    def watch(self, plane: str, sockets: Sockets) -> None:
        """Count the connections of a plane."""
        self._watched[plane] = sockets

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(name, text, labels, registry=self.registry)

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(name, text, labels, registry=self.registry)

    def committed(self, committed: Committed) -> None:
        """The observer: one addition for each kind of event in the batch, however many jobs it held."""
        tally: dict[str, int] = {}
        for happened in committed.happened:
            for event in happened.events:
                tally[event.event] = tally.get(event.event, 0) + 1
                if "cause" in event.meta:
                    self.minute.add("lease_reap")
        if "job.failed" in tally or "jobs.pruned" in tally:
            self._count_ends(committed)
        for name, n in tally.items():
            self._of_event(name).inc(n)
            self.minute.add(name, n)
            if name in AUTH_REASONS:
                self.minute.add(f"auth.{AUTH_REASONS[name]}", n)
                self._denied.labels(AUTH_REASONS[name]).inc(n)
        if tally.keys() & LATE:
            self._late(committed)
        if committed.commands:
            self._commands.inc(committed.commands)
            self._batches.observe(committed.commands)

    def _late(self, committed: Committed) -> None:
        for event in (event for happened in committed.happened for event in happened.events if event.event in LATE):
            self._superseded.labels(DIVERGED[event.meta["diverged"]]).inc()

    def _count_ends(self, committed: Committed) -> None:
        for event in (event for happened in committed.happened for event in happened.events):
            if event.event == "job.failed":
                self._dead.labels(str(event.meta.get("reason"))).inc()
            elif event.event == "jobs.pruned":
                self._pruned.labels(event.meta["status"]).inc(event.meta["count"])

    def _of_event(self, name: str) -> Counter:
        counter = self._by_event.get(name)
        if counter is None:
            refused = name.removeprefix("refused.")
            counter = self._events.labels(name) if refused == name else self._refusals.labels(refused)
            self._by_event[name] = counter
        return counter

    def accepted(self, slot: str) -> None:
        """Count a request with a valid token, by its slot."""
        self._accepted_now[slot] += 1
        self.minute.add(f"auth.{slot}")

    def answered(self, plane: str, route: str, status: int) -> None:
        """Count one answered request. `route` is the table's path, never the client's."""
        key = (plane, route, status)
        counter = self._answered.get(key)
        if counter is None:
            counter = self._answered[key] = self._requests.labels(plane, route, str(status))
        counter.inc()

    def set_gauges(self, counts: Mapping[str, int], polls: int, waiting: int, over: bool = False) -> None:
        """Take the kept counters before a scrape."""
        for slot, n in self._accepted_now.items():
            self._accepted.labels(slot).inc(n)
            self._accepted_now[slot] = 0
        for status in JOB_STATUSES:
            self._jobs.labels(status).set(counts.get(f"job:{status}", 0))
        for state in NODE_STATES:
            self._nodes.labels(state).set(counts.get(f"node:{state}", 0))
        for status in ATTESTATIONS:
            self._attested.labels(status).set(counts.get(f"attestation:{status}", 0))
        for plane, sockets in self._watched.items():
            self._open.labels(plane).set(len(sockets))
            for reason, n in sockets.cut.items():
                self._cut.labels(plane, reason).inc(n)
            sockets.cut.clear()
        self._keys.set(counts.get("key", 0))
        self._polls.set(polls)
        self._waiting.set(waiting)
        self._over.set(over)
        self._unread.set(unread(counts))

    def set_waits(self, lanes: Lanes, now: int) -> None:
        """Take how long the first jobs of all lanes wait, before a scrape; read off their heads (design rule 6)."""
        for level, name in enumerate(PRIORITIES):
            since = lanes.oldest(level)
            self._oldest.labels(name).set(0 if since is None else max(0, now - since) / 1000)
            if name in PROMISES_MS:
                self._missed.labels(name).set(lanes.late(level, now - PROMISES_MS[name]))

    def control_json(self, counts: Mapping[str, int]) -> dict[str, Any]:
        """The fleet's JSON of the control plane."""
        minute = self.minute.totals()
        invalid, old, missing = (minute[f"auth.{reason}"] for reason in ("invalid_token", "old_token", "missing_token"))
        return {
            "ok": True,
            "nodes_online": counts.get("node:ONLINE", 0),
            "nodes_stale": counts.get("node:STALE", 0),
            "nodes_dead": counts.get("node:DEAD", 0),
            "auth_fail_rate_1m": invalid + old + missing,
            "port_mismatch_rate_1m": minute["refused.port_mismatch"],
            "auth_success_active_1m": minute["auth.active"],
            "auth_success_next_1m": minute["auth.next"],
            "auth_failure": {"old_token_1m": old, "invalid_1m": invalid},
            "attestation_ok": counts.get("attestation:OK", 0),
            "attestation_missing": counts.get("attestation:MISSING", 0),
            "attestation_drift": counts.get("attestation:DRIFT", 0),
            "attestation_spoof_suspect": counts.get("attestation:SPOOF_SUSPECT", 0),
            "attestation_drift_1m": minute["attestation.drift"],
            "attestation_spoof_1m": minute["attestation.spoof_suspect"],
        }

    def data_json(self, counts: Mapping[str, int]) -> dict[str, Any]:
        """The fleet's JSON of the data plane."""
        minute = self.minute.totals()
        return {
            "ok": True,
            "queue_depth": counts.get("job:pending", 0),
            "inflight_jobs": counts.get("job:running", 0),
            "retry_rate_1m": minute["job.retry"] + minute["job.lost"],
            "queue_drop_1m": minute["refused.queue_full"],
            "inflight_saturated_1m": minute["pull.saturated"],
            "retry_scheduled_1m": minute["job.retry"],
            "lease_reap_1m": minute["lease_reap"],
            "dlq_size": counts.get("job:failed", 0),
            "pending_processing": unread(counts),
            "idempotent_hits_1m": minute["key.hit"],
            "idempotent_collisions_1m": minute["refused.idempotency_key_collision"],
            "idempotency_store_size": counts.get("key", 0),
            "integrity": {"ok_1m": minute["integrity.ok"], "fail_1m": minute["refused.result_integrity_fail"]},
        }


def unread(counts: Mapping[str, int]) -> int:
    """How many completed jobs nobody has read the result of: see `MarkRead`."""
    return max(0, counts.get("job:completed", 0) - counts.get("read", 0))
