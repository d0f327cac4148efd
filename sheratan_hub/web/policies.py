"""The control plane's handlers of policies: list, show, create, plan, activate."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
from aiohttp import hdrs

from sheratan_hub.rules.command import Code, Refused
from sheratan_hub.rules.lanes import lane_name, read_lane
from sheratan_hub.rules.nodes import Node, node_of
from sheratan_hub.rules.plan import LaneChange, Plan, plan
from sheratan_hub.rules.policies import (
    ActivatePolicy,
    CreatePolicy,
    Pointer,
    Snapshot,
    judge_of,
    snapshot_of,
)
from sheratan_hub.rules.policy import Judge
from sheratan_hub.web.answer import Answer
from sheratan_hub.web.plane import Call
from sheratan_hub.web.query import cursor, page_limit
from sheratan_hub.web.render import reply, rfc3339_or_none

LANES_MAX = 5000
"""So many lanes of waiting jobs are looked at by one plan; the answer says if there are more."""

STRANDED_MAX = 100
"""The jobs of so many lanes are counted."""

COUNTED_MAX = 1000
"""Waiting jobs of a lane are counted among so many of their kind and source."""


async def policies(call: Call) -> Answer:
    """GET /api/policies: the versions of the policy, oldest first, and which is active."""
    pointer, page = await call.hub.policies(cursor(call.request), page_limit(call.request))
    versions = [_shown(snapshot_of(row), pointer, whole=False) for row in page.rows]
    answer = {"ok": True, "active": pointer.active, "policies": versions, "next_cursor": page.next}
    return _tagged(reply(answer), pointer.active)


async def policy(call: Call) -> Answer:
    """GET /api/policies/{version}: one version, whole; the `ETag` names the one that is active."""
    pointer, snapshot = (await call.hub.policies(limit=1))[0], await _found(call)
    return _tagged(reply({"ok": True, **_shown(snapshot, pointer, whole=True)}), pointer.active)


async def create(call: Call) -> Answer:
    """POST /api/policies: keep a policy as the next version. It is not active before it is activated."""
    made: Snapshot = await call.hub.execute(CreatePolicy(call.form.policy, call.form.note), call.origin)
    pointer = Pointer(active=call.hub.judge.version)
    return reply({"ok": True, **_shown(made, pointer, whole=True)}, 201)


async def activate(call: Call) -> Answer:
    """POST /api/policies/{version}/activate: put a version in force; `If-Match` is the active one, or `*`."""
    version = _version(call)
    given = call.request.headers.get(hdrs.IF_MATCH)
    if given is None:
        raise Refused(Code.PRECONDITION_REQUIRED, 'If-Match must name the version that is active now, as in "3"')
    active = call.hub.judge.version if given.strip() == "*" else _tag(given)
    moved: Pointer = await call.hub.execute(ActivatePolicy(version, active), call.origin)
    return _tagged(reply({"ok": True, "version": moved.active, "sha256": moved.active_sha256 or None}), moved.active)


async def planned(call: Call) -> Answer:
    """POST /api/policies/plan: what a draft, or a version, would change for the live nodes and the waiting jobs."""
    draft, version = call.form.policy, call.form.version
    if (draft is None) == (version is None):
        raise Refused(Code.INVALID_FIELD, "give a policy, or the version of one")
    if draft is not None:
        after = Judge(draft)
    else:
        found = await call.hub.policy(version) if version else None
        if version and found is None:
            raise Refused(Code.POLICY_NOT_FOUND, f"there is no policy version {version}")
        after = judge_of(found)
    nodes = await _live_nodes(call)
    names = sorted(call.hub.committer.lanes)[: LANES_MAX + 1]
    before = Judge(call.hub.judge.policy, call.hub.judge.version)
    change = await asyncio.to_thread(plan, before, after, nodes, list(map(read_lane, names[:LANES_MAX])))
    return reply(await _told(call, before, change, len(names) > LANES_MAX))


async def _told(call: Call, before: Judge, change: Plan, cut: bool) -> dict[str, Any]:
    stranded = [one for one in change.lanes if one.before and not one.after]
    counted = [await _waiting_jobs(call, one) for one in stranded[:STRANDED_MAX]]
    return {
        "ok": True,
        "active": before.version,
        "nodes": [one._asdict() for one in change.nodes],
        "waiting": [_lane(one) for one in change.lanes],
        "stranded_jobs": sum(jobs for jobs, _ in counted),
        "more": cut or len(stranded) > STRANDED_MAX or any(more for _, more in counted),
    }


def _lane(change: LaneChange) -> dict[str, Any]:
    lane = change.lane
    return {
        "priority": lane.level,
        "kind": lane.kind,
        "source": lane.source or None,
        "required_capabilities": list(lane.needs),
        "nodes_before": change.before,
        "nodes_after": change.after,
        "submit_allowed": change.submit,
    }


async def _waiting_jobs(call: Call, change: LaneChange) -> tuple[int, bool]:
    """How many wait in the lane, counted among so many of their kind and source; whether there are more of these."""
    lane, name = change.lane, lane_name(*change.lane)
    page = await call.hub.page("job", ("pending", lane.kind, lane.source or None), None, COUNTED_MAX)
    return sum(row.lane == name for row in page.rows), page.next is not None


async def _live_nodes(call: Call) -> list[Node]:
    nodes: list[Node] = []
    after: str | None = None
    while True:
        page = await call.hub.page("node", (), after, 1000)
        nodes += (node for node in map(node_of, page.rows) if call.hub.state_of(node) != "DEAD")
        if page.next is None:
            return nodes
        after = page.next
        await call.services.clock.sleep(0)


async def _found(call: Call) -> Snapshot:
    snapshot = await call.hub.policy(_version(call))
    if snapshot is None:
        raise Refused(Code.POLICY_NOT_FOUND, f"there is no policy version {call.params['version'][:20]}")
    return snapshot


def _version(call: Call) -> int:
    text = call.params["version"]
    if not (text.isascii() and text.isdigit() and len(text) <= 9):
        raise Refused(Code.POLICY_NOT_FOUND, f"there is no policy version {text[:20]}")
    return int(text)


def _tag(given: str) -> int:
    """The version that an entity tag names."""
    text = given.strip().removeprefix("W/").strip('"')
    if not (text.isascii() and text.isdigit() and len(text) <= 9):
        raise Refused(Code.PRECONDITION_FAILED, "If-Match names no version; the active one stands in the ETag")
    return int(text)


def _tagged(answer: Answer, active: int) -> Answer:
    answer.more[hdrs.ETAG] = f'"{active}"'
    return answer


def _shown(snapshot: Snapshot, pointer: Pointer, *, whole: bool) -> dict[str, Any]:
    shown = {
        "version": snapshot.version,
        "sha256": snapshot.sha256,
        "prev_sha256": snapshot.prev_sha256,
        "created_at": rfc3339_or_none(snapshot.created_at),
        "active": snapshot.version == pointer.active,
        "title": snapshot.policy.title,
        "note": snapshot.note,
        "file": snapshot.file or None,
        "rules": len(snapshot.policy.rules),
    }
    return {**shown, "policy": msgspec.to_builtins(snapshot.policy)} if whole else shown
