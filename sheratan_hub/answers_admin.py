"""What the hub answers about missions, dead letters, limits and the queue as a whole, as types of the client.

As in `answers`, fields a newer hub adds are ignored, and those an older one lacks have a default.
"""

from __future__ import annotations

from typing import Any

from sheratan_hub.answers import Answer, Refusal, Submitted
from sheratan_hub.canonical import Raw


class Mission(Answer, frozen=True, kw_only=True):
    """A titled graph of jobs: `status` is what its `counts` tell, `progress` the part that is finished (0 to 1)."""

    mission_id: str
    status: str
    title: str | None = None
    metadata: dict[str, Any] = {}
    created_at: str | None = None
    jobs: int = 0
    counts: dict[str, int] = {}
    progress: float = 0.0


class MissionPage(Answer, frozen=True, kw_only=True):
    """One page of the list of missions."""

    missions: list[Mission] = []
    next_cursor: str | None = None


class SubmittedMission(Answer, frozen=True, kw_only=True):
    """A mission the hub has, and its jobs in the order they were given. `dedup`: it was known before."""

    mission_id: str
    dedup: bool = False
    jobs: list[Submitted] = []


class CancelledMission(Answer, frozen=True, kw_only=True):
    """How many of a mission's jobs were cancelled by this request, and how many of them have yet to stop."""

    mission_id: str
    cancelled: int = 0
    cancel_requested: int = 0


class RedrivenMission(Answer, frozen=True, kw_only=True):
    """How many of a mission's jobs run again, and for how many there was no room."""

    mission_id: str
    redriven: int = 0
    refused: int = 0


class Redriven(Answer, frozen=True, kw_only=True):
    """A job after a redrive. Not `redriven`: it was unfinished, and nothing changed."""

    job_id: str
    status: str
    redriven: bool = False
    redrives: int = 0
    not_before: str | None = None


class RefusedJob(Refusal, frozen=True, kw_only=True):
    """The hub's "no" to one job of several."""

    job_id: str = ""


class RedrivenSome(Answer, frozen=True, kw_only=True):
    """What became of the dead letters that were to be redriven, each in its place; `redriven` counts those that were.

    There may be more of them while `next_cursor` is set.
    """

    jobs: list[Redriven | RefusedJob] = []
    redriven: int = 0
    next_cursor: str | None = None


class RedrivenPage(Answer, frozen=True, kw_only=True):
    """The answer to a redrive of many, as it travels."""

    jobs: list[Raw] = []
    redriven: int = 0
    next_cursor: str | None = None


class Purged(Answer, frozen=True, kw_only=True):
    """How many waiting jobs a purge meant and cancelled. There may be more of them while `next_cursor` is set."""

    dry_run: bool = False
    matched: int = 0
    purged: int = 0
    next_cursor: str | None = None


class CancelledSome(Answer, frozen=True, kw_only=True):
    """How many jobs a cancel in bulk meant, ended, and asked to stop. There may be more while `next_cursor` is set."""

    dry_run: bool = False
    matched: int = 0
    cancelled: int = 0
    cancel_requested: int = 0
    next_cursor: str | None = None


class Pause(Answer, frozen=True, kw_only=True):
    """Jobs of `kind` (None: all) are not leased until `until` (None: until somebody resumes them)."""

    kind: str | None = None
    since: str | None = None
    until: str | None = None
    reason: str | None = None


class Pauses(Answer, frozen=True, kw_only=True):
    """The pauses that hold now."""

    pauses: list[Pause] = []


class Queue(Answer, frozen=True, kw_only=True):
    """The queue at a glance. `depth`, `inflight` and `dead_letters` tell a number and its limit each."""

    counts: dict[str, int] = {}
    depth: dict[str, Any] = {}
    inflight: dict[str, Any] = {}
    dead_letters: dict[str, Any] = {}
    oldest_ready_seconds: float | None = None
    lane_count: int = 0
    lanes: list[dict[str, Any]] = []
    pauses: list[Pause] = []
    throttled_sources: list[str] = []
    commands_waiting: int = 0
    long_polls: int = 0


class RateLimit(Answer, frozen=True, kw_only=True):
    """What a source may do: submits a minute, jobs running at once (0: without that limit; None: there is no limit).

    `origin` is stored (set at run time) or configured.
    """

    source: str
    per_minute: int | None = None
    concurrent: int | None = None
    origin: str | None = None
    running: int = 0
    throttled: bool = False


class LedgerEvent(Answer, frozen=True, kw_only=True):
    """One transition, as the ledger keeps it."""

    seq: int
    ts: str
    event: str
    actor: str | None = None
    job_id: str | None = None
    trace_id: str | None = None
    zone: str | None = None
    artifact_path: str | None = None
    meta: Any = None


class LedgerPage(Answer, frozen=True, kw_only=True):
    """One page of the ledger."""

    events: list[LedgerEvent] = []
    next_cursor: str | None = None
