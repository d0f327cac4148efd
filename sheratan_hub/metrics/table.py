"""Every metric on one screen: its name, type, meaning, labels, and the plane that serves it.

Each series is served by one plane, so that sums over both are right; what is `both` has a label `plane`, or is split
by what it is about. A family's `known` label values are there from the start with 0, so that a rate sees the first one.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from sheratan_hub.rules.attestation import Status as Attestation
from sheratan_hub.rules.command import Code
from sheratan_hub.rules.policy import ACTIONS

Plane = Literal["control", "data"]
PLANES: tuple[Plane, ...] = ("control", "data")


class Family(NamedTuple):
    """One metric with all of its series."""

    name: str
    type: Literal["counter", "gauge", "histogram"]
    plane: Literal["control", "data", "both"]
    text: str
    labels: tuple[str, ...] = ()
    known: tuple[tuple[str, ...], ...] = ()


def each(*values: str) -> tuple[tuple[str, ...], ...]:
    """These values of one label."""
    return tuple((value,) for value in values)


def counter(plane: Literal["control", "data", "both"], name: str, text: str, *labels: str) -> Family:
    """A counter without known label values; one without labels begins with 0."""
    return Family(name, "counter", plane, text, labels, () if labels else ((),))


def gauge(plane: Literal["control", "data", "both"], name: str, text: str, *labels: str) -> Family:
    """A gauge, read when it is asked for."""
    return Family(name, "gauge", plane, text, labels)


def histogram(plane: Literal["control", "data"], name: str, text: str, *labels: str) -> Family:
    """A histogram."""
    return Family(name, "histogram", plane, text, labels)


NODE_STATES = ("ONLINE", "STALE", "DEAD")
HEALTHS = ("GREEN", "YELLOW", "RED")
ATTESTATIONS: tuple[Attestation, ...] = ("OK", "DRIFT", "SPOOF_SUSPECT", "MISSING")
JOB_STATUSES = ("pending", "running", "completed", "failed", "cancelled", "quarantined")
PRIORITIES = ("CRITICAL", "HIGH", "NORMAL", "LOW")
AUTH_SLOTS = ("active", "next", "access")
AUTH_REASONS = ("missing_token", "invalid_token", "old_token")
CAUSES = ("lease_expired", "timeout", "node_dead", "node_restarted", "cancel_deadline", "drain_deadline")
OUTCOMES = ("completed", "late", "failed", "timeout", "lost", "node_dead", "released", "cancelled")
RETRY_CAUSES = ("failure", "timeout", "lease_expired", "node_dead", "node_restarted")
DEAD_REASONS = ("RETRIES_EXHAUSTED", "POISON", "EXPIRED", "NOT_RETRYABLE", "LOST")
PROOFS = ("ok", "missing_integrity", "sha_mismatch", "sig_mismatch", "mode_downgrade")

FAMILIES = (
    # both
    gauge("both", "sheratan_build_info", "The running version and the kind of its store.", "version", "store"),
    counter("both", "sheratan_http_requests_total", "Requests answered, but for scrapes.", "plane", "route", "status"),
    Family(
        *("sheratan_refusals_total", "counter", "both", "Requests refused, by code.", ("plane", "code")),
        known=tuple((plane, code.value) for plane in PLANES for code in Code),
    ),
    counter("both", "sheratan_events_total", "Things that happened, by event.", "event"),
    gauge("both", "sheratan_connections", "Open connections.", "plane"),
    gauge("both", "sheratan_connections_limit", "How many connections may be open.", "plane"),
    Family(
        *("sheratan_connections_cut_total", "counter", "both", "Connections cut by the hub.", ("plane", "reason")),
        known=tuple((plane, why) for plane in PLANES for why in ("header", "idle", "send", "full", "address")),
    ),
    # control: nodes
    gauge("control", "sheratan_nodes", "Nodes, by state.", "state"),
    gauge("control", "sheratan_node_health", "Nodes that are ONLINE, by health.", "health"),
    gauge("control", "sheratan_nodes_draining", "Nodes that are drained."),
    gauge("control", "sheratan_node_attestations", "Nodes, by what they attest.", "status"),
    gauge("control", "sheratan_node_up", "1 for a node that is ONLINE, else 0; see metrics.max_node_series.", "node"),
    gauge(
        "control", "sheratan_node_last_heartbeat_timestamp_seconds", "When the node was heard of; see there.", "node"
    ),
    gauge("control", "sheratan_fleet_silent", "1 while leases of DEAD nodes are left alone: most fell silent at once."),
    # control: who asks
    Family(
        *("sheratan_auth_accepted_total", "counter", "control", "Requests with a valid token, by slot.", ("slot",)),
        known=each(*AUTH_SLOTS),
    ),
    Family(
        *("sheratan_auth_failures_total", "counter", "control", "Requests whose token was refused.", ("reason",)),
        known=each(*AUTH_REASONS),
    ),
    Family(
        *("sheratan_port_mismatches_total", "counter", "control", "Requests on the wrong port.", ("plane",)),
        known=each(*PLANES),
    ),
    Family(
        *("sheratan_attestation_changes_total", "counter", "control", "Changes of what nodes attest.", ("change",)),
        known=each("first_seen", "drift", "spoof_suspect", "accepted"),
    ),
    Family(
        *("sheratan_policy_denials_total", "counter", "control", "What the active policy denied.", ("action",)),
        known=each(*ACTIONS),
    ),
    gauge("control", "sheratan_policy_version", "The active version of the policy, 0: none."),
    gauge("control", "sheratan_token_rotation_active", "1 while the old and the next token are both accepted."),
    gauge("control", "sheratan_token_rotation_remaining_seconds", "Until the rotation ends; absent if it does not."),
    gauge("control", "sheratan_token_rotation_stragglers", "Nodes, not DEAD ones, that last used the old token."),
    # control: audit
    counter("control", "sheratan_audit_lines_total", "Lines in the audit log's chain."),
    counter("control", "sheratan_audit_write_failures_total", "Tries to write the audit log that failed."),
    counter("control", "sheratan_audit_lost_lines_total", "Lines that found no room while it could not be written."),
    gauge("control", "sheratan_audit_queue_lines", "Lines that wait to be written."),
    gauge("control", "sheratan_audit_writable", "0 while the audit log cannot be written."),
    counter("control", "sheratan_alerts_total", "Alerts of the audit log's watcher, by rule.", "rule"),
    # control: the hub itself
    counter("control", "sheratan_commands_total", "Commands committed."),
    gauge("control", "sheratan_commands_waiting", "Commands waiting for a transaction."),
    gauge("control", "sheratan_commands_waiting_limit", "How many may wait; more are refused with `busy`."),
    histogram("control", "sheratan_commit_batch_commands", "Commands that shared one transaction."),
    histogram("control", "sheratan_commit_seconds", "Transactions that wrote: load, decide and save."),
    histogram("control", "sheratan_sync_seconds", "Saves that had to be durable, until they were."),
    Family(
        *("sheratan_commit_failures_total", "counter", "control", "Transactions that failed.", ("reason",)),
        known=each("down", "full", "conflict", "bug"),
    ),
    histogram("control", "sheratan_event_loop_lag_seconds", "How late the event loop was, looked at 4 times a second."),
    counter("control", "sheratan_loop_errors_total", "Steps of background loops that failed.", "loop"),
    gauge("control", "sheratan_store_up", "1 while the store can be read and the last change could be written."),
    gauge("control", "sheratan_store_size_bytes", "The store's files, looked at every 10 seconds."),
    gauge("control", "sheratan_store_wal_bytes", "Of these, what is written ahead: SQLite's WAL, the log's segments."),
    gauge("control", "sheratan_store_disk_free_bytes", "Room on the store's disk."),
    gauge("control", "sheratan_store_disk_size_bytes", "Size of the store's disk."),
    # data: jobs that wait
    gauge("data", "sheratan_jobs", "Jobs in the store, by status.", "status"),
    gauge("data", "sheratan_ready_jobs", "Pending jobs that may be leased now, by priority.", "priority"),
    gauge("data", "sheratan_queue_depth_limit", "How many jobs may be pending or quarantined."),
    gauge("data", "sheratan_oldest_wait_seconds", "How long the oldest ready job waits.", "priority"),
    gauge(
        "data", "sheratan_promises_missed", "Lanes whose first job waits longer than its priority promises.", "priority"
    ),
    gauge("data", "sheratan_waiting_pulls", "Pulls that wait for work."),
    gauge("data", "sheratan_long_polls", "Requests that wait for work or for a job's end."),
    gauge("data", "sheratan_throttled_sources", "Sources that have used up their concurrency."),
    gauge("data", "sheratan_pauses", "Pauses in force."),
    Family(
        *("sheratan_submits_limited_total", "counter", "data", "Submits refused for want of room.", ("reason",)),
        known=each("queue_full", "rate_limited"),
    ),
    counter("data", "sheratan_pulls_saturated_total", "Pulls that got nothing because of the inflight limit."),
    # data: leases and attempts
    gauge("data", "sheratan_leases", "Live leases."),
    gauge("data", "sheratan_leases_limit", "How many leases may live."),
    counter("data", "sheratan_leases_granted_total", "Leases given."),
    Family(
        *("sheratan_leases_ended_total", "counter", "data", "Leases that the hub ended, by cause.", ("cause",)),
        known=each(*CAUSES),
    ),
    Family(
        *("sheratan_superseded_results_total", "counter", "data", "Late results kept as evidence.", ("diverged",)),
        known=each("true", "false", "unknown"),
    ),
    Family(
        *("sheratan_attempts_total", "counter", "data", "Attempts that ended, by how.", ("outcome",)),
        known=each(*OUTCOMES),
    ),
    Family(
        *("sheratan_retries_total", "counter", "data", "Jobs that went back in line, by why.", ("cause",)),
        known=each(*RETRY_CAUSES),
    ),
    Family(
        *("sheratan_dead_letters_total", "counter", "data", "Jobs that failed for good, by reason.", ("reason",)),
        known=each(*DEAD_REASONS),
    ),
    gauge("data", "sheratan_dead_letters_over_limit", "1 while there are more than dlq.max_items."),
    Family(
        *("sheratan_pruned_jobs_total", "counter", "data", "Finished jobs forgotten by age.", ("status",)),
        known=each("cancelled", "completed", "failed"),
    ),
    gauge("data", "sheratan_pending_processing", "Completed jobs whose result nobody has read yet."),
    gauge("data", "sheratan_idempotency_keys", "Idempotency keys in the store."),
    counter("data", "sheratan_idempotency_hits_total", "Submits that got the job they had made before."),
    counter("data", "sheratan_idempotency_collisions_total", "Submits with a known key and another payload."),
    Family(
        *("sheratan_result_integrity_total", "counter", "data", "Results by what became of their proof.", ("result",)),
        known=each(*PROOFS),
    ),
    histogram("data", "sheratan_job_wait_seconds", "From the time a job may be leased until it is.", "kind"),
    histogram("data", "sheratan_job_run_seconds", "Attempts, from the lease to their end.", "kind"),
    histogram("data", "sheratan_job_end_to_end_seconds", "Completed jobs, from submit to end.", "kind"),
)

BY_NAME = {family.name: family for family in FAMILIES}

DATA_EVENTS = ("dlq.", "integrity.", "job.", "jobs.", "key.", "mission.", "pull.", "queue.", "rate_limit.")
"""How the events begin that the data plane tells; the control plane tells the others."""


def plane_of_event(event: str) -> Plane:
    """The plane whose metrics count an event."""
    return "data" if event.startswith(DATA_EVENTS) else "control"
