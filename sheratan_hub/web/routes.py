"""The route table: method, path, plane, handler, right, body, answers, refusals.

Dispatch, validation, the leak guard and the OpenAPI document read it.
"""

from __future__ import annotations

from typing import Any

from sheratan_hub.rules.command import Code
from sheratan_hub.web import (
    admin,
    answers,
    auditing,
    bundle,
    control,
    data,
    explain,
    ledger,
    manual,
    missions,
    nodes,
    ops,
    policies,
    pulls,
    query,
    render,
    results,
    standing,
    tokens,
)
from sheratan_hub.web.admin_forms import CancelManyForm, PurgeForm, RedriveForm, RedriveManyForm
from sheratan_hub.web.answer import JSON
from sheratan_hub.web.forms import (
    AccessForm,
    BatchForm,
    BeatForm,
    EmptyForm,
    ExtendForm,
    FleetJobForm,
    FleetPullForm,
    FleetResultForm,
    JobForm,
    MissionForm,
    PlanForm,
    PolicyForm,
    PullForm,
    ReleaseForm,
    ResultForm,
    ResultsForm,
    RotationForm,
)
from sheratan_hub.web.nodes import DrainForm
from sheratan_hub.web.plane import Route
from sheratan_hub.web.standing_forms import PauseForm, RateForm, ResumeForm

TEXT = "text/plain"
METRICS = {TEXT: str, "application/openmetrics-text": str, JSON: answers.ControlMetrics | answers.DataMetrics}
DOCUMENT = {JSON: dict[str, Any]}
PAGE = {"text/html": str}
ARCHIVE = {"application/zip": bytes}

NO_NODE = (Code.NODE_NOT_FOUND,)
NO_POLICY = (Code.POLICY_NOT_FOUND,)
NO_JOB = (Code.JOB_NOT_FOUND,)
NO_RATE = (Code.RATE_LIMIT_NOT_FOUND, Code.INVALID_FIELD)
PRECONDITION = (Code.PRECONDITION_FAILED, Code.PRECONDITION_REQUIRED)
SUBMIT = (
    Code.IDEMPOTENCY_KEY_COLLISION,
    Code.UNKNOWN_DEPENDENCY,
    Code.QUEUE_FULL,
    Code.RATE_LIMITED,
    Code.POLICY_DENIED,
)
SUBMIT_HEADERS = ("Idempotency-Key", "traceparent")
LEASE = (*NO_JOB, Code.LEASE_SUPERSEDED)
RESULT = (*LEASE, Code.RESULT_CONFLICT, Code.RESULT_INTEGRITY_FAIL, Code.POLICY_DENIED)

