"""Counts what was committed, by batch: an observer of the hub.

A batch costs one addition for each name of an event in it, however many jobs it holds. Only leases and the ends of
attempts are looked at one by one, for how long they took.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import chain
from operator import attrgetter

import msgspec

from sheratan_hub.clock import Clock
from sheratan_hub.items import Committed, Origin
from sheratan_hub.metrics.table import AUTH_SLOTS, FAMILIES, PLANES
from sheratan_hub.metrics.tally import Buckets, Few, Minute
from sheratan_hub.rules.command import Code, Event
from sheratan_hub.storage import Changes, Row

AUTH_REFUSALS = {
    Code.MISSING_TOKEN: "missing_token",
    Code.INVALID_TOKEN: "invalid_token",
    Code.FORBIDDEN_ROLE: "invalid_token",
    Code.FORBIDDEN_NODE: "invalid_token",
    Code.OLD_TOKEN: "old_token",
    Code.EXPIRED_TOKEN: "old_token",
}
"""The reason that each refusal of a token is audited and counted with."""

BY_EVENT = {
    "job.leased": ("sheratan_leases_granted_total", ()),
    "key.hit": ("sheratan_idempotency_hits_total", ()),
    "pull.saturated": ("sheratan_pulls_saturated_total", ()),
    "integrity.ok": ("sheratan_result_integrity_total", ("ok",)),
    "attestation.first_seen": ("sheratan_attestation_changes_total", ("first_seen",)),
    "attestation.drift": ("sheratan_attestation_changes_total", ("drift",)),
    "attestation.spoof_suspect": ("sheratan_attestation_changes_total", ("spoof_suspect",)),
    "attestation.accepted": ("sheratan_attestation_changes_total", ("accepted",)),
}
"""What is counted by the name of the event alone: the metric and its label."""

ENDED = {
    "lease_expired": "lost",
    "node_restarted": "lost",
    "node_dead": "node_dead",
    "timeout": "timeout",
    "cancel_deadline": "cancelled",
    "drain_deadline": "released",
}
"""The outcome of an attempt that the hub ended, by the cause."""

SAID = {name: name for name in ("completed", "failed", "cancelled", "released")} | {"retry": "failed"}
"""The outcome of an attempt that its worker ended, by what became of the job."""

DIVERGED = {True: "true", False: "false", None: "unknown"}

BATCH_BOUNDS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0)
JOB_BOUNDS = (0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 10.0, 30.0, 60.0, 300.0, 900.0, 3600.0)
"""Upper bounds of the buckets: commands, seconds."""


class Took:
    """How long jobs of one kind took."""

    __slots__ = ("end_to_end", "run", "wait")

    def __init__(self) -> None:
        self.wait, self.run, self.end_to_end = (Buckets(JOB_BOUNDS) for _ in range(3))


class Times(msgspec.Struct, frozen=True, gc=False):
    """Of a job's document, only its times (ms)."""

    created_at: int
    pending_since: int = 0
    started_at: int = 0
    finished_at: int = 0


