"""The route table: method, path, plane, handler, right, body. Dispatch, validation and the leak guard read it."""

from __future__ import annotations

from sheratan_hub.web import admin, control, data, explain, ledger, missions, ops, pulls, results, standing
from sheratan_hub.web.admin_forms import CancelManyForm, PurgeForm, RedriveForm, RedriveManyForm
from sheratan_hub.web.forms import (
    BeatForm,
    EmptyForm,
    ExtendForm,
    FleetJobForm,
    FleetPullForm,
    FleetResultForm,
    JobForm,
    MissionForm,
    PullForm,
    ReleaseForm,
    ResultForm,
    ResultsForm,
)
from sheratan_hub.web.plane import Route
from sheratan_hub.web.standing_forms import PauseForm, RateForm, ResumeForm

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
    Route("GET", "/api/jobs/{id}/explain", "data", explain.explain),
    Route("POST", "/api/jobs/{id}/result", "data", results.result, form=ResultForm),
    Route("POST", "/api/jobs/{id}/extend", "data", data.extend, form=ExtendForm),
    Route("POST", "/api/jobs/{id}/release", "data", data.release, form=ReleaseForm),
    Route("POST", "/api/jobs/{id}/cancel", "data", data.cancel, form=EmptyForm, body_optional=True),
    Route("POST", "/api/jobs/{id}/redrive", "data", data.redrive, form=RedriveForm, body_optional=True),
    Route("GET", "/api/ledger", "data", ledger.ledger),
    Route("GET", "/admin/dlq", "data", admin.dlq, "admin"),
    Route("POST", "/admin/dlq/redrive", "data", admin.redrive, "admin", form=RedriveManyForm),
    Route("GET", "/admin/queue", "data", admin.queue, "admin"),
    Route("POST", "/admin/purge", "data", admin.purge, "admin", form=PurgeForm),
    Route("POST", "/admin/cancel", "data", admin.cancel, "admin", form=CancelManyForm),
    Route("POST", "/api/missions", "data", missions.submit, form=MissionForm, reader=missions.read_mission, batch=True),
    Route("GET", "/api/missions", "data", missions.missions),
    Route("GET", "/api/missions/{id}", "data", missions.mission),
    Route("POST", "/api/missions/{id}/cancel", "data", missions.cancel, form=EmptyForm, body_optional=True),
    Route("POST", "/api/missions/{id}/redrive", "data", missions.redrive, form=EmptyForm, body_optional=True),
    Route("POST", "/admin/pause", "data", standing.pause, "admin", form=PauseForm, body_optional=True),
    Route("POST", "/admin/resume", "data", standing.resume, "admin", form=ResumeForm, body_optional=True),
    Route("GET", "/admin/rate-limits/{source}", "data", standing.rate_limit, "admin"),
    Route("PUT", "/admin/rate-limits/{source}", "data", standing.set_rate_limit, "admin", form=RateForm),
    Route("DELETE", "/admin/rate-limits/{source}", "data", standing.drop_rate_limit, "admin"),
)
