"""The data plane's handlers: parse, command, execute, render."""

from __future__ import annotations

from typing import Any

from aiohttp import web

from sheratan_hub.config import Settings
from sheratan_hub.rules.command import Code, Refused, Together
from sheratan_hub.rules.finish import Cancel, Cancelled, Extend, Extended, Release
from sheratan_hub.rules.jobs import TRANSITIONS, job_of
from sheratan_hub.rules.submit import Submit, Submitted
from sheratan_hub.web.body import decode, refuse_long
from sheratan_hub.web.errors import entry
from sheratan_hub.web.forms import BatchForm, JobForm
from sheratan_hub.web.plane import Call
from sheratan_hub.web.query import cursor, number, page_limit, word
from sheratan_hub.web.render import SubmitAnswer, job_answer, listed, reply, submitted
from sheratan_hub.web.results import finished

STATUSES = frozenset({status for status, _ in TRANSITIONS} | set(TRANSITIONS.values()) | {"quarantined", "throttled"})
"""What a list may be asked for; nothing is quarantined or throttled in this version."""

PAGE_BYTES = 4 * 1024 * 1024
"""A page of jobs ends once it holds this much; whoever wants more follows the cursor."""


def read_submit(body: bytes, doc: dict[str, Any], settings: Settings) -> JobForm | BatchForm:
    """The body of POST /api/jobs: a batch if it has `jobs`, else one job, which may be no larger than any body."""
    if "jobs" in doc:
        refuse_long(doc["jobs"], settings.limits.batch_jobs)
        return decode(body, BatchForm)
    if len(body) > settings.limits.body_bytes:
        raise Refused(Code.BODY_TOO_LARGE, f"the body is larger than {settings.limits.body_bytes} bytes")
    return decode(body, JobForm)


async def submit(call: Call) -> web.StreamResponse:
    """POST /api/jobs: one job, or a batch."""
    if isinstance(call.form, BatchForm):
        return await _submit_batch(call, call.form)
    answer = await _submit_one(call)
    return reply(answer, 200 if answer.dedup else 201)


async def fleet_submit(call: Call) -> web.StreamResponse:
    """POST /mesh/submit_request: one job, always 200."""
    return reply(await _submit_one(call))


async def _submit_one(call: Call) -> SubmitAnswer:
    command = _submit_command(call, call.form, header=True)
    done: Submitted = await call.services.room.submit(command, call.origin)
    return submitted(done, command.job_id, call.settings.idempotency.max_cached_bytes)


def _submit_command(call: Call, form: JobForm, *, header: bool) -> Submit:
    headers = call.request.headers
    key = (headers.get("Idempotency-Key") if header else None) or None
    if key is not None:
        key = key.strip().strip('"')
        if not (0 < len(key) <= 512 and key.isprintable()):
            raise Refused(Code.INVALID_FIELD, "Idempotency-Key must have 1 to 512 printable characters")
    return form.command(call.services.clock.job_id(), key, headers.get("traceparent"))


async def _submit_batch(call: Call, form: BatchForm) -> web.StreamResponse:
    parsed = [_batch_entry(call, bytes(raw)) for raw in form.jobs]
    outcomes = await (_all_or_none if form.atomic else _each)(call, parsed)
    fulls = [one for one in outcomes if isinstance(one, Refused) and one.code is Code.QUEUE_FULL]
    if fulls and len(fulls) == len(outcomes):
        raise fulls[0]
    answers = [_batch_answer(call, command, one) for command, one in zip(parsed, outcomes, strict=True)]
    return reply({"ok": True, "jobs": answers})


def _batch_entry(call: Call, raw: bytes) -> Submit | Refused:
    try:
        if len(raw) > call.settings.limits.body_bytes:
            raise Refused(Code.BODY_TOO_LARGE, f"this entry is larger than {call.settings.limits.body_bytes} bytes")
        return _submit_command(call, decode(raw, JobForm), header=False)
    except Refused as no:
        return no


async def _each(call: Call, parsed: list[Submit | Refused]) -> list[Any]:
    commands = [one for one in parsed if not isinstance(one, Refused)]
    outcomes = iter(await call.hub.execute_many(commands, call.origin) if commands else ())
    return [one if isinstance(one, Refused) else next(outcomes) for one in parsed]


async def _all_or_none(call: Call, parsed: list[Submit | Refused]) -> list[Any]:
    for place, one in enumerate(parsed):
        if isinstance(one, Refused):
            raise Refused(one.code, f"entry {place} of the atomic batch: {one.text}")
    commands = tuple(one for one in parsed if not isinstance(one, Refused))
    return list(await call.hub.execute(Together(commands), call.origin)) if commands else []


def _batch_answer(call: Call, command: Submit | Refused, outcome: Any) -> Any:
    if isinstance(outcome, Refused):
        call.refused(outcome)
        return entry(outcome, call.settings.queue.backpressure_mode)
    if isinstance(outcome, BaseException):
        raise outcome
    request_id = command.job_id if isinstance(command, Submit) else ""
    return submitted(outcome, request_id, call.settings.idempotency.max_cached_bytes)


async def extend(call: Call) -> web.StreamResponse:
    """POST /api/jobs/{id}/extend: the lease ends `seconds` from now."""
    seconds = call.form.seconds
    command = Extend(call.params["id"], call.form.lease_id, None if seconds is None else int(seconds * 1000))
    done: Extended = await call.hub.execute(command, call.from_node(call.form.node_id))
    return reply(
        {
            "ok": True,
            "job_id": done.job_id,
            "lease_seconds": done.lease_ms / 1000,
            "cancel_requested": done.cancel_requested,
        }
    )


async def release(call: Call) -> web.StreamResponse:
    """POST /api/jobs/{id}/release: the job goes back at no cost."""
    command = Release(call.params["id"], call.form.lease_id)
    return reply(finished(await call.hub.execute(command, call.from_node(call.form.node_id))))


async def cancel(call: Call) -> web.StreamResponse:
    """POST /api/jobs/{id}/cancel."""
    done: Cancelled = await call.hub.execute(Cancel(call.params["id"]), call.origin)
    return reply({"ok": True, "job_id": done.job_id, "status": done.status, "cancel_requested": done.cancel_requested})


async def job(call: Call) -> web.StreamResponse:
    """GET /api/jobs/{id}: one, after waiting for its end if asked."""
    wait_ms = int(number(call.request, "wait_seconds", 0, 0, 30) * 1000)
    found = await call.hub.job(call.params["id"], wait_ms)
    return reply(job_answer(found, await call.hub.params([found]), alone=True))


async def jobs(call: Call) -> web.StreamResponse:
    """GET /api/jobs: by status, kind, source, mission_id and node_id, newest ids last."""
    request = call.request
    status = word(request, "status")
    if status is not None and status not in STATUSES:
        raise Refused(Code.INVALID_FIELD, f"status must be one of {', '.join(sorted(STATUSES))}")
    labels = (status, *(word(request, name) for name in ("kind", "source", "mission_id", "node_id")))
    answers: list[Any] = []
    after, most, size, step = cursor(request), page_limit(request), 0, 16
    while True:
        page = await call.hub.page("job", labels, after, min(step, most - len(answers)))
        found = [job_of(row) for row in page.rows]
        params = await call.hub.params(found)
        answers += (job_answer(one, params, alone=False) for one in found)
        size += sum(len(row.doc) for row in page.rows) + sum(map(len, params.values()))
        after, step = page.next, step * 4
        if after is None or len(answers) >= most or size > PAGE_BYTES or len(page.rows) < min(step // 4, most):
            return listed("jobs", answers, after)
