"""What clients send: the request bodies of both planes, and the commands that they become."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from sheratan_hub.canonical import NULL, Raw, payload_sha256
from sheratan_hub.rules.command import Code, Refused
from sheratan_hub.rules.edges import PARENTS_MAX
from sheratan_hub.rules.jobs import OnFailure
from sheratan_hub.rules.policy import Policy
from sheratan_hub.rules.submit import Submit
from sheratan_hub.tracing import traceparent_of

Name = Annotated[str, Meta(min_length=1, max_length=200)]
Text = Annotated[str, Meta(max_length=200)]
Words = Annotated[list[Annotated[str, Meta(min_length=1, max_length=100)]], Meta(max_length=100)]
Seconds = Annotated[float, Meta(ge=0, le=31_536_000)]
Moment = Annotated[str, Meta(extra_json_schema={"format": "date-time"})]
Whole = Annotated[int, Meta(ge=0, le=1_000_000_000)]

LAST_MOMENT_MS = 253_370_764_800_000
"""The year 9999: RFC 3339 has four digits for a year."""

LEVELS = {"CRITICAL": 0, "HIGH": 1, "NORMAL": 2, "LOW": 3}


class Form(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A body of an `/api` route: a field that is not listed is refused with 422."""


class JobForm(Form, frozen=True):
    """A job to submit."""

    kind: Name
    params: Raw = NULL
    idempotency_key: Annotated[str, Meta(min_length=1, max_length=512)] | None = None
    source: Text | None = None
    mission_id: Name | None = None
    task_id: Name | None = None
    priority: Annotated[int, Meta(ge=0, le=3)] | Literal["CRITICAL", "HIGH", "NORMAL", "LOW"] = 2
    timeout_seconds: Annotated[float, Meta(ge=0.001, le=31_536_000)] = 300
    max_retries: Annotated[int, Meta(ge=0, le=1000)] | None = None
    retry_backoff: Literal["exponential", "linear"] = "exponential"
    required_capabilities: Words | None = None
    not_before: Moment | None = None
    delay_seconds: Seconds = 0
    expires_in_seconds: Annotated[float, Meta(ge=0.001, le=31_536_000)] | None = None
    delivery: Literal["at_least_once", "at_most_once"] = "at_least_once"
    depends_on: Annotated[list[Name], Meta(max_length=PARENTS_MAX)] | None = None
    on_dependency_failure: OnFailure = "cancel"
    ref: Name | None = None
    traceparent: str | None = None

    def command(self, job_id: str, key: str | None = None, traceparent: str | None = None) -> Submit:
        """The command; `key` and `traceparent` are those of the headers, if any. Refused with `invalid_field`."""
        if key is not None and self.idempotency_key not in (None, key):
            raise Refused(Code.INVALID_FIELD, "the Idempotency-Key header and idempotency_key differ")
        key = self.idempotency_key if key is None else key
        return Submit(
            job_id,
            self.kind,
            bytes(self.params),
            key,
            payload_sha256(self.kind, bytes(self.params)) if key is not None else "",
            self.source or "",
            self.mission_id,
            self.task_id,
            LEVELS[self.priority] if isinstance(self.priority, str) else self.priority,
            round(self.timeout_seconds * 1000),
            self.max_retries,
            self.retry_backoff,
            tuple(sorted(set(self.required_capabilities))) if self.required_capabilities else (),
            0 if self.not_before is None else moment_ms("not_before", self.not_before),
            round(self.delay_seconds * 1000),
            round(self.expires_in_seconds * 1000) if self.expires_in_seconds else 0,
            self.delivery == "at_most_once",
            traceparent_of(self.traceparent) or traceparent,
            tuple(self.depends_on) if self.depends_on else (),
            self.on_dependency_failure,
        )


class FleetJobForm(JobForm, frozen=True, forbid_unknown_fields=False):
    """The same on the fleet's route: unknown fields are ignored."""


class BatchForm(Form, frozen=True):
    """Several jobs, each with an outcome of its own unless `atomic`."""

    jobs: list[Raw]
    atomic: bool = False


class MissionForm(Form, frozen=True):
    """A mission to begin: jobs that belong together."""

    title: Annotated[str, Meta(min_length=1, max_length=500)]
    jobs: tuple[Raw, ...] = ()
    metadata: dict[str, Any] | None = None
    idempotency_key: Annotated[str, Meta(min_length=1, max_length=512)] | None = None


class PullForm(Form, frozen=True):
    """A node asks for work."""

    node_id: Name
    max: Annotated[int, Meta(ge=1, le=100)] = 1
    wait_seconds: Annotated[float, Meta(ge=0, le=30)] = 0
    pull_id: Name | None = None
    capabilities: Words | None = None
    kinds: Words | None = None


class FleetPullForm(PullForm, frozen=True, forbid_unknown_fields=False):
    """The same on the fleet's routes, where the node may be named by the path or the query."""

    node_id: Annotated[str, Meta(max_length=200)] = ""


