"""The data plane's handlers of results: one, the fleet's, many; with the proof that each brings."""

from __future__ import annotations

from typing import Any

import msgspec
from aiohttp import web

from sheratan_hub.canonical import Raw
from sheratan_hub.rules.command import Code, Command, Refused
from sheratan_hub.rules.finish import Finish, Finished
from sheratan_hub.rules.integrity import Proof, check_result
from sheratan_hub.web.body import decode, refuse_long
from sheratan_hub.web.errors import entry
from sheratan_hub.web.forms import IntegrityForm, NamedResultForm, ResultForm
from sheratan_hub.web.plane import Call
from sheratan_hub.web.render import reply


async def result(call: Call) -> web.StreamResponse:
    """POST /api/jobs/{id}/result."""
    command = _finish(call, call.params["id"], call.form)
    return reply(finished(await call.hub.execute(command, call.from_node(call.form.node_id))))


async def fleet_result(call: Call) -> web.StreamResponse:
    """POST /mesh/submit_result: the job is named in the body; without a lease_id its current lease counts."""
    command = _finish(call, call.form.job_id, call.form)
    return reply(finished(await call.hub.execute(command, call.from_node(call.form.node_id))))


async def results(call: Call) -> web.StreamResponse:
    """POST /api/results: several, each with an outcome of its own."""
    refuse_long(len(call.form.results), call.settings.limits.batch_jobs)
    parsed = [_result_entry(call, bytes(raw)) for raw in call.form.results]
    commands: list[Command] = [one for one in parsed if not isinstance(one, Refused)]
    outcomes = iter(await call.hub.execute_many(commands, call.origin) if commands else ())
    answers = [one if isinstance(one, Refused) else next(outcomes) for one in parsed]
    told = [_result_answer(call, one, raw) for one, raw in zip(answers, call.form.results, strict=True)]
    return reply({"ok": True, "results": told})


def _result_entry(call: Call, raw: bytes) -> Finish | Refused:
    try:
        if len(raw) > call.settings.limits.body_bytes:
            raise Refused(Code.BODY_TOO_LARGE, f"this entry is larger than {call.settings.limits.body_bytes} bytes")
        form = decode(raw, NamedResultForm)
        return _finish(call, form.job_id, form, lease_needed=True)
    except Refused as no:
        return no


def _result_answer(call: Call, outcome: Any, raw: Raw) -> dict[str, Any]:
    if isinstance(outcome, Refused):
        call.refused(outcome, _node_named(bytes(raw)))
        return entry(outcome, call.settings.queue.backpressure_mode)
    if isinstance(outcome, BaseException):
        raise outcome
    return finished(outcome)


def _node_named(raw: bytes) -> str | None:
    try:
        return msgspec.json.decode(raw, type=_Named).node_id
    except msgspec.DecodeError:
        return None


class _Named(msgspec.Struct):
    node_id: str | None = None


def _finish(call: Call, job_id: str, form: ResultForm, *, lease_needed: bool = False) -> Finish:
    if form.lease_id is None and (lease_needed or call.params):
        raise Refused(Code.INVALID_FIELD, "Object missing required field `lease_id`")
    text, error = bytes(form.result), bytes(form.error)
    _check_integrity(call, job_id, form.ok, text, error, form.integrity)
    return Finish(
        job_id,
        form.ok,
        form.lease_id,
        form.node_id,
        text,
        error,
        form.retry,
        None if form.retry_after_seconds is None else int(form.retry_after_seconds * 1000),
        call.services.clock.jitter(),
    )


def _check_integrity(call: Call, job_id: str, ok: bool, text: bytes, error: bytes, given: IntegrityForm | None) -> None:
    proof = Proof(given.mode, given.sha256, given.sig) if given is not None else None
    if check_result(job_id, ok, text, error, proof, call.services.demand):
        call.services.metrics.minute.add("integrity.ok")


def finished(done: Finished) -> dict[str, Any]:
    """What a verb that ends a lease is told."""
    answer: dict[str, Any] = {"ok": True, "job_id": done.job_id, "status": done.status}
    if done.late:
        answer["late"] = True
    if done.retry_in_ms:
        answer["retry_in_seconds"] = done.retry_in_ms / 1000
    return answer
