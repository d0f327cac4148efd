"""The route table: method, path, plane, handler, right, body. Dispatch, validation and the leak guard read it."""

from __future__ import annotations

from sheratan_hub.web import auditing, control, data, ops, pulls, results
from sheratan_hub.web.forms import (
    BeatForm,
    EmptyForm,
    ExtendForm,
    FleetJobForm,
    FleetPullForm,
    FleetResultForm,
    JobForm,
    PullForm,
    ReleaseForm,
    ResultForm,
    ResultsForm,
)
from sheratan_hub.web.plane import Route

ROUTES = (
    # both planes
    Route("GET", "/health", "both", ops.health, "local"),
    Route("GET", "/livez", "both", ops.livez, "local"),
    Route("GET", "/readyz", "both", ops.readyz, "local"),
    Route("GET", "/metrics", "both", ops.metrics, "metrics"),
    # control
    Route("POST", "/api/hosts/heartbeat", "control", control.heartbeat, form=BeatForm, reader=control.read_beat),
    Route("POST", "/mesh/heartbeat", "control", control.heartbeat, form=BeatForm, reader=control.read_beat),
    Route("GET", "/api/registry", "control", control.registry),
    Route("GET", "/registry", "control", control.registry),
    Route("GET", "/api/hosts", "control", control.hosts),
    Route("GET", "/api/hosts/{id}", "control", control.host),
    Route("DELETE", "/api/hosts/{id}", "control", control.forget),
    Route("GET", "/api/audit", "control", auditing.audit),
    Route("GET", "/api/alerts", "control", auditing.alerts),
    # data
    Route("POST", "/api/jobs", "data", data.submit, form=JobForm, reader=data.read_submit, batch=True),
    Route("GET", "/api/jobs", "data", data.jobs),
    Route("POST", "/mesh/submit_request", "data", data.fleet_submit, form=FleetJobForm),
    Route("POST", "/api/jobs/pull", "data", pulls.pull, form=PullForm),
    Route("GET", "/mesh/pull_requests", "data", pulls.fleet_pull, acts=True),
    Route("POST", "/mesh/pull_requests", "data", pulls.fleet_pull, form=FleetPullForm, body_optional=True),
    Route("GET", "/mesh/pull_requests/{node_id}", "data", pulls.fleet_pull, acts=True),
    Route("POST", "/mesh/pull_requests/{node_id}", "data", pulls.fleet_pull, form=FleetPullForm, body_optional=True),
    Route("POST", "/mesh/submit_result", "data", results.fleet_result, form=FleetResultForm),
    Route("POST", "/api/results", "data", results.results, form=ResultsForm, reader=results.read_results, batch=True),
    Route("GET", "/api/jobs/{id}", "data", data.job),
    Route("POST", "/api/jobs/{id}/result", "data", results.result, form=ResultForm),
    Route("POST", "/api/jobs/{id}/extend", "data", data.extend, form=ExtendForm),
    Route("POST", "/api/jobs/{id}/release", "data", data.release, form=ReleaseForm),
    Route("POST", "/api/jobs/{id}/cancel", "data", data.cancel, form=EmptyForm, body_optional=True),
)