# fmt: off
ROUTES = (
    # both planes
    Route("GET", "/health", "both", ops.health, "local", answers=answers.Health),
    Route("GET", "/livez", "both", ops.livez, "local", answers=answers.Alive),
    Route("GET", "/readyz", "both", ops.readyz, "local",
          answers=answers.Ready, query=query.ReadyQuery, codes=(Code.UNAVAILABLE,)),
    Route("GET", "/metrics", "both", ops.metrics, "metrics", answers=METRICS, query=query.MetricsQuery),
    Route("GET", "/openapi.json", "both", manual.document, "docs", answers=DOCUMENT),
    Route("GET", "/docs", "both", manual.page, "docs", answers=PAGE),
    # control
    Route("POST", "/api/hosts/heartbeat", "control", control.heartbeat, "work",
          form=BeatForm, reader=control.read_beat, answers=answers.BeatAnswer, codes=(Code.POLICY_DENIED,),
          fleet=True),
    Route("POST", "/mesh/heartbeat", "control", control.heartbeat, "work",
          form=BeatForm, reader=control.read_beat, answers=answers.BeatAnswer, codes=(Code.POLICY_DENIED,),
          fleet=True),
    Route("GET", "/api/registry", "control", control.registry, "read", answers=answers.Registry, fleet=True),
    Route("GET", "/registry", "control", control.registry, "read", answers=answers.Registry, fleet=True),
    Route("GET", "/api/hosts", "control", control.hosts, "read", answers=answers.NodePage, query=query.PageQuery),
    Route("GET", "/api/hosts/{id}", "control", control.host, "read", answers=answers.OneNode, codes=NO_NODE),
    Route("DELETE", "/api/hosts/{id}", "control", control.forget,
          answers=answers.NodeForgotten, codes=(*NO_NODE, Code.NODE_ALIVE)),
    Route("POST", "/api/hosts/{id}/drain", "control", nodes.drain,
          form=DrainForm, body_optional=True, answers=answers.OneNode, codes=NO_NODE),
    Route("POST", "/api/hosts/{id}/resume", "control", nodes.resume,
          form=EmptyForm, body_optional=True, answers=answers.OneNode, codes=NO_NODE),
    Route("POST", "/api/hosts/{id}/attest", "control", nodes.attest,
          form=EmptyForm, body_optional=True, answers=answers.OneNode, codes=(*NO_NODE, Code.NOT_ATTESTED)),
    Route("GET", "/api/fleet", "control", nodes.fleet, "read", answers=answers.FleetAnswer),
    Route("POST", "/api/fleet/reap", "control", nodes.reap,
          form=EmptyForm, body_optional=True, answers=answers.Reaped),
    Route("GET", "/api/audit", "control", auditing.audit, "read", answers=answers.AuditPage, query=query.AuditQuery),
    Route("GET", "/api/alerts", "control", auditing.alerts, "read",
          answers=answers.AlertPage, query=query.AlertsQuery),
    Route("GET", "/api/bundle", "control", bundle.bundle, "admin",
          answers=ARCHIVE, codes=(Code.LOOPBACK_ONLY, Code.BUSY)),
    Route("GET", "/api/tokens", "control", tokens.status, answers=answers.Tokens),
    Route("POST", "/api/tokens/rotation", "control", tokens.rotate,
          form=RotationForm, answers=answers.RotationAnswer, made=answers.RotationAnswer,
          codes=(Code.ROTATION_UNDER_WAY,)),
    Route("DELETE", "/api/tokens/rotation", "control", tokens.abandon,
          answers=answers.RotationAbandoned, codes=(Code.NO_ROTATION,)),
    Route("GET", "/api/access", "control", tokens.listing, answers=answers.AccessPage, query=query.PageQuery),
    Route("POST", "/api/access", "control", tokens.create,
          form=AccessForm, made=answers.AccessMade, follow="/api/access/{access_id}"),
    Route("DELETE", "/api/access/{id}", "control", tokens.revoke,
          answers=answers.AccessRevoked, codes=(Code.ACCESS_NOT_FOUND,)),
    Route("GET", "/api/policies", "control", policies.policies, answers=answers.PolicyPage, query=query.PageQuery),
    Route("POST", "/api/policies", "control", policies.create,
          form=PolicyForm, made=answers.OnePolicy, follow="/api/policies/{version}"),
    Route("POST", "/api/policies/plan", "control", policies.planned,
          form=PlanForm, answers=answers.Planned, codes=NO_POLICY),
    Route("GET", "/api/policies/{version}", "control", policies.policy, answers=answers.OnePolicy, codes=NO_POLICY),
    Route("POST", "/api/policies/{version}/activate", "control", policies.activate,
          answers=answers.PolicyActivated, codes=(*NO_POLICY, *PRECONDITION), headers=("If-Match",)),
    # data
    Route("POST", "/api/jobs", "data", data.submit, "submit",
          form=JobForm | BatchForm, reader=data.read_submit, batch=True,
          answers=render.SubmitAnswer | answers.BatchSubmitted, made=render.SubmitAnswer,
          codes=(*SUBMIT, Code.DEPENDENCY_CYCLE), headers=SUBMIT_HEADERS, follow="/api/jobs/{job_id}"),
    Route("GET", "/api/jobs", "data", data.jobs, "jobs", answers=answers.JobPage, query=query.JobsQuery),
    Route("POST", "/mesh/submit_request", "data", data.fleet_submit, "submit",
          form=FleetJobForm, answers=render.SubmitAnswer, codes=SUBMIT, headers=SUBMIT_HEADERS,
          follow="/api/jobs/{job_id}", fleet=True),
    Route("POST", "/api/jobs/pull", "data", pulls.pull, "work",
          form=PullForm, answers=answers.Leases, codes=(Code.POLICY_DENIED,), follow="/api/jobs/{jobs/0/job_id}"),
    Route("GET", "/mesh/pull_requests", "data", pulls.fleet_pull, "work",
          acts=True, answers=answers.Leases, codes=(Code.POLICY_DENIED,), query=query.PullQuery, fleet=True),
    Route("POST", "/mesh/pull_requests", "data", pulls.fleet_pull, "work",
          form=FleetPullForm, body_optional=True, answers=answers.Leases, codes=(Code.POLICY_DENIED,),
          query=query.PullQuery, fleet=True),
    Route("GET", "/mesh/pull_requests/{node_id}", "data", pulls.fleet_pull, "work",
          acts=True, answers=answers.Leases, codes=(Code.POLICY_DENIED,), query=query.MaxQuery, fleet=True),
    Route("POST", "/mesh/pull_requests/{node_id}", "data", pulls.fleet_pull, "work",
          form=FleetPullForm, body_optional=True, answers=answers.Leases, codes=(Code.POLICY_DENIED,),
          query=query.MaxQuery, fleet=True),
    Route("POST", "/mesh/submit_result", "data", results.fleet_result, "work",
          form=FleetResultForm, answers=answers.ResultAnswer, codes=(*RESULT, Code.NOT_LEASED, Code.NOT_HOLDER),
          fleet=True),
    Route("POST", "/api/results", "data", results.results, "work",
          form=ResultsForm, reader=results.read_results, batch=True, answers=answers.ResultsAnswer),
    Route("GET", "/api/jobs/{id}", "data", data.job, "jobs",
          answers=render.JobAnswer, codes=NO_JOB, query=query.WaitQuery),
    Route("GET", "/api/jobs/{id}/explain", "data", explain.explain, "jobs",
          answers=explain.ExplainAnswer, codes=NO_JOB),
    Route("POST", "/api/jobs/{id}/result", "data", results.result, "work",
          form=ResultForm, answers=answers.ResultAnswer, codes=(*RESULT, Code.NOT_HOLDER)),
    Route("POST", "/api/jobs/{id}/extend", "data", data.extend, "work",
          form=ExtendForm, answers=answers.LeaseExtended, codes=(*LEASE, Code.LEASE_EXPIRED)),
    Route("POST", "/api/jobs/{id}/release", "data", data.release, "work",
          form=ReleaseForm, answers=answers.LeaseEnded, codes=(*LEASE, Code.RESULT_CONFLICT)),
    Route("POST", "/api/jobs/{id}/cancel", "data", data.cancel,
          form=EmptyForm, body_optional=True, answers=answers.JobCancelled, codes=(*NO_JOB, Code.ALREADY_FINISHED)),
    Route("POST", "/api/jobs/{id}/redrive", "data", data.redrive,
          form=RedriveForm, body_optional=True, answers=answers.JobRedriven, codes=(*NO_JOB, Code.NOT_FAILED)),
    Route("GET", "/api/ledger", "data", ledger.ledger, "jobs", answers=answers.LedgerPage, query=query.LedgerQuery),
    Route("GET", "/admin/dlq", "data", admin.dlq, "admin", answers=answers.JobPage, query=query.DeadQuery),
    Route("POST", "/admin/dlq/redrive", "data", admin.redrive, "admin",
          form=RedriveManyForm, answers=answers.DeadRedriven),
    Route("GET", "/admin/queue", "data", admin.queue, "admin", answers=answers.Queue),
    Route("POST", "/admin/purge", "data", admin.purge, "admin", form=PurgeForm, answers=answers.Purged),
    Route("POST", "/admin/cancel", "data", admin.cancel, "admin", form=CancelManyForm, answers=answers.ManyCancelled),
    Route("POST", "/api/missions", "data", missions.submit, "submit",
          form=MissionForm, reader=missions.read_mission, batch=True, answers=answers.MissionMade,
          made=answers.MissionMade, codes=(*SUBMIT, Code.DEPENDENCY_CYCLE), headers=("Idempotency-Key",),
          follow="/api/missions/{mission_id}"),
    Route("GET", "/api/missions", "data", missions.missions, "jobs",
          answers=answers.MissionPage, query=query.PageQuery),
    Route("GET", "/api/missions/{id}", "data", missions.mission, "jobs",
          answers=answers.OneMission, codes=(Code.MISSION_NOT_FOUND,)),
    Route("POST", "/api/missions/{id}/cancel", "data", missions.cancel,
          form=EmptyForm, body_optional=True, answers=answers.MissionCancelled, codes=(Code.MISSION_NOT_FOUND,)),
    Route("POST", "/api/missions/{id}/redrive", "data", missions.redrive,
          form=EmptyForm, body_optional=True, answers=answers.MissionRedriven,
          codes=(Code.MISSION_NOT_FOUND, Code.QUEUE_FULL)),
    Route("POST", "/admin/pause", "data", standing.pause, "admin",
          form=PauseForm, body_optional=True, answers=answers.Pauses),
    Route("POST", "/admin/resume", "data", standing.resume, "admin",
          form=ResumeForm, body_optional=True, answers=answers.Pauses),
    Route("GET", "/admin/rate-limits/{source}", "data", standing.rate_limit, "admin",
          answers=answers.RateLimit, codes=NO_RATE),
    Route("PUT", "/admin/rate-limits/{source}", "data", standing.set_rate_limit, "admin",
          form=RateForm, answers=answers.RateLimit, codes=(Code.INVALID_FIELD,)),
    Route("DELETE", "/admin/rate-limits/{source}", "data", standing.drop_rate_limit, "admin",
          answers=answers.RateLimit, codes=NO_RATE),
)
# fmt: on
