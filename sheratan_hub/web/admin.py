"""The operators' handlers: dead letters, redrive, purge, cancel in bulk, the queue at a glance.

Each works through its jobs some hundred a transaction, so that nobody waits long behind it; each tells `Call.done`
what it did as it goes, for the audit log.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from sheratan_hub.clock import rfc3339
from sheratan_hub.rules.command import ORDERS, Code, Command, Refused
from sheratan_hub.rules.finish import Cancel, Cancelled
from sheratan_hub.rules.jobs import REASONS
from sheratan_hub.rules.lanes import read_lane
from sheratan_hub.rules.purge import Purge
from sheratan_hub.rules.redrive import Redrive, Redriven
from sheratan_hub.web.admin_forms import CancelManyForm, PurgeForm, RedriveManyForm, labels, one_of_two
from sheratan_hub.web.answer import Answer
from sheratan_hub.web.errors import entry
from sheratan_hub.web.history import histories
from sheratan_hub.web.plane import Call
from sheratan_hub.web.query import cursor, page_limit, word
from sheratan_hub.web.render import job_answer, listed, redriven_answer, reply
from sheratan_hub.web.standing import pauses_answer
from sheratan_hub.web.walking import CHUNK, Keep, Walk, everyone, read

PAGE_EXAMINED, PAGE_BYTES = 5000, 4 * 1024 * 1024
"""A page of dead letters ends after so many looked at, or so many bytes told."""

LANES_TOLD = 100


async def dlq(call: Call) -> Answer:
    """GET /admin/dlq: the failed jobs, the last submitted first."""
    names = ("kind", "source", "mission_id", "node_id")
    asked = ("failed", *(word(call.request, name) for name in names))
    order, reason = word(call.request, "order") or "newest", word(call.request, "reason")
    if order not in ("newest", "oldest"):
        raise Refused(Code.INVALID_FIELD, "order must be newest or oldest")
    if reason is not None and reason not in REASONS:
        raise Refused(Code.INVALID_FIELD, f"reason must be one of {', '.join(REASONS)}")
    most, size = page_limit(call.request), 0
    walk = Walk(call.hub, asked, _because(reason), cursor(call.request), most, PAGE_EXAMINED, newest=order == "newest")
    answers: list[Any] = []
    async for jobs in walk:
        params, past = await call.hub.params(jobs), await histories(call.hub, jobs)
        answers += (job_answer(job, params, history=past[job.id]) for job in jobs)
        size += sum(len(bytes(job.error)) + len(bytes(job.params)) for job in jobs) + sum(map(len, params.values()))
        if size > PAGE_BYTES:
            break
    call.done = {"jobs": len(answers)}
    return listed("jobs", answers, walk.next)


async def redrive(call: Call) -> Answer:
    """POST /admin/dlq/redrive: have dead letters run again, at once or so many a second."""
    form: RedriveManyForm = call.form
    _one_of_two(form)
    call.done = done = {"redriven": 0}
    outcomes: list[dict[str, Any]] = []
    after: str | None = None
    if form.job_ids is not None:
        for start in range(0, len(form.job_ids), CHUNK):
            outcomes += await _redrive(call, form.job_ids[start : start + CHUNK], done)
    elif form.filter is not None:
        walk = Walk(call.hub, labels("failed", form.filter), _because(form.filter.reason), form.cursor, form.limit)
        async for jobs in walk:
            outcomes += await _redrive(call, [job.id for job in jobs], done)
        after = walk.next
    return reply({"ok": True, "jobs": outcomes, "redriven": done["redriven"], "next_cursor": after})


async def _redrive(call: Call, ids: Sequence[str], done: dict[str, int]) -> list[dict[str, Any]]:
    """One outcome each, in order. Given a rate, the n-th job that goes back waits for its place."""
    rate, told = call.form.rate_per_second, []
    delays = (0 if rate is None else int((done["redriven"] + place) * 1000 / rate) for place in range(len(ids)))
    commands = [Redrive(id, delay, "operator") for id, delay in zip(ids, delays, strict=True)]
    for id, outcome in zip(ids, await _execute(call, commands), strict=True):
        if isinstance(outcome, Redriven):
            done["redriven"] += outcome.changed
            told.append(redriven_answer(outcome))
        else:
            told.append({"job_id": id, **entry(outcome)})
    return told


async def purge(call: Call) -> Answer:
    """POST /admin/purge: cancel waiting jobs, with the reason PURGED."""
    form: PurgeForm = call.form
    call.done = done = {"dry_run": form.dry_run, "matched": 0, "purged": 0}
    status = form.filter.status
    after = await _each(call, (status,) if status else ("pending", "quarantined"), Purge, done, "purged")
    return reply({"ok": True, **done, "next_cursor": after})


async def cancel(call: Call) -> Answer:
    """POST /admin/cancel: cancel jobs; running ones are asked to stop."""
    form: CancelManyForm = call.form
    _one_of_two(form)
    call.done = done = {"dry_run": form.dry_run, "matched": 0, "cancelled": 0, "cancel_requested": 0}
    if form.job_ids is None:
        status = form.filter.status if form.filter is not None else None
        statuses = (status,) if status else ("pending", "quarantined", "running")
        after = await _each(call, statuses, Cancel, done, "cancelled")
        return reply({"ok": True, **done, "next_cursor": after})
    done["matched"] = len(form.job_ids)
    outcomes: list[dict[str, Any]] = []
    for start in range(0, 0 if form.dry_run else len(form.job_ids), CHUNK):
        ids = form.job_ids[start : start + CHUNK]
        found = await _execute(call, [Cancel(id) for id in ids])
        _count(found, done, "cancelled")
        outcomes += (_cancelled(id, outcome) for id, outcome in zip(ids, found, strict=True))
    return reply({"ok": True, **done, "jobs": outcomes, "next_cursor": None})


def _cancelled(id: str, outcome: Any) -> dict[str, Any]:
    if isinstance(outcome, Cancelled):
        asked = outcome.cancel_requested
        return {"ok": True, "job_id": id, "status": outcome.status, "cancel_requested": asked}
    return {"job_id": id, **entry(outcome)}


async def _each(
    call: Call, statuses: Sequence[str], command: Callable[[str], Command], done: dict[str, int], name: str
) -> str | None:
    """Give each job that the filter means its command, up to the limit; where to go on.

    A cursor names the state and the id after which to go on: `running:ID`.
    """
    form: PurgeForm | CancelManyForm = call.form
    assert form.filter is not None  # noqa: S101
    first, after = _place(form.cursor, statuses)
    age = form.filter.older_than_seconds
    keep = _before(None if age is None else call.services.clock.now() - int(age * 1000))
    for status in statuses[statuses.index(first) :]:
        walk = Walk(call.hub, labels(status, form.filter), keep, after, form.limit - done["matched"])
        async for jobs in walk:
            done["matched"] += len(jobs)
            if not form.dry_run:
                _count(await _execute(call, [command(job.id) for job in jobs]), done, name)
        if walk.next is not None:
            return f"{status}:{walk.next}"
        after = None
        if done["matched"] >= form.limit and status != statuses[-1]:
            return f"{statuses[statuses.index(status) + 1]}:"
    return None


def _because(reason: str | None) -> Keep:
    return everyone if reason is None else lambda job: job.reason == reason


def _before(moment: int | None) -> Keep:
    return everyone if moment is None else lambda job: job.created_at <= moment


def _place(given: str | None, statuses: Sequence[str]) -> tuple[str, str | None]:
    if given is None:
        return statuses[0], None
    status, colon, after = given.partition(":")
    if status not in statuses or not colon:
        raise Refused(Code.INVALID_FIELD, "cursor is none of this list - at `$.cursor`")
    return status, after or None


def _count(outcomes: Sequence[Any], done: dict[str, int], name: str) -> None:
    for outcome in outcomes:
        if isinstance(outcome, Cancelled):
            done[name] += outcome.status == "cancelled"
            if outcome.cancel_requested:
                done["cancel_requested"] = done.get("cancel_requested", 0) + 1


async def queue(call: Call) -> Answer:
    """GET /admin/queue: how full the queue is, what waits longest, what was put aside."""
    counts = await call.hub.counts()
    now, limits = call.services.clock.now(), call.hub.limits
    heads = await read(call.hub.store.heads())
    lanes = sorted((read_lane(name).level, head, name) for name, head in heads.items())
    oldest = min((head for _, head, _ in lanes), default=None)
    depth = counts.get("job:pending", 0) + counts.get("job:quarantined", 0)
    call.done = {"lanes": len(lanes)}
    return reply(
        {
            "ok": True,
            "counts": {name.removeprefix("job:"): n for name, n in counts.items() if name.startswith("job:")},
            "depth": {"jobs": depth, "limit": limits.max_depth},
            "inflight": {"leases": counts.get("job:running", 0), "limit": limits.max_inflight},
            "dead_letters": {
                "jobs": counts.get("job:failed", 0),
                "limit": limits.dead_letters_max,
                "over": call.hub.keeping.over,
            },
            "oldest_ready_seconds": None if oldest is None else _age(now, oldest),
            "lane_count": len(lanes),
            "lanes": [_lane(now, head, name) for _, head, name in lanes[:LANES_TOLD]],
            "pauses": pauses_answer(call.hub.pauses()),
            "throttled_sources": sorted(call.hub.throttled)[:LANES_TOLD],
            "commands_waiting": call.hub.committer.waiting,
            "long_polls": len(call.hub.waiting),
        }
    )


def _lane(now: int, head: int, name: str) -> dict[str, Any]:
    lane = read_lane(name)
    return {
        "priority": lane.level,
        "kind": lane.kind,
        "source": lane.source or None,
        "required_capabilities": list(lane.needs),
        "head_since": rfc3339(head // ORDERS),
        "head_age_seconds": _age(now, head),
    }


def _age(now: int, head: int) -> float:
    return max(0, now - head // ORDERS) / 1000


async def _execute(call: Call, commands: Sequence[Command]) -> list[Any]:
    """An answer or a `Refused` each. What refuses all of them, or is a bug, is raised."""
    outcomes = await call.hub.execute_many(commands, call.origin) if commands else []
    for outcome in outcomes:
        if isinstance(outcome, BaseException) and not isinstance(outcome, Refused):
            raise outcome
    return outcomes


def _one_of_two(form: RedriveManyForm | CancelManyForm) -> None:
    if not one_of_two(form):
        raise Refused(Code.INVALID_FIELD, "give either job_ids or filter")
