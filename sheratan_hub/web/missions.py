"""The data plane's handlers for missions: submit, list, show, cancel, redrive."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import msgspec

from sheratan_hub.clock import rfc3339
from sheratan_hub.config import Settings
from sheratan_hub.rules.command import Code, Command, Refused
from sheratan_hub.rules.finish import Cancel, Cancelled
from sheratan_hub.rules.graph import Member, in_entry, plan
from sheratan_hub.rules.missions import (
    Made,
    MakeMission,
    Mission,
    RedriveMember,
    mission_key,
    mission_of,
    mission_sha256,
    prefix_of,
    progress,
)
from sheratan_hub.web.answer import Answer
from sheratan_hub.web.body import decode, refuse_long
from sheratan_hub.web.data import batch_answer, batch_entry, header_key, tightest
from sheratan_hub.web.errors import quota_headers
from sheratan_hub.web.forms import MissionForm
from sheratan_hub.web.graphs import checked_graph
from sheratan_hub.web.plane import Call
from sheratan_hub.web.query import cursor, page_limit
from sheratan_hub.web.render import listed, reply

PIECE = 100
"""How many jobs of a mission one transaction cancels or redrives."""


class AskedMission(msgspec.Struct, frozen=True):
    """A mission as asked for, and the text that an idempotency key is bound to."""

    form: MissionForm
    body: bytes


def read_mission(body: bytes, doc: dict[str, Any], settings: Settings) -> AskedMission:
    """The body of POST /api/missions."""
    refuse_long(doc.get("jobs"), settings.limits.batch_jobs)
    return AskedMission(decode(body, MissionForm), body)


async def submit(call: Call) -> Answer:
    """POST /api/missions: submit a titled graph of jobs, all or none."""
    asked: AskedMission = call.form
    key = header_key(call)
    if key is not None and asked.form.idempotency_key not in (None, key):
        raise Refused(Code.INVALID_FIELD, "the Idempotency-Key header and idempotency_key differ")
    key = asked.form.idempotency_key if key is None else key
    mission = Mission(
        call.services.clock.job_id(),
        asked.form.title,
        call.services.clock.now(),
        msgspec.Raw(msgspec.json.encode(asked.form.metadata or {})),
    )
    members = [_member(call, bytes(raw), place, mission.id) for place, raw in enumerate(asked.form.jobs)]
    graph = await checked_graph(call.hub, plan(members, atomic=True))
    command = MakeMission(mission, graph, key, mission_sha256(asked.body) if key is not None else "")
    made: Made = await call.hub.execute(command, call.origin)
    submits = (member.submit for member in members)
    jobs = [batch_answer(call, one, outcome) for one, outcome in zip(submits, made.jobs, strict=True)]
    answer = {"ok": True, "mission_id": made.mission_id, "dedup": made.dedup, "jobs": jobs}
    return reply(answer, 200 if made.dedup else 201, quota_headers(tightest(made.jobs)))


def _member(call: Call, raw: bytes, place: int, mission_id: str) -> Member:
    """An entry, which belongs to this mission and no other. Refused as the entry is."""
    member = batch_entry(call, raw)
    if isinstance(member.submit, Refused):
        raise in_entry(member.submit, place, "of the mission")
    if member.submit.mission_id is not None:
        raise Refused(Code.INVALID_FIELD, f"entry {place} of the mission names another - at `$.jobs[].mission_id`")
    return Member(member.ref, msgspec.structs.replace(member.submit, mission_id=mission_id))


async def missions(call: Call) -> Answer:
    """GET /api/missions: the missions that were submitted as such, newest first."""
    page = await call.hub.page("mission", (), cursor(call.request), page_limit(call.request), newest=True)
    return listed("missions", [await _shown(call, row.id, mission_of(row)) for row in page.rows], page.next)


async def mission(call: Call) -> Answer:
    """GET /api/missions/{id}: one mission, also one that only single jobs have named."""
    mission_id = call.params["id"]
    return reply({"ok": True, **await _shown(call, mission_id, await _known(call, mission_id))})


async def cancel(call: Call) -> Answer:
    """POST /api/missions/{id}/cancel: cancel its unfinished jobs, each as `POST /api/jobs/{id}/cancel` does."""
    outcomes = await _each(call, Cancel, ("pending", "running", "quarantined"))
    asked = [one for one in outcomes if isinstance(one, Cancelled)]
    running = sum(one.cancel_requested for one in asked)
    answer = {"cancelled": len(asked) - running, "cancel_requested": running}
    return reply({"ok": True, "mission_id": call.params["id"], **answer})


async def redrive(call: Call) -> Answer:
    """POST /api/missions/{id}/redrive: have all its jobs that failed or were cancelled run again."""
    outcomes = await _each(call, RedriveMember, ("failed", "cancelled"))
    redriven = sum(one is True for one in outcomes)
    full = next((one for one in outcomes if isinstance(one, Refused)), None)
    if full is not None and not redriven:
        raise full
    refused = sum(isinstance(one, Refused) for one in outcomes)
    return reply({"ok": True, "mission_id": call.params["id"], "redriven": redriven, "refused": refused})


async def _each(call: Call, act: Callable[[str], Command], statuses: Collection[str]) -> list[Any]:
    """What became of each job of the mission in these states: piece by piece, so that nobody waits for long.

    If it is cut off in the middle, what is done is done, and asking again does the rest.
    """
    mission_id = call.params["id"]
    await _known(call, mission_id)
    outcomes: list[Any] = []
    after: str | None = None
    while True:
        page = await call.hub.page("job", (None, None, None, mission_id, None), after, PIECE)
        commands = [act(row.id) for row in page.rows if row.labels[0] in statuses]
        if commands:
            outcomes += await call.hub.execute_many(commands, call.origin)
        bug = next((one for one in outcomes if isinstance(one, Exception) and not isinstance(one, Refused)), None)
        if bug is not None:
            raise bug
        after = page.next
        if after is None:
            return outcomes


async def _known(call: Call, mission_id: str) -> Mission | None:
    """Its document; None if only single jobs have named it. Refused with `mission_not_found`."""
    rows = await call.hub.fetch([mission_key(mission_id)])
    if rows:
        return mission_of(rows[0])
    if not progress(mission_id, await call.hub.counts(prefix_of(mission_id))).jobs:
        raise Refused(Code.MISSION_NOT_FOUND, f"there is no mission {mission_id[:200]}, and no job names it")
    return None


async def _shown(call: Call, mission_id: str, mission: Mission | None) -> dict[str, Any]:
    told = progress(mission_id, await call.hub.counts(prefix_of(mission_id)))
    return {
        "mission_id": mission_id,
        "title": mission.title if mission else None,
        "status": told.status,
        "metadata": mission.metadata if mission else {},
        "created_at": rfc3339(mission.created_at) if mission else None,
        "jobs": told.jobs,
        "counts": told.counts,
        "progress": told.progress,
    }
