"""What operators send: the bodies of the admin routes and of a redrive."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from sheratan_hub.web.forms import Form, Name

JOB_IDS_MAX = 1000
CHANGED_MAX = 100_000

JobIds = Annotated[list[Annotated[str, Meta(max_length=200)]], Meta(max_length=JOB_IDS_MAX)]
Many = Annotated[int, Meta(ge=1, le=CHANGED_MAX)]
Age = Annotated[float, Meta(ge=0, le=31_536_000)]


class RedriveForm(Form, frozen=True):
    """A redrive of one job; with `dependents` also of what was cancelled because it failed."""

    dependents: bool = False


class DeadFilter(Form, frozen=True):
    """Which dead letters; what is not given does not matter."""

    kind: Name | None = None
    source: Name | None = None
    mission_id: Name | None = None
    node_id: Name | None = None
    reason: Name | None = None


class RedriveManyForm(Form, frozen=True):
    """Dead letters to redrive: by id, or by what they have in common."""

    job_ids: JobIds | None = None
    filter: DeadFilter | None = None
    limit: Annotated[int, Meta(ge=1, le=JOB_IDS_MAX)] = 100
    cursor: Name | None = None
    rate_per_second: Annotated[float, Meta(ge=0.001, le=1_000_000)] | None = None


class WaitingFilter(Form, frozen=True):
    """Which waiting jobs; what is not given does not matter."""

    status: Literal["pending", "quarantined"] | None = None
    kind: Name | None = None
    source: Name | None = None
    mission_id: Name | None = None
    older_than_seconds: Age | None = None


class PurgeForm(Form, frozen=True):
    """Waiting jobs to be cancelled."""

    filter: WaitingFilter
    dry_run: bool = False
    limit: Many = 10_000
    cursor: Name | None = None


class UnfinishedFilter(Form, frozen=True):
    """Which unfinished jobs; what is not given does not matter."""

    status: Literal["pending", "quarantined", "running"] | None = None
    kind: Name | None = None
    source: Name | None = None
    mission_id: Name | None = None
    node_id: Name | None = None
    older_than_seconds: Age | None = None


class CancelManyForm(Form, frozen=True):
    """Jobs to cancel: by id, or by what they have in common."""

    job_ids: JobIds | None = None
    filter: UnfinishedFilter | None = None
    dry_run: bool = False
    limit: Many = 10_000
    cursor: Name | None = None


def one_of_two(form: RedriveManyForm | CancelManyForm) -> bool:
    """Whether exactly one of `job_ids` and `filter` was given."""
    return (form.job_ids is None) != (form.filter is None)


def labels(status: str, given: msgspec.Struct) -> tuple[str | None, ...]:
    """A filter as a row's labels: status, kind, source, mission, node."""
    return status, *(getattr(given, name, None) or None for name in ("kind", "source", "mission_id", "node_id"))
