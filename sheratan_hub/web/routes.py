"""The route table: method, path, plane, handler, right, body. Dispatch, validation and the leak guard read it."""

from __future__ import annotations

from sheratan_hub.web import control, data, ops, pulls, results, tokens
from sheratan_hub.web.forms import (
    AccessForm,
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
    RotationForm,
)
from sheratan_hub.web.plane import Route

ROUTES = (
    # both planes
    Route("GET", "/health", "both", ops.health, "local"),
    Route("GET", "/livez", "both", ops.livez, "local"),
    Route("GET", "/readyz", "both", ops.readyz, "local"),
    Route("GET", "/metrics", "both", ops.metrics, "metrics"),
    # control
    Route(
        "POST", "/api/hosts/heartbeat", "control", control.heartbeat, "work", form=BeatForm, reader=control.read_beat
    ),
    Route("POST", "/mesh/heartbeat", "control", control.heartbeat, "work", form=BeatForm, reader=control.read_beat),
    Route("GET", "/api/registry", "control", control.registry, "read"),
    Route("GET", "/registry", "control", control.registry, "read"),
    Route("GET", "/api/hosts", "control", control.hosts, "read"),
    Route("GET", "/api/hosts/{id}", "control", control.host, "read"),
    Route("DELETE", "/api/hosts/{id}", "control", control.forget),
    Route("GET", "/api/tokens", "control", tokens.status),
    Route("POST", "/api/tokens/rotation", "control", tokens.rotate, form=RotationForm),
    Route("DELETE", "/api/tokens/rotation", "control", tokens.abandon),
    Route("GET", "/api/access", "control", tokens.listing),
    Route("POST", "/api/access", "control", tokens.create, form=AccessForm),
    Route("DELETE", "/api/access/{id}", "control", tokens.revoke),
    # data
    Route("POST", "/api/jobs", "data", data.submit, "submit", form=JobForm, reader=data.read_submit, batch=True),
    Route("GET", "/api/jobs", "data", data.jobs, "jobs"),
    Route("POST", "/mesh/submit_request", "data", data.fleet_submit, "submit", form=FleetJobForm),
    Route("POST", "/api/jobs/pull", "data", pulls.pull, "work", form=PullForm),
    Route("GET", "/mesh/pull_requests", "data", pulls.fleet_pull, "work", acts=True),
    Route("POST", "/mesh/pull_requests", "data", pulls.fleet_pull, "work", form=FleetPullForm, body_optional=True),
    Route("GET", "/mesh/pull_requests/{node_id}", "data", pulls.fleet_pull, "work", acts=True),
    Route(
        "POST",
        "/mesh/pull_requests/{node_id}",
        "data",
        pulls.fleet_pull,
        "work",
        form=FleetPullForm,
        body_optional=True,
    ),
    Route("POST", "/mesh/submit_result", "data", results.fleet_result, "work", form=FleetResultForm),
    Route(
        "POST",
        "/api/results",
        "data",
        results.results,
        "work",
        form=ResultsForm,
        reader=results.read_results,
        batch=True,
    ),
    Route("GET", "/api/jobs/{id}", "data", data.job, "jobs"),
    Route("POST", "/api/jobs/{id}/result", "data", results.result, "work", form=ResultForm),
    Route("POST", "/api/jobs/{id}/extend", "data", data.extend, "work", form=ExtendForm),
    Route("POST", "/api/jobs/{id}/release", "data", data.release, "work", form=ReleaseForm),
    Route("POST", "/api/jobs/{id}/cancel", "data", data.cancel, form=EmptyForm, body_optional=True),
)
