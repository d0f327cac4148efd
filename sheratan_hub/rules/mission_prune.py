"""Retention of missions (design rule 15): the counts of one go with its row, once all of its jobs are gone.

How many of a mission's jobs were pruned is a facet beside those of their states, so that whoever prunes a job knows
whether it is the last. A mission that was submitted as such then waits on its agenda for its own time to be over; an
id that only jobs have named is forgotten with the last of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import msgspec

from sheratan_hub.rules.command import Decision, Event, Need, Scene, due_wants
from sheratan_hub.rules.jobs import Job
from sheratan_hub.rules.missions import Mission, facets_of, left_of, mission_key, mission_of, names_mission
from sheratan_hub.rules.view import View
from sheratan_hub.storage import Key, Row, Wants

AGENDA = "prune.mission"
"""Missions all of whose jobs are gone."""

MISSIONS_MAX = 50
"""So many are looked at in one transaction."""

WHENEVER = 2**62
"""Later than any time."""


class Left(msgspec.Struct, frozen=True):
    """What a prune of jobs does to their missions: rows to put, facets to forget."""

    put: tuple[Row, ...] = ()
    forgotten: tuple[str, ...] = ()


def without(view: View, pruned: Iterable[Job]) -> Left:
    """What becomes of missions when these jobs go."""
    going: dict[str, list[Job]] = {}
    for job in pruned:
        if job.mission_id is not None:
            going.setdefault(job.mission_id, []).append(job)
    _ask(view, going)
    put: list[Row] = []
    forgotten: list[str] = []
    for mission_id, jobs in going.items():
        over = left_of(view, mission_id) <= len(jobs)
        row = view.row(*mission_key(mission_id))
        if row is not None:
            mission = mission_of(row)
            last_end = max(mission.last_end, *(job.finished_at for job in jobs))
            put.append(mission.with_(last_end=last_end, over=over).row)
        elif over:
            forgotten += facets_of(mission_id)
    return Left(tuple(put), tuple(forgotten))


class MissionsPruned(msgspec.Struct, frozen=True, gc=False):
    """How many missions were due, how many went, and when the next is due (ms, None: unknown)."""

    looked: int
    gone: int
    next_at: int | None = None


class PruneMissions(msgspec.Struct, frozen=True, gc=False):
    """Forget up to `limit` missions without jobs whose time is over, with their keys and counts."""

    limit: int = MISSIONS_MAX

    def wants(self, scene: Scene) -> Wants:
        """The first that are over, due by now or not: what is left tells when to come again."""
        return due_wants(AGENDA, WHENEVER, self.limit)

    def decide(self, view: View) -> Decision:
        """One that jobs have joined meanwhile waits until they are gone. The answer is `MissionsPruned`."""
        limits = view.scene.limits
        rows = view.due(AGENDA)
        due = [row for row in rows if row.due_at + limits.mission_kept_ms <= view.now]
        missions = [mission_of(row) for row in due]
        _ask(view, [mission.id for mission in missions])
        keys = {mission.id: Key("mission_key", mission.key) for mission in missions if mission.key is not None}
        if missing := {key for key in keys.values() if not view.has(key.kind, key.id, locked=True)}:
            raise Need(Wants(keys=missing))
        next_at = rows[len(due)].due_at + limits.mission_kept_ms if len(due) < len(rows) else None
        put: list[Row] = []
        gone: list[Key] = []
        pruned: list[str] = []
        for row, mission in zip(due, missions, strict=True):
            until = mission.over_at + limits.key_ttl_ms if mission.key is not None else 0
            if left_of(view, mission.id) > 0:
                put.append(mission.with_(over=False).row)
            elif until > view.now:
                put.append(msgspec.structs.replace(row, due_at=until - limits.mission_kept_ms))
                next_at = until if next_at is None else min(next_at, until)
            else:
                pruned.append(mission.id)
                gone += [mission_key(mission.id), *_key_of(view, mission, keys)]
        events = tuple(Event(view.now, "mission.pruned", "hub", meta={"mission_id": id}) for id in pruned)
        forgotten = tuple(facet for id in pruned for facet in facets_of(id))
        answer = MissionsPruned(len(due), len(pruned), next_at)
        return Decision(answer, put=tuple(put), gone=tuple(gone), events=events, forgotten=forgotten)


def _key_of(view: View, mission: Mission, keys: dict[str, Key]) -> list[Key]:
    """The row of its idempotency key, unless that names another mission by now."""
    key = keys.get(mission.id)
    row = view.row(key.kind, key.id) if key is not None else None
    return [row.key] if row is not None and names_mission(row) == mission.id else []


def _ask(view: View, mission_ids: Iterable[str]) -> None:
    """Load their rows and counts, all at once."""
    ids: Sequence[str] = list(mission_ids)
    facets = {facet for id in ids for facet in facets_of(id)} - set(view.counted())
    missing = {key for id in ids if not view.has(*(key := mission_key(id)), locked=True)}
    if facets or missing:
        raise Need(Wants(keys=missing, counts=facets))
