"""The JSON of `/metrics`, by the keys that deployed fleets read: `stored` counters, and counts of the last `minute`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def fleet_json(plane: str, stored: Mapping[str, int], minute: Mapping[str, int]) -> dict[str, Any]:
    """All keys of a plane."""
    return control_json(stored, minute) if plane == "control" else data_json(stored, minute)


def control_json(stored: Mapping[str, int], minute: Mapping[str, int]) -> dict[str, Any]:
    """The control plane's keys."""
    invalid, old, missing = (minute[f"auth.{reason}"] for reason in ("invalid_token", "old_token", "missing_token"))
    return {
        "ok": True,
        "nodes_online": stored.get("node:ONLINE", 0),
        "nodes_stale": stored.get("node:STALE", 0),
        "nodes_dead": stored.get("node:DEAD", 0),
        "auth_fail_rate_1m": invalid + old + missing,
        "port_mismatch_rate_1m": minute["refused.port_mismatch"],
        "auth_success_active_1m": minute["auth.active"],
        "auth_success_next_1m": minute["auth.next"],
        "auth_failure": {"old_token_1m": old, "invalid_1m": invalid},
        "attestation_ok": stored.get("attestation:OK", 0),
        "attestation_missing": stored.get("attestation:MISSING", 0),
        "attestation_drift": stored.get("attestation:DRIFT", 0),
        "attestation_spoof_suspect": stored.get("attestation:SPOOF_SUSPECT", 0),
        "attestation_drift_1m": minute["attestation.drift"],
        "attestation_spoof_1m": minute["attestation.spoof_suspect"],
    }


def data_json(stored: Mapping[str, int], minute: Mapping[str, int]) -> dict[str, Any]:
    """The data plane's keys."""
    return {
        "ok": True,
        "queue_depth": stored.get("job:pending", 0),
        "inflight_jobs": stored.get("job:running", 0),
        "retry_rate_1m": minute["job.retry"] + minute["job.lost"],
        "queue_drop_1m": minute["refused.queue_full"],
        "inflight_saturated_1m": minute["pull.saturated"],
        "retry_scheduled_1m": minute["job.retry"],
        "lease_reap_1m": minute["lease_reap"],
        "dlq_size": stored.get("job:failed", 0),
        "pending_processing": unread(stored),
        "idempotent_hits_1m": minute["key.hit"],
        "idempotent_collisions_1m": minute["refused.idempotency_key_collision"],
        "idempotency_store_size": stored.get("key", 0),
        "integrity": {"ok_1m": minute["integrity.ok"], "fail_1m": minute["refused.result_integrity_fail"]},
    }


def unread(stored: Mapping[str, int]) -> int:
    """How many completed jobs nobody has read the result of: see `MarkRead`."""
    return max(0, stored.get("job:completed", 0) - stored.get("read", 0))