class Metrics:
    """All that is counted in this process; every count begins with it. `counts` has them by metric and label values."""

    def __init__(self, clock: Clock, max_kinds: int = 20) -> None:
        self.minute = Minute(clock)
        self.counts: dict[str, Counter[tuple[str, ...]]] = {
            family.name: Counter(dict.fromkeys(family.known, 0)) for family in FAMILIES if family.type == "counter"
        }
        self.events: Counter[str] = Counter()
        self.batches = Buckets(BATCH_BOUNDS)
        self.took: dict[str, Took] = {}
        self._kinds = Few(max_kinds)
        self._requests = self.counts["sheratan_http_requests_total"]
        self._accepted = self.counts["sheratan_auth_accepted_total"]
        self._accepted_before = dict.fromkeys(AUTH_SLOTS, 0)
        self._readers: dict[str, Callable[[Event, Origin, Rows], None]] = {
            **{f"refused.{code}": self._refused for code in Code},
            **dict.fromkeys(("job.completed", "job.cancelled", "job.released"), self._attempt_ended),
            **dict.fromkeys(("job.retry", "job.lost"), self._went_back),
            **dict.fromkeys(("job.superseded", "job.judged"), self._came_late),
            "job.leased": self._leased,
            "job.failed": self._failed,
            "jobs.pruned": self._pruned,
        }

    # What happens

    def committed(self, committed: Committed) -> None:
        """The observer."""
        tally = Counter(map(_name, chain.from_iterable(map(_events, committed.happened))))
        if tally:
            self.minute.add_all(tally)
            self.events.update(tally)
            for name in tally.keys() & BY_EVENT.keys():
                metric, labels = BY_EVENT[name]
                self.counts[metric][labels] += tally[name]
            if not tally.keys().isdisjoint(self._readers):
                self._read(committed)
        if committed.commands:
            self.count("sheratan_commands_total", n=committed.commands)
            self.batches.add(committed.commands)

    def _read(self, committed: Committed) -> None:
        """Look at those events of a batch of which more is counted than their name."""
        rows = Rows(committed.changes)
        for happened in committed.happened:
            for event in happened.events:
                reader = self._readers.get(event.event)
                if reader is not None:
                    reader(event, happened.origin, rows)

    def count(self, metric: str, *labels: str, n: int = 1) -> None:
        """Count `n` more of a metric of the table."""
        self.counts[metric][labels] += n

    def accepted(self, slot: str) -> None:
        """Count a request with a valid token, by its slot."""
        self._accepted[slot,] += 1

    def answered(self, plane: str, route: str, status: int) -> None:
        """Count one answered request. `route` is the table's path, never the client's. Scrapes change nothing."""
        if route != "/metrics" or status != 200:
            self._requests[plane, route, str(status)] += 1

    def fold(self) -> None:
        """Let the last minute know of what was only counted; call it every second."""
        for slot, before in self._accepted_before.items():
            now = self._accepted[slot,]
            if now > before:
                self.minute.add(f"auth.{slot}", now - before)
                self._accepted_before[slot] = now

    # One event each

    def _refused(self, event: Event, origin: Origin, rows: Rows) -> None:
        code = Code(event.event.removeprefix("refused."))
        plane = origin.plane if origin.plane in PLANES else "control"
        self.count("sheratan_refusals_total", plane, code.value)
        if code in AUTH_REFUSALS:
            self.minute.add(f"auth.{AUTH_REFUSALS[code]}")
            self.count("sheratan_auth_failures_total", AUTH_REFUSALS[code])
        elif code is Code.PORT_MISMATCH:
            self.count("sheratan_port_mismatches_total", plane)
        elif code is Code.POLICY_DENIED:
            self.count("sheratan_policy_denials_total", str(event.meta.get("action")))
        elif code is Code.IDEMPOTENCY_KEY_COLLISION:
            self.count("sheratan_idempotency_collisions_total")
        elif code is Code.RESULT_INTEGRITY_FAIL:
            self.count("sheratan_result_integrity_total", str(event.meta.get("reason")))
        elif code in (Code.QUEUE_FULL, Code.RATE_LIMITED):
            self.count("sheratan_submits_limited_total", code.value)

    def _leased(self, event: Event, origin: Origin, rows: Rows) -> None:
        found = rows.find(event.job_id)
        if found is not None and found.started_at:
            self._of(found.kind).wait.add(max(0, found.started_at - found.pending_since) / 1000)

    def _went_back(self, event: Event, origin: Origin, rows: Rows) -> None:
        self.count("sheratan_retries_total", str(event.meta.get("cause", "failure")))
        self._attempt_ended(event, origin, rows)

    def _failed(self, event: Event, origin: Origin, rows: Rows) -> None:
        self.count("sheratan_dead_letters_total", str(event.meta.get("reason")))
        self._attempt_ended(event, origin, rows)

    def _attempt_ended(self, event: Event, origin: Origin, rows: Rows) -> None:
        """Of what waited, or was asked to stop, no attempt ends."""
        meta = event.meta
        cause = meta.get("cause")
        if cause is not None:
            self.minute.add("lease_reap")
            self.count("sheratan_leases_ended_total", str(cause))
        if meta.get("attempt") is None:
            return
        outcome = ENDED.get(cause, "lost") if cause is not None else SAID[event.event.removeprefix("job.")]
        if meta.get("late"):
            outcome = "late"
        self.count("sheratan_attempts_total", outcome)
        found = rows.find(event.job_id)
        if found is None:
            return
        took = self._of(found.kind)
        if outcome != "late" and found.status != "running":
            took.run.add(max(0, event.ts - found.started_at) / 1000)
        if found.status == "completed":
            took.end_to_end.add(max(0, found.finished_at - found.created_at) / 1000)

    def _came_late(self, event: Event, origin: Origin, rows: Rows) -> None:
        self.count("sheratan_superseded_results_total", DIVERGED[event.meta["diverged"]])

    def _pruned(self, event: Event, origin: Origin, rows: Rows) -> None:
        self.count("sheratan_pruned_jobs_total", event.meta["status"], n=event.meta["count"])

    def _of(self, kind: str) -> Took:
        label = self._kinds.label(kind)
        took = self.took.get(label)
        if took is None:
            took = self.took[label] = Took()
        return took


class Found(msgspec.Struct, frozen=True, gc=False):
    """A job as a batch has left it; times in ms."""

    kind: str
    status: str
    created_at: int
    pending_since: int
    started_at: int
    finished_at: int


class Rows:
    """The jobs that a batch has written, found by id; nothing is made of them before somebody asks."""

    def __init__(self, changes: Changes) -> None:
        self._changes = changes
        self._rows: dict[str, Row] | None = None

    def find(self, job_id: str | None) -> Found | None:
        """The job, None if the batch has not written it."""
        if self._rows is None:
            written = chain(self._changes.new, self._changes.put)
            self._rows = {row.id: row for row in written if row.kind == "job"}
        row = self._rows.get(job_id or "")
        if row is None:
            return None
        times = _decode(row.doc)
        status, kind, *_ = row.labels
        return Found(
            kind or "", status or "", times.created_at, times.pending_since, times.started_at, times.finished_at
        )


_name = attrgetter("event")
_events = attrgetter("events")
_decode = msgspec.json.Decoder(Times).decode
