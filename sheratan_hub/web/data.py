"""The data plane's handlers: parse, command, execute, render."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from functools import partial
from typing import Any

from sheratan_hub.config import Settings
from sheratan_hub.rules.command import Code, Quota, Refused, Together
from sheratan_hub.rules.finish import Cancel, Cancelled, Extend, Extended, Release
from sheratan_hub.rules.graph import Member, plan, refuse_repeated
from sheratan_hub.rules.jobs import TRANSITIONS, Job, job_of
from sheratan_hub.rules.redrive import Redrive
from sheratan_hub.rules.submit import Submit, Submitted
from sheratan_hub.tracing import traceparent_of
from sheratan_hub.web.answer import Answer
from sheratan_hub.web.body import decode, refuse_long
from sheratan_hub.web.errors import entry, quota_headers
from sheratan_hub.web.forms import BatchForm, JobForm
from sheratan_hub.web.gate import holds_still, patience_ms, refuse_revoked
from sheratan_hub.web.graphs import checked, checked_graph, ref_of
from sheratan_hub.web.history import histories
from sheratan_hub.web.plane import Call
from sheratan_hub.web.query import cursor, number, page_limit, word
from sheratan_hub.web.render import SubmitAnswer, job_answer, listed, redriven_answer, reply, status_of, submitted
from sheratan_hub.web.results import finished

STATUSES = frozenset({status for status, _ in TRANSITIONS} | set(TRANSITIONS.values()) | {"throttled"})
"""What a list may be asked for."""

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


async def submit(call: Call) -> Answer:
    """POST /api/jobs: submit one job, or a batch of up to a thousand."""
    if isinstance(call.form, BatchForm):
        return await _submit_batch(call, call.form)
    if call.form.ref is not None:
        raise Refused(Code.INVALID_FIELD, "ref names a job of a batch, this is a single one - at `$.ref`")
    answer, headers = await _submit_one(call)
    return reply(answer, 200 if answer.dedup else 201, headers)


async def fleet_submit(call: Call) -> Answer:
    """POST /mesh/submit_request: submit one job; 200 also when it is new."""
    answer, headers = await _submit_one(call)
    return reply(answer, headers=headers)


async def _submit_one(call: Call) -> tuple[SubmitAnswer, dict[str, str]]:
    command = _submit_command(call, call.form, header=True)
    if command.depends_on:
        command = await checked(call.hub, command)
    done: Submitted = await call.services.room.submit(command, call.origin)
    return _told(call, done, command.job_id), quota_headers(done.quota)


def _told(call: Call, done: Submitted, request_id: str) -> SubmitAnswer:
    answer = submitted(done, request_id, call.settings.idempotency.max_cached_bytes)
    if done.dedup and not answer.result_truncated:
        call.hub.reading.note(done.job)
    return answer


def _submit_command(call: Call, form: JobForm, *, header: bool) -> Submit:
    key = header_key(call) if header else None
    return form.command(call.services.clock.job_id(), key, _header_trace(call))


def _header_trace(call: Call) -> str | None:
    """The trace context of the header; several of them are as good as none."""
    headers = call.request.headers
    text = headers.get("traceparent")
    return None if text is None or len(headers.getall("traceparent")) > 1 else traceparent_of(text)


def header_key(call: Call) -> str | None:
    """The idempotency key of the header. Refused with `invalid_field`."""
    key = call.request.headers.get("Idempotency-Key") or None
    if key is not None:
        key = key.strip().strip('"')
        if not (0 < len(key) <= 512 and key.isprintable()):
            raise Refused(Code.INVALID_FIELD, "Idempotency-Key must have 1 to 512 printable characters")
    return key


async def _submit_batch(call: Call, form: BatchForm) -> Answer:
    members = [batch_entry(call, bytes(raw)) for raw in form.jobs]
    parsed = [member.submit for member in members]
    if any(isinstance(one, Submit) and one.depends_on for one in parsed):
        graph = await checked_graph(call.hub, plan(members, atomic=form.atomic))
        outcomes = list(await call.hub.execute(graph, call.origin))
    else:
        refuse_repeated(members)
        outcomes = await (_all_or_none if form.atomic else _each)(call, parsed)
    fulls = [one for one in outcomes if isinstance(one, Refused) and one.code is Code.QUEUE_FULL]
    if fulls and len(fulls) == len(outcomes):
        raise fulls[0]
    answers = [batch_answer(call, command, one) for command, one in zip(parsed, outcomes, strict=True)]
    return reply({"ok": True, "jobs": answers}, headers=quota_headers(tightest(outcomes)))


def tightest(outcomes: Iterable[Any]) -> Quota | None:
    """What the limited source of a batch may still submit; of several that which has the least left."""
    quotas = (getattr(one, "quota", None) for one in outcomes)
    return min((one for one in quotas if one is not None), key=lambda one: (one.left, -one.next_in_ms), default=None)


def batch_entry(call: Call, raw: bytes) -> Member:
    """An entry of a batch, whatever is wrong with it."""
    try:
        if len(raw) > call.settings.limits.body_bytes:
            raise Refused(Code.BODY_TOO_LARGE, f"this entry is larger than {call.settings.limits.body_bytes} bytes")
        form = decode(raw, JobForm)
        return Member(form.ref, _submit_command(call, form, header=False))
    except Refused as no:
        return Member(ref_of(raw), no)


async def _each(call: Call, parsed: list[Submit | Refused]) -> list[Any]:
    commands = [one for one in parsed if not isinstance(one, Refused)]
    outcomes = iter(await call.hub.execute_many(commands, call.origin, order="in_turn") if commands else ())
    return [one if isinstance(one, Refused) else next(outcomes) for one in parsed]


async def _all_or_none(call: Call, parsed: list[Submit | Refused]) -> list[Any]:
    for place, one in enumerate(parsed):
        if isinstance(one, Refused):
            raise Refused(one.code, f"entry {place} of the atomic batch: {one.text}")
    commands = tuple(one for one in parsed if not isinstance(one, Refused))
    return list(await call.hub.execute(Together(commands), call.origin)) if commands else []


def batch_answer(call: Call, command: Submit | Refused, outcome: Any) -> Any:
    """What an entry of a batch is told."""
    if isinstance(outcome, Refused):
        call.refused(outcome)
        return entry(outcome, call.settings.queue.backpressure_mode)
    if isinstance(outcome, BaseException):
        raise outcome
    request_id = command.job_id if isinstance(command, Submit) else ""
    return _told(call, outcome, request_id)


async def extend(call: Call) -> Answer:
    """POST /api/jobs/{id}/extend: let the lease end `seconds` from now."""
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


async def release(call: Call) -> Answer:
    """POST /api/jobs/{id}/release: give the job back at no cost."""
    command = Release(call.params["id"], call.form.lease_id)
    return reply(finished(await call.hub.execute(command, call.from_node(call.form.node_id))))


async def cancel(call: Call) -> Answer:
    """POST /api/jobs/{id}/cancel: cancel a waiting job, or ask the node of a running one to stop."""
    done: Cancelled = await call.hub.execute(Cancel(call.params["id"]), call.origin)
    return reply({"ok": True, "job_id": done.job_id, "status": done.status, "cancel_requested": done.cancel_requested})


async def redrive(call: Call) -> Answer:
    """POST /api/jobs/{id}/redrive: have a job that failed or was cancelled run again."""
    return reply(
        redriven_answer(
            await call.hub.execute(Redrive(call.params["id"], dependents=call.form.dependents), call.origin)
        )
    )


async def job(call: Call) -> Answer:
    """GET /api/jobs/{id}: one job, after waiting for its end if asked."""
    wait_ms = int(number(call.request, "wait_seconds", 0, 0, 30) * 1000)
    found = await call.hub.job(call.params["id"], patience_ms(call, wait_ms), partial(holds_still, call))
    if wait_ms:
        refuse_revoked(call)
    past = (await histories(call.hub, [found]))[found.id]
    call.hub.reading.note(found)
    params = await call.hub.params([found])
    return reply(job_answer(found, params, alone=True, history=past, throttled=call.hub.throttled))


async def jobs(call: Call) -> Answer:
    """GET /api/jobs: the jobs by status, kind, source, mission_id and node_id, in the order they were submitted."""
    request = call.request
    status = word(request, "status")
    if status is not None and status not in STATUSES:
        raise Refused(Code.INVALID_FIELD, f"status must be one of {', '.join(sorted(STATUSES))}")
    stored = "pending" if status == "throttled" else status
    labels = (stored, *(word(request, name) for name in ("kind", "source", "mission_id", "node_id")))
    answers: list[Any] = []
    after, most, size, step = cursor(request), page_limit(request), 0, 16
    while True:
        page = await call.hub.page("job", labels, after, min(step, most - len(answers)))
        found = _shown(map(job_of, page.rows), status, call.hub.throttled)
        params = await call.hub.params(found)
        answers += (job_answer(one, params, alone=False, throttled=call.hub.throttled) for one in found)
        size += sum(len(row.doc) for row in page.rows) + sum(map(len, params.values()))
        after, step = page.next, step * 4
        if after is None or len(answers) >= most or size > PAGE_BYTES or len(page.rows) < min(step // 4, most):
            return listed("jobs", answers, after)


def _shown(jobs: Iterable[Job], status: str | None, throttled: Collection[str]) -> list[Job]:
    """Of pending jobs those that are shown in this state: throttled ones are stored as pending."""
    if status == "throttled" or (status == "pending" and throttled):
        return [job for job in jobs if status_of(job, throttled) == status]
    return list(jobs)
