"""Examples for the OpenAPI document and the page: what a body may look like, and values by the name of their field."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sheratan_hub.web import admin_forms, forms, nodes, standing_forms

JOB_ID = "01890a5d-ac96-774b-bcce-b302099a8057"
MISSION_ID = "01890a5d-ac97-7c51-9d0e-5a1f6c2b7e44"
ACCESS_ID = "a-01890a5d-ac98-7f02-8a6b-3c9d1e4f5a60"
LEASE_ID = "x7mJ2Q0cVt8Yk5rN3bLwAg"
SHA256 = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"
MOMENT = "2026-11-21T10:31:07.412Z"
LATER = "2099-01-01T00:00:00Z"
PARAMS = {"path": "README.md"}
RESULT = {"lines": 271, "words": 2480}
JOB = {"kind": "text.stats", "params": PARAMS}

BODIES: dict[type, dict[str, Any]] = {
    forms.JobForm: {**JOB, "idempotency_key": "readme-2026-11-21", "priority": "HIGH", "timeout_seconds": 60},
    forms.BatchForm: {"jobs": [{**JOB, "ref": "a"}, {"kind": "mail.send", "depends_on": ["a"]}], "atomic": True},
    forms.FleetJobForm: {**JOB, "source": "reports"},
    forms.MissionForm: {"title": "nightly report", "jobs": [{**JOB, "ref": "a"}, {**JOB, "depends_on": ["a"]}]},
    forms.PullForm: {"node_id": "press-7", "max": 4, "wait_seconds": 20, "kinds": ["text.stats"]},
    forms.FleetPullForm: {"node_id": "press-7", "max": 4},
    forms.ResultForm: {"lease_id": LEASE_ID, "ok": True, "result": RESULT, "pull": {"node_id": "press-7"}},
    forms.FleetResultForm: {"job_id": JOB_ID, "node_id": "press-7", "ok": True, "result": RESULT},
    forms.ResultsForm: {"results": [{"job_id": JOB_ID, "lease_id": LEASE_ID, "ok": False, "error": "no such file"}]},
    forms.ExtendForm: {"lease_id": LEASE_ID, "seconds": 120},
    forms.ReleaseForm: {"lease_id": LEASE_ID},
    forms.BeatForm: {"node_id": "press-7", "zone": "dmz", "capabilities": ["gpu"], "max_concurrent": 4},
    forms.RotationForm: {"seconds": 86_400},
    forms.AccessForm: {"role": "node", "node_id": "press-7", "expires_in_seconds": 7_776_000},
    forms.PolicyForm: {
        "policy": {
            "title": "the DMZ renders only",
            "rules": [
                {"effect": "allow", "actions": ["pull", "result"], "zones": ["dmz"], "kinds": ["render.*"]},
                {"effect": "deny", "actions": ["pull", "result"], "zones": ["dmz"]},
            ],
        },
        "note": "asked for by the audit",
    },
    forms.PlanForm: {"policy": {"default": "deny"}},
    forms.EmptyForm: {},
    nodes.DrainForm: {"seconds": 600},
    admin_forms.RedriveForm: {"dependents": True},
    admin_forms.RedriveManyForm: {"filter": {"kind": "text.stats"}, "limit": 100, "rate_per_second": 10},
    admin_forms.PurgeForm: {"filter": {"kind": "text.stats"}, "dry_run": True},
    admin_forms.CancelManyForm: {"filter": {"source": "reports"}, "dry_run": True},
    standing_forms.PauseForm: {"kind": "text.stats", "seconds": 600, "reason": "disk is full"},
    standing_forms.ResumeForm: {"kind": "text.stats"},
    standing_forms.RateForm: {"per_minute": 60, "concurrent": 4},
}
"""A body for each form of the route table."""

PLACES = {
    "jobs": JOB_ID,
    "hosts": "press-7",
    "missions": MISSION_ID,
    "access": ACCESS_ID,
    "pull_requests": "press-7",
    "rate-limits": "reports",
    "policies": "3",
}
"""What may stand in a path behind this word."""

VALUES: dict[str, Any] = {
    "job_id": JOB_ID,
    "request_id": JOB_ID,
    "mission_id": MISSION_ID,
    "access_id": ACCESS_ID,
    "lease_id": LEASE_ID,
    "node_id": "press-7",
    "token_id": "t-5f2b9c01d3aa",
    "kind": "text.stats",
    "source": "reports",
    "title": "nightly report",
    "zone": "dmz",
    "capabilities": ["gpu"],
    "params": PARAMS,
    "result": RESULT,
    "attempt": 1,
    "priority": 2,
    "lease_seconds": 300,
    "timeout_seconds": 60,
    "heartbeat_after_seconds": 30.4,
    "version": 3,
    "active": 3,
    "event": "job.leased",
    "actor": "press-7",
    "sha256": SHA256,
    "hash": SHA256,
    "remote_addr": "127.0.0.1",
    "path": "/api/jobs",
    "role": "node",
    "next_cursor": None,
    "cursor": "",
    "status": "running",
    "checks": {"started": True, "not_draining": True, "store": True},
    "token": "shn_node_...",
}
"""What stands in an example under this name, whatever it is an example of."""


def example(schema: Mapping[str, Any], components: Mapping[str, Any], name: str = "") -> Any:
    """A value that fits the schema, told by the name of the field where it has a usual one."""
    if "$ref" in schema:
        schema = components[schema["$ref"].rpartition("/")[2]]
    if name in VALUES and _fits(VALUES[name], schema):
        return VALUES[name]
    for key in ("const", "default"):
        if key in schema:
            return schema[key]
    if "enum" in schema:
        return schema["enum"][0]
    for several in ("anyOf", "oneOf"):
        if several in schema:
            return example(schema[several][0], components, name)
    return _of_type(schema, components)


def _of_type(schema: Mapping[str, Any], components: Mapping[str, Any]) -> Any:
    kind = schema.get("type")
    if kind == "object":
        given = schema.get("properties", {})
        return {name: example(given[name], components, name) for name in schema.get("required", given) if name in given}
    if kind == "array":
        return [example(schema["items"], components)] if schema.get("items") else []
    if kind == "string":
        return MOMENT if schema.get("format") == "date-time" else "..."
    return {"boolean": True, "integer": schema.get("minimum", 1), "number": schema.get("minimum", 1)}.get(str(kind))


TYPES: dict[str, type | tuple[type, ...]] = {
    "string": str,
    "integer": int,
    "number": (int, float),
    "array": list,
    "object": dict,
    "null": type(None),
}


def _fits(value: Any, schema: Mapping[str, Any]) -> bool:
    """Whether the value's type is one that the schema names; one without a type takes all."""
    kinds = {one.get("type") for one in schema.get("anyOf", (schema,))}
    values = schema.get("enum")
    if values is not None:
        return value in values
    return kinds == {None} or any(isinstance(value, TYPES[kind]) for kind in kinds if kind in TYPES)