class IntegrityForm(Form, frozen=True, forbid_unknown_fields=False):
    """How a result proves itself."""

    mode: Literal["none", "sha256", "hmac"] = "sha256"
    sha256: str | None = None
    sig: str | None = None


class NextForm(PullForm, frozen=True, forbid_unknown_fields=False):
    """The same in a result on the fleet's route."""


class ReportForm(Form, frozen=True):
    """What became of a delivery."""

    ok: bool
    lease_id: Name | None = None
    node_id: Name | None = None
    result: Raw = NULL
    error: Raw = NULL
    retry: bool = True
    retry_after_seconds: Seconds | None = None
    integrity: IntegrityForm | None = None


class ResultForm(ReportForm, frozen=True):
    """A delivery's result, and a pull for the next ones."""

    pull: PullForm | None = None


class NamedReportForm(ReportForm, frozen=True, kw_only=True):
    """One of several results: it names its job."""

    job_id: Name


class FleetResultForm(NamedReportForm, frozen=True, forbid_unknown_fields=False, kw_only=True):
    """A result and a pull on the fleet's route: unknown fields are ignored."""

    pull: NextForm | None = None


class ResultsForm(Form, frozen=True):
    """Several results, each with an outcome of its own, and a pull for the next ones."""

    results: list[Raw]
    pull: PullForm | None = None


class ExtendForm(Form, frozen=True):
    """Let a lease end `seconds` from now."""

    lease_id: Name
    seconds: Annotated[float, Meta(gt=0, le=86_400)] | None = None
    node_id: Name | None = None


class ReleaseForm(Form, frozen=True):
    """Give a job back."""

    lease_id: Name
    node_id: Name | None = None


class RotationForm(Form, frozen=True):
    """Begin a rotation of the shared token: `until` a moment, or for so many `seconds`."""

    until: Moment | None = None
    seconds: Annotated[float, Meta(ge=1, le=31_536_000)] | None = None
    token: Annotated[str, Meta(min_length=16, max_length=512, pattern="^[!-~]+$")] | None = None

    def deadline_ms(self) -> tuple[int, int]:
        """(the moment in ms or 0, the duration in ms or 0). Refused with `invalid_field` unless one is given."""
        if (self.until is None) == (self.seconds is None):
            raise Refused(Code.INVALID_FIELD, "either until or seconds must be given - at `$.until`")
        return 0 if self.until is None else moment_ms("until", self.until), round((self.seconds or 0) * 1000)


class AccessForm(Form, frozen=True):
    """Make a scoped token."""

    role: Literal["node", "producer", "viewer", "admin"]
    node_id: Name | None = None
    expires_in_seconds: Annotated[float, Meta(ge=1, le=315_360_000)] | None = None
    name: Text | None = None


class PolicyForm(Form, frozen=True):
    """A policy to keep as the next version."""

    policy: Policy
    note: Annotated[str, Meta(max_length=1000)] = ""


class PlanForm(Form, frozen=True):
    """A draft, or a version, to be tried against what is there now."""

    policy: Policy | None = None
    version: Annotated[int, Meta(ge=0, le=999_999_999)] | None = None


class EmptyForm(Form, frozen=True):
    """Nothing; an empty body will do."""


class AttestationForm(Form, frozen=True, forbid_unknown_fields=False):
    """What a node says of itself."""

    schema: Any = None
    build_id: Text | None = None
    capability_hash: Text | None = None
    runtime: Any = None


class BeatForm(Form, frozen=True, forbid_unknown_fields=False):
    """A heartbeat. Its other fields become labels when they are scalar."""

    node_id: Text | None = None
    host_id: Text | None = None
    host: Text | None = None
    name: Text | None = None
    health: Literal["GREEN", "YELLOW", "RED"] = "GREEN"
    status: Literal["online", "busy"] = "online"
    zone: Text | None = None
    capabilities: Words | None = None
    current_jobs: Whole | None = None
    max_concurrent: Whole | None = None
    boot_id: Text | None = None
    endpoint: Annotated[str, Meta(max_length=500)] | None = None
    ts_utc: Any = None
    timestamp: Any = None
    attestation: AttestationForm | None = None


def moment_ms(name: str, text: str) -> int:
    """An RFC 3339 time in ms since 1970. Refused with `invalid_field`, naming the field."""
    try:
        moment = datetime.fromisoformat(text)
    except ValueError as error:
        raise Refused(Code.INVALID_FIELD, f"{name} is not an RFC 3339 time - at `$.{name}`") from error
    if moment.tzinfo is None:
        raise Refused(Code.INVALID_FIELD, f"{name} names no zone; end it with Z - at `$.{name}`")
    at = int(moment.timestamp() * 1000)
    if at > LAST_MOMENT_MS:
        raise Refused(Code.INVALID_FIELD, f"{name} is too far away - at `$.{name}`")
    return at
